// The real binary with the shipped model: stream, drain, signals, start-up failures, metrics.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <minitron/v1/generation.grpc.pb.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "tests/integration/server_process.h"

namespace minitron::integration {
namespace {

using ::testing::HasSubstr;

constexpr char kShippedTokenizer[] = "7f7151a24f7c8a1d2cb120dee3dec8150c7a35cf5ec37601412999606324153a";

std::unique_ptr<v1::GenerationService::Stub> Connect(const ServerProcess& server) {
  return v1::GenerationService::NewStub(
      grpc::CreateChannel("127.0.0.1:" + std::to_string(server.grpc_port), grpc::InsecureChannelCredentials()));
}

v1::GenerateStreamRequest Request(int max_tokens) {
  v1::GenerateStreamRequest request;
  request.mutable_task()->set_text("To be or not to be,");
  request.mutable_task()->mutable_sampling()->set_seed(1);
  request.mutable_task()->mutable_stopping()->set_max_tokens(static_cast<uint32_t>(max_tokens));
  request.mutable_task()->mutable_stopping()->set_ignore_eos(true);
  return request;
}

int LineCount(const std::string& text) { return static_cast<int>(std::count(text.begin(), text.end(), '\n')); }

std::string Get(int port, const std::string& path) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) return "";
  const std::string request = "GET " + path + " HTTP/1.0\r\n\r\n";
  if (write(fd, request.data(), request.size()) != static_cast<ssize_t>(request.size())) return "";
  std::string answer;
  char buffer[4096];
  for (ssize_t n = 0; (n = read(fd, buffer, sizeof(buffer))) > 0;) answer.append(buffer, static_cast<size_t>(n));
  close(fd);
  return answer;
}

TEST(ServerTest, StreamsTheSameTextTwiceAndDrainsOnSigterm) {
  ServerProcess server({});
  ASSERT_TRUE(server.WaitUntilReady()) << server.StandardError();
  const auto stub = Connect(server);
  std::string texts[2];
  for (std::string& text : texts) {
    grpc::ClientContext context;
    auto reader = stub->GenerateStream(&context, Request(32));
    v1::GenerateStreamResponse response;
    while (reader->Read(&response)) text += response.delta().text();
    const grpc::Status status = reader->Finish();
    ASSERT_TRUE(status.ok()) << status.error_message();
  }
  EXPECT_FALSE(texts[0].empty());
  EXPECT_EQ(texts[0], texts[1]);
  const std::string metrics = Get(server.metrics_port, "/metrics");
  EXPECT_THAT(metrics, HasSubstr("minitron_generation_tokens_total{model_name=\"minitron-tiny\"} 64"));
  EXPECT_THAT(metrics, HasSubstr("minitron_ready{model_name=\"minitron-tiny\"} 1"));
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0) << server.StandardError();
}

