// Deny by default: every method of every service that the server really has, without a token, with a wrong one, with
// one of another role. Also what a tenant's limits do to calls, and that none of it shows a secret.
#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/unknown_field_set.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <future>
#include <sstream>

#include "tests/server/raw_call.h"
#include "tests/server/server_harness.h"

namespace minitron::server {
namespace {

using google::protobuf::UnknownFieldSet;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kUserToken[] = "user-token-5d1f";
constexpr char kAdminToken[] = "admin-token-90ac";
constexpr char kReflection[] = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";

// With the SHA-256 of the two.
constexpr char kAuthFile[] = R"({
  "tenants": {"alice": {"max_streams": 2, "tokens_per_minute": 100}},
  "tokens": [
    {"id": "u", "sha256": "f3957e9b8aaa4a8fcebf451b36841cb7d9d65b2cef466e60ddcab10f921669e8", "tenant": "alice", "roles": ["user"]},
    {"id": "a", "sha256": "9eacc5d147cfc5ce0d8bc09f646b5191af687957ca39a01fd0f3ce92a3a2458e", "tenant": "ops", "roles": ["admin"]}]})";

std::shared_ptr<const AuthTable> MakeTable() {
  auto table = AuthTable::Parse(kAuthFile);
  EXPECT_TRUE(table.ok()) << table.status();
  return *table;
}

// The names in the answer to a reflection request for the list of services:
// ServerReflectionResponse.list_services_response = 6, .service = 1, .name = 1.
std::vector<std::string> ServiceNames(const std::string& answer) {
  std::vector<std::string> names;
  UnknownFieldSet response;
  if (!response.ParseFromString(answer)) return names;
  for (int i = 0; i < response.field_count(); ++i) {
    if (response.field(i).number() != 6) continue;
    UnknownFieldSet list;
    list.ParseFromString(response.field(i).length_delimited());
    for (int k = 0; k < list.field_count(); ++k) {
      UnknownFieldSet service;
      service.ParseFromString(list.field(k).length_delimited());
      names.push_back(service.field(0).length_delimited());
    }
  }
  return names;
}

Role RoleOf(const std::string& method) {
  const std::string service = method.substr(0, method.find('/'));
  if (service == "minitron.v1.AdminService" || service == "grpc.channelz.v1.Channelz" || service == "vllm.Control") {
    return Role::kAdmin;
  }
  for (const char* name : {"Abort", "GetServerInfo", "GetLoads"}) {
    if (method == std::string("vllm.grpc.engine.VllmEngine/") + name) return Role::kAdmin;
  }
  return Role::kUser;
}

class AuthorizationTest : public ::testing::Test {
 protected:
  static HarnessOptions Options() {
    HarnessOptions options;
    options.auth = MakeTable();
    options.grpc.channelz = true;
    return options;
  }
  grpc::StatusCode Call(const std::string& method, const std::string& token) {
    return CallRaw(channel_, method, token).status.error_code();
  }
  std::vector<std::string> Methods(std::string* problems) {
    // ServerReflectionRequest.list_services = 7, empty.
    const RawResult answer =
        CallRaw(channel_, kReflection, std::string("Bearer ") + kUserToken, std::string("\x3a\0", 2));
    std::vector<std::string> methods;
    for (const std::string& message : answer.messages) {
      for (const std::string& name : ServiceNames(message)) {
        if (name == "grpc.health.v1.Health") continue;
        const auto* service = google::protobuf::DescriptorPool::generated_pool()->FindServiceByName(name);
        if (service == nullptr) {
          *problems += name + " has no descriptor; ";
          continue;
        }
        for (int i = 0; i < service->method_count(); ++i) methods.push_back(name + "/" + service->method(i)->name());
      }
    }
    return methods;
  }

  ServerHarness harness_{Options()};
  std::shared_ptr<grpc::Channel> channel_ = harness_.Connect();
};

