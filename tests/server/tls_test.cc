// TLS of the listener: what is refused before it is used, and what clients see when files change.
#include "server/tls.h"

#include <gmock/gmock.h>
#include <grpcpp/security/credentials.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <future>

#include "tests/server/server_harness.h"
#include "tests/testing/certificates.h"

namespace minitron::server {
namespace {

using testing::CertificateAuthority;
using ::testing::HasSubstr;
using testing::PemPair;

class TlsTest : public ::testing::Test {
 protected:
  TlsTest() {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  ~TlsTest() override { std::filesystem::remove_all(folder_); }

  void Write(const std::string& name, const std::string& text) const {
    // Replaced in one instant, as an operator's tool should.
    std::ofstream(folder_ + "/new", std::ios::trunc) << text;
    std::filesystem::rename(folder_ + "/new", folder_ + "/" + name);
  }
  void Write(const PemPair& pair) const {
    Write("cert.pem", pair.certificate);
    Write("key.pem", pair.key);
  }
  TlsFiles Files(bool with_client_ca = false) const {
    return {folder_ + "/cert.pem", folder_ + "/key.pem", with_client_ca ? folder_ + "/ca.pem" : ""};
  }
  std::string Problem() const {
    return std::string(LoadTlsMaterial(Files(), std::chrono::system_clock::now()).status().message());
  }
  static std::shared_ptr<grpc::Channel> Connect(int port, const std::string& roots, const PemPair& own = {}) {
    grpc::SslCredentialsOptions options{roots, own.key, own.certificate};
    grpc::ChannelArguments arguments;
    arguments.SetSslTargetNameOverride("server.example");
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    return grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(port), grpc::SslCredentials(options), arguments);
  }
  static grpc::Status ListModels(const std::shared_ptr<grpc::Channel>& channel) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    v1::ListModelsResponse response;
    return v1::ModelService::NewStub(channel)->ListModels(&context, {}, &response);
  }