// The text, and how many prompt tokens were found in the cache. `tenant` and `salt` say who asks.
std::pair<std::string, int> GenerateFor(v1::GenerationService::Stub& stub, const std::string& tenant,
                                        const std::string& salt) {
  v1::GenerateRequest request;
  v1::GenerationTask& task = *request.mutable_task();
  task.set_text(
      "Shall I compare thee to a summer's day? Thou art more lovely and more temperate: rough winds do shake");
  task.set_cache_salt(salt);
  task.mutable_sampling()->set_seed(7);
  task.mutable_stopping()->set_max_tokens(24);
  task.mutable_stopping()->set_ignore_eos(true);
  grpc::ClientContext context;
  context.AddMetadata("x-minitron-tenant", tenant);
  v1::GenerateResponse response;
  const grpc::Status status = stub.Generate(&context, request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  if (response.sequences_size() != 1) return {};
  return {response.sequences(0).text(), static_cast<int>(response.sequences(0).finished().usage().cached_tokens())};
}

TEST(ServerTest, APromptIsComputedOncePerTenantAndSaltAndTheAnswerStaysTheSame) {
  ServerProcess server({"--block-size=8", "--overlap=on", "--admission-mode=reserve"});
  ASSERT_TRUE(server.WaitUntilReady()) << server.StandardError();
  const auto stub = Connect(server);
  const auto [text, cold] = GenerateFor(*stub, "a", "");
  EXPECT_EQ(cold, 0);
  const auto [warm_text, warm] = GenerateFor(*stub, "a", "");
  EXPECT_GE(warm, 8);
  EXPECT_EQ(warm % 8, 0);
  EXPECT_EQ(warm_text, text);
  EXPECT_EQ(GenerateFor(*stub, "b", ""), std::make_pair(text, 0));
  EXPECT_EQ(GenerateFor(*stub, "a", "salt"), std::make_pair(text, 0));
  EXPECT_THAT(
      Get(server.metrics_port, "/metrics"),
      HasSubstr("minitron_prefix_cache_hits_tokens_total{model_name=\"minitron-tiny\"} " + std::to_string(warm)));

  ServerProcess plain({"--block-size=16", "--overlap=off", "--prefix-cache=off"});
  ASSERT_TRUE(plain.WaitUntilReady()) << plain.StandardError();
  const auto plain_stub = Connect(plain);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(GenerateFor(*plain_stub, "a", ""), std::make_pair(text, 0));
}

TEST(ServerTest, ALiveStreamEndsCompleteDuringADrain) {
  ServerProcess server({});
  ASSERT_TRUE(server.WaitUntilReady()) << server.StandardError();
  const auto stub = Connect(server);
  grpc::ClientContext context;
  auto reader = stub->GenerateStream(&context, Request(300));
  v1::GenerateStreamResponse response;
  ASSERT_TRUE(reader->Read(&response));
  server.Signal(SIGTERM);
  bool finished = false;
  while (reader->Read(&response)) finished = finished || response.has_finished();
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_TRUE(finished);
  EXPECT_EQ(server.Wait(), 0) << server.StandardError();
}

TEST(ServerTest, ALostDeviceIsATypedErrorAndExitCode5) {
  ServerProcess server({}, MINITRON_FAILING_SERVER_BINARY);
  ASSERT_TRUE(server.WaitUntilReady()) << server.StandardError();
  const auto stub = Connect(server);
  grpc::ClientContext context;
  auto reader = stub->GenerateStream(&context, Request(300));
  v1::GenerateStreamResponse response;
  int num_tokens = 0;
  while (reader->Read(&response)) num_tokens += response.delta().token_ids_size();
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(status.error_message(), "the engine has failed; this server will restart");
  EXPECT_GT(num_tokens, 10) << "what was computed before arrives";
  EXPECT_EQ(server.Wait(), 5);
  EXPECT_THAT(server.StandardError(), HasSubstr("engine failed error=\"INTERNAL: fake: device lost\""));
}

TEST(ServerTest, SecondSignalEndsAtOnce) {
  ServerProcess server({"--drain-delay=3600"});
  ASSERT_TRUE(server.WaitUntilReady()) << server.StandardError();
  server.Signal(SIGTERM);
  // The first must have been taken, or both count as one.
  ASSERT_TRUE(server.WaitForLog("action=drain"));
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 128 + SIGTERM);
}

TEST(ServerTest, TakenPortIsOneLineAndExitCode4) {
  ServerProcess first({});
  ASSERT_TRUE(first.WaitUntilReady()) << first.StandardError();
  ServerProcess second({"--port=" + std::to_string(first.grpc_port)});
  EXPECT_EQ(second.Wait(), 4);
  EXPECT_EQ(LineCount(second.StandardError()), 1) << second.StandardError();
  EXPECT_THAT(second.StandardError(), HasSubstr(std::to_string(first.grpc_port)));
  for (const std::string flag : {"--metrics-port", "--health-port", "--http-port"}) {
    ServerProcess other({flag + "=" + std::to_string(first.metrics_port)});
    EXPECT_EQ(other.Wait(), 4) << flag;
    EXPECT_EQ(LineCount(other.StandardError()), 1) << other.StandardError();
    EXPECT_THAT(other.StandardError(), HasSubstr(std::to_string(first.metrics_port)));
  }
}