TEST_F(AuthorizationTest, EveryMethodOfEveryServiceIsClosedToStrangersAndToOtherRoles) {
  harness_.RunEngine();
  std::string problems;
  const std::vector<std::string> methods = Methods(&problems);
  EXPECT_EQ(problems, "");
  // The list is the server's own; these must be on it, or the walk proves nothing.
  EXPECT_THAT(methods, Contains("minitron.v1.GenerationService/GenerateStream"));
  EXPECT_THAT(methods, Contains("minitron.v1.AdminService/Drain"));
  EXPECT_THAT(methods, Contains("vllm.Inference/GenerateStream"));
  EXPECT_THAT(methods, Contains("vllm.grpc.engine.VllmEngine/Abort"));
  EXPECT_THAT(methods, Contains("grpc.channelz.v1.Channelz/GetServers"));
  EXPECT_THAT(methods, Contains("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"));
  for (const std::string& method : methods) {
    SCOPED_TRACE(method);
    const std::string path = "/" + method;
    const bool admin = RoleOf(method) == Role::kAdmin;
    for (const char* token : {"", "Bearer wrong", "Bearer ", "Basic dXNlcg==", "user-token-5d1f",
                              "Bearer user-token-5d1f ", "Bearer USER-TOKEN-5D1F"}) {
      EXPECT_EQ(Call(path, token), grpc::StatusCode::UNAUTHENTICATED) << "with \"" << token << "\"";
    }
    const std::string right = std::string("Bearer ") + (admin ? kAdminToken : kUserToken);
    const std::string other = std::string("Bearer ") + (admin ? kUserToken : kAdminToken);
    EXPECT_EQ(Call(path, other), grpc::StatusCode::PERMISSION_DENIED);
    const grpc::StatusCode with_right = Call(path, right);
    EXPECT_NE(with_right, grpc::StatusCode::UNAUTHENTICATED);
    EXPECT_NE(with_right, grpc::StatusCode::PERMISSION_DENIED);
  }
  EXPECT_EQ(harness_.num_drain_requests, 1) << "only the call that may drain did";
}