  const std::string folder_ = ::testing::TempDir() + "/tls_test";
  CertificateAuthority authority_;
};

TEST_F(TlsTest, OnlyAPairThatWorksIsTaken) {
  const PemPair good = authority_.Issue("server.example");
  EXPECT_THAT(Problem(), HasSubstr("cert.pem: cannot be read"));
  Write(good);
  EXPECT_EQ(Problem(), "");
  Write("key.pem", authority_.Issue("server.example").key);
  EXPECT_THAT(Problem(), HasSubstr("key.pem: is not the key of "));
  Write("key.pem", "garbage");
  EXPECT_THAT(Problem(), HasSubstr("key.pem: holds no PEM private key"));
  Write("cert.pem", good.key);
  EXPECT_THAT(Problem(), HasSubstr("cert.pem: holds no PEM certificate"));
  Write(authority_.Issue("server.example", std::chrono::seconds(-60)));
  EXPECT_THAT(Problem(), HasSubstr("the certificate has expired"));
}

TEST_F(TlsTest, PlaintextAndUnknownAuthoritiesGetNothing) {
  Write(authority_.Issue("server.example"));
  auto store = TlsStore::Open(Files());
  ASSERT_TRUE(store.ok()) << store.status();
  HarnessOptions options;
  options.tls = store->get();
  ServerHarness harness(options);
  EXPECT_TRUE(ListModels(Connect(harness.server->port(), authority_.certificate())).ok());
  EXPECT_FALSE(ListModels(Connect(harness.server->port(), CertificateAuthority().certificate())).ok());
  EXPECT_FALSE(ListModels(harness.Connect()).ok());
}

TEST_F(TlsTest, ABadPairKeepsTheOldOneAndAGoodOneReplacesItForNewConnections) {
  Write(authority_.Issue("server.example"));
  auto store = TlsStore::Open(Files());
  ASSERT_TRUE(store.ok());
  HarnessOptions options;
  options.tls = store->get();
  ServerHarness harness(options);
  const auto open = Connect(harness.server->port(), authority_.certificate());
  EXPECT_TRUE(ListModels(open).ok());

  Write("key.pem", "garbage");
  EXPECT_FALSE((*store)->Reload().ok());
  EXPECT_TRUE(ListModels(Connect(harness.server->port(), authority_.certificate())).ok()) << "the old pair stays";

  CertificateAuthority next;
  Write(next.Issue("server.example"));
  EXPECT_TRUE((*store)->Reload().value());
  EXPECT_TRUE(ListModels(open).ok()) << "open connections stay";
  EXPECT_TRUE(ListModels(Connect(harness.server->port(), next.certificate())).ok());
  EXPECT_FALSE(ListModels(Connect(harness.server->port(), authority_.certificate())).ok());
}

TEST_F(TlsTest, AHundredRotationsUnderLoadFailNoStream) {
  Write(authority_.Issue("server.example"));
  auto store = TlsStore::Open(Files());
  ASSERT_TRUE(store.ok());
  HarnessOptions options;
  options.tls = store->get();
  ServerHarness harness(options);
  harness.RunEngine();
  std::atomic<bool> stop{false};
  // Each stream on a connection of its own, so that handshakes and rotations meet.
  const auto load = [&] {
    int failed = 0;
    int count = 0;
    for (; !stop; ++count) {
      const auto stub = v1::GenerationService::NewStub(Connect(harness.server->port(), authority_.certificate()));
      grpc::ClientContext context;
      v1::GenerateStreamRequest request;
      request.mutable_task()->mutable_token_ids()->add_ids(5);
      request.mutable_task()->mutable_stopping()->set_max_tokens(20);
      auto reader = stub->GenerateStream(&context, request);
      v1::GenerateStreamResponse response;
      bool finished = false;
      while (reader->Read(&response)) finished = response.has_finished();
      failed += !reader->Finish().ok() || !finished;
    }
    return std::pair(count, failed);
  };
  auto first = std::async(std::launch::async, load);
  auto second = std::async(std::launch::async, load);
  for (int i = 0; i < 100; ++i) {
    Write(authority_.Issue("server.example"));
    ASSERT_TRUE((*store)->Reload().value());
    ASSERT_TRUE(ListModels(Connect(harness.server->port(), authority_.certificate())).ok());
  }
  stop = true;
  for (auto* result : {&first, &second}) {
    const auto [count, failed] = result->get();
    EXPECT_GT(count, 0);
    EXPECT_EQ(failed, 0) << "of " << count;
  }
}

TEST_F(TlsTest, MutualTlsTurnsACertificatesNameIntoATenant) {
  Write(authority_.Issue("server.example"));
  CertificateAuthority clients;
  Write("ca.pem", clients.certificate());
  auto store = TlsStore::Open(Files(/*with_client_ca=*/true));
  ASSERT_TRUE(store.ok()) << store.status();
  HarnessOptions options;
  options.tls = store->get();
  auto table = AuthTable::Parse(
      R"({"tokens": [{"id": "c", "client_san": "alice.example", "tenant": "alice", "roles": ["user"]}]})");
  ASSERT_TRUE(table.ok()) << table.status();
  options.auth = *table;
  ServerHarness harness(options);
  const auto call = [&](const PemPair& own) {
    return ListModels(Connect(harness.server->port(), authority_.certificate(), own)).error_code();
  };
  EXPECT_EQ(call(clients.Issue("alice.example")), grpc::StatusCode::OK);
  EXPECT_EQ(call(clients.Issue("mallory.example")), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(call({}), grpc::StatusCode::UNAVAILABLE) << "no certificate, no connection";
  EXPECT_EQ(call(authority_.Issue("alice.example")), grpc::StatusCode::UNAVAILABLE) << "of another authority";
}

}  // namespace
}  // namespace minitron::server