TEST(ServerTest, AHostThatIsNoneIsSaidBeforeTheModelIsLoaded) {
  ServerProcess server({"--host=999.1.1.1"});
  EXPECT_EQ(server.Wait(), 4);
  EXPECT_EQ(LineCount(server.StandardError()), 1) << server.StandardError();
  EXPECT_THAT(server.StandardError(), HasSubstr("--port=0: cannot listen on 999.1.1.1: "));
}

TEST(ServerTest, AModelThatIsAFileIsNoFolder) {
  ServerProcess server({"--model=" MINITRON_SOURCE_DIR "/README.md"});
  EXPECT_EQ(server.Wait(), 3);
  EXPECT_THAT(server.StandardError(), HasSubstr("is no folder"));
}

TEST(ServerTest, MissingModelIsExitCode3) {
  ServerProcess server({"--model=/nonexistent/model"});
  EXPECT_EQ(server.Wait(), 3);
  EXPECT_EQ(LineCount(server.StandardError()), 1) << server.StandardError();
}

TEST(ServerTest, ABrokenModelFileIsOneLineThatNamesItAndExitCode3) {
  namespace fs = std::filesystem;
  const fs::path shipped = MINITRON_SOURCE_DIR "/deploy/models/minitron-tiny";
  for (const std::string broken : {"config.json", "tokenizer.model", "model.safetensors"}) {
    const fs::path folder = fs::path(::testing::TempDir()) / ("broken_" + broken);
    fs::remove_all(folder);
    fs::create_directories(folder);
    for (const auto& entry : fs::directory_iterator(shipped)) fs::copy(entry.path(), folder);
    fs::resize_file(folder / broken, fs::file_size(folder / broken) / 2);
    ServerProcess server({"--model=" + folder.string()});
    EXPECT_EQ(server.Wait(), 3) << broken;
    const std::string& error = server.StandardError();
    const size_t last_line = error.rfind("minitron-server: ");
    ASSERT_NE(last_line, std::string::npos) << error;
    EXPECT_EQ(LineCount(error.substr(last_line)), 1) << error;
    EXPECT_THAT(error.substr(last_line), HasSubstr(broken));
    fs::remove_all(folder);
  }
}

TEST(ServerTest, ATokenizerWithAnotherHashIsOneLineAndExitCode3WhereverThePinComesFrom) {
  const std::string pin(64, '0');
  const std::string config = ::testing::TempDir() + "pin.json";
  std::ofstream(config) << R"({"tokenizer-sha256": ")" << pin << R"("})";
  for (const std::string& flag : {"--tokenizer-sha256=" + pin, "--config=" + config}) {
    ServerProcess server({flag});
    EXPECT_EQ(server.Wait(), 3) << flag;
    EXPECT_EQ(LineCount(server.StandardError()), 1) << server.StandardError();
    EXPECT_THAT(server.StandardError(), HasSubstr("--tokenizer-sha256=" + pin + ": "));
    EXPECT_THAT(server.StandardError(), HasSubstr("tokenizer.model has " + std::string(kShippedTokenizer) + "\n"));
  }
  ServerProcess right({std::string("--tokenizer-sha256=") + kShippedTokenizer});
  EXPECT_TRUE(right.WaitUntilReady()) << right.StandardError();
}

TEST(ServerTest, UnwritablePortFileIsOneLineAndExitCode2) {
  ServerProcess server({"--port-file=/nonexistent/ports"});
  EXPECT_EQ(server.Wait(), 2);
  EXPECT_EQ(server.StandardError(), "minitron-server: --port-file=/nonexistent/ports: cannot be written\n");
}

TEST(ServerTest, BadFlagIsExitCode2) {
  ServerProcess server({"--block-size=24"});
  EXPECT_EQ(server.Wait(), 2);
  EXPECT_EQ(server.StandardError(), "minitron-server: --block-size=24: not a power of two in [8, 256]\n");
}

}  // namespace
}  // namespace minitron::integration