TEST_F(AuthorizationTest, MethodsNobodyKnowsAreClosedToo) {
  EXPECT_EQ(Call("/nobody.Knows/It", ""), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(Call("/minitron.v1.GenerationService/Nothing", "Bearer wrong"), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(Call("/nobody.Knows/It", std::string("Bearer ") + kUserToken), grpc::StatusCode::UNIMPLEMENTED);
}

TEST_F(AuthorizationTest, HealthNeedsNoToken) {
  EXPECT_EQ(Call("/grpc.health.v1.Health/Check", ""), grpc::StatusCode::OK);
}

TEST_F(AuthorizationTest, RefusalsAreTypedCountedAndShowNoToken) {
  const RawResult missing = CallRaw(channel_, "/minitron.v1.GenerationService/Generate", "");
  EXPECT_THAT(missing.status.error_details(), HasSubstr("NO_TOKEN"));
  const RawResult wrong = CallRaw(channel_, "/minitron.v1.GenerationService/Generate", "Bearer guess-1234");
  EXPECT_THAT(wrong.status.error_details(), HasSubstr("UNKNOWN_TOKEN"));
  EXPECT_THAT(wrong.status.error_message() + wrong.status.error_details(), Not(HasSubstr("guess-1234")));
  const std::string text = harness_.MetricsText();
  EXPECT_THAT(text, HasSubstr(R"(minitron_auth_failures_total{model_name="tiny",reason="missing"} 1)"));
  EXPECT_THAT(text, HasSubstr(R"(minitron_auth_failures_total{model_name="tiny",reason="unknown"} 1)"));
  EXPECT_THAT(text, HasSubstr(R"(minitron_admission_rejections_total{model_name="tiny",reason="auth"} 2)"));
}

TEST_F(AuthorizationTest, ATenantCannotTakeMoreThanItsShare) {
  v1::GenerateRequest request;
  request.mutable_task()->mutable_token_ids()->add_ids(5);
  request.mutable_task()->mutable_stopping()->set_max_tokens(80);
  const auto call = [&] {
    grpc::ClientContext context;
    context.AddMetadata("authorization", std::string("Bearer ") + kUserToken);
    context.AddMetadata("x-minitron-tenant", "somebody-else");
    v1::GenerateResponse response;
    return harness_.generation->Generate(&context, request, &response);
  };
  auto first = std::async(std::launch::async, call);
  harness_.engine->WaitForRequests(1);
  const grpc::Status over = call();  // 81 of 100 tokens are promised
  EXPECT_EQ(over.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << over.error_message();
  EXPECT_THAT(over.error_details(), HasSubstr("QUOTA_EXCEEDED"));
  harness_.engine->script = {3};  // the end of the sequence: one token was used, the rest is refunded
  harness_.Step(2);
  EXPECT_TRUE(first.get().ok());
  auto second = std::async(std::launch::async, call);
  harness_.engine->WaitForRequests(2);
  harness_.Step(2);
  EXPECT_TRUE(second.get().ok());
  const std::string text = harness_.MetricsText();
  EXPECT_THAT(text, HasSubstr(R"(minitron_tenant_requests_total{model_name="tiny",tenant="alice"} 2)"));
  EXPECT_THAT(text, HasSubstr(R"(minitron_tenant_refusals_total{model_name="tiny",tenant="alice"} 1)"));
  EXPECT_THAT(text, HasSubstr(R"(minitron_admission_rejections_total{model_name="tiny",reason="quota"} 1)"));
  EXPECT_THAT(text, Not(HasSubstr("somebody-else"))) << "the token says who the tenant is";
}

TEST_F(AuthorizationTest, StreamsOfATenantAreCounted) {
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReader<v1::GenerateStreamResponse>>> readers;
  v1::GenerateStreamRequest request;
  request.mutable_task()->mutable_token_ids()->add_ids(5);
  request.mutable_task()->mutable_stopping()->set_max_tokens(10);
  for (int i = 0; i < 3; ++i) {
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    contexts.back()->AddMetadata("authorization", std::string("Bearer ") + kUserToken);
    readers.push_back(harness_.generation->GenerateStream(contexts.back().get(), request));
    if (i < 2) harness_.engine->WaitForRequests(i + 1);
  }
  v1::GenerateStreamResponse response;
  EXPECT_FALSE(readers[2]->Read(&response));
  EXPECT_EQ(readers[2]->Finish().error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  for (int i = 0; i < 2; ++i) {
    contexts[i]->TryCancel();
    harness_.engine->WaitForAborts(i + 1);
  }
  harness_.Step(1);
}

TEST(TenantStreamsTest, APlaceIsFreeWhenItsClientSeesTheEnd) {
  HarnessOptions options;
  std::string file = kAuthFile;
  file.replace(file.find("\"max_streams\": 2, \"tokens_per_minute\": 100"), 42, "\"max_streams\": 1");
  auto table = AuthTable::Parse(file);
  ASSERT_TRUE(table.ok()) << table.status();
  options.auth = *table;
  ServerHarness harness(options);
  harness.RunEngine();
  v1::GenerateRequest request;
  request.mutable_task()->mutable_token_ids()->add_ids(5);
  request.mutable_task()->mutable_stopping()->set_max_tokens(1);
  for (int i = 0; i < 300; ++i) {
    grpc::ClientContext context;
    context.AddMetadata("authorization", std::string("Bearer ") + kUserToken);
    v1::GenerateResponse response;
    const grpc::Status status = harness.generation->Generate(&context, request, &response);
    ASSERT_TRUE(status.ok()) << "call " << i << ": " << status.error_message();
  }
}

TEST(AuditTest, ACallLeavesOneLineWithoutWhatWasSaid) {
  const std::string path = ::testing::TempDir() + "/calls.log";
  std::filesystem::remove(path);
  {
    auto audit = AuditLog::Open({path});
    ASSERT_TRUE(audit.ok());
    HarnessOptions options;
    options.auth = MakeTable();
    options.audit = audit->get();
    ServerHarness harness(options);
    harness.RunEngine();
    grpc::ClientContext context;
    context.AddMetadata("authorization", std::string("Bearer ") + kUserToken);
    context.AddMetadata("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    v1::GenerateRequest request;
    request.mutable_task()->set_text("canary prompt 7719");
    request.mutable_task()->set_request_id("mine");
    request.mutable_task()->mutable_stopping()->set_max_tokens(4);
    v1::GenerateResponse response;
    ASSERT_TRUE(harness.generation->Generate(&context, request, &response).ok());
    const auto& trailers = context.GetServerTrailingMetadata();
    EXPECT_NE(trailers.find("traceparent"), trailers.end()) << "returned to the caller";
    CallRaw(harness.Connect(), "/minitron.v1.AdminService/Drain", "Bearer canary-token-31");
  }
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  EXPECT_THAT(text.str(),
              HasSubstr(R"("event":"call","method":"Generate","status":"OK","tenant":"alice","token_id":"u")"));
  EXPECT_THAT(text.str(), HasSubstr(R"("request_id":"mine")"));
  EXPECT_THAT(text.str(), HasSubstr("4bf92f3577b34da6a3ce929d0e0e4736"));
  EXPECT_THAT(text.str(), HasSubstr(R"("completion_tokens":"4")"));
  EXPECT_THAT(text.str(), HasSubstr(R"("method":"Drain","status":"UNAUTHENTICATED")"));
  for (const char* secret : {"canary prompt", "quick", "canary-token", kUserToken}) {
    EXPECT_THAT(text.str(), Not(HasSubstr(secret)));
  }
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace minitron::server
