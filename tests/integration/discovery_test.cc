// What a client finds out about a server that it does not know: health (Check and Watch) and reflection.
#include <gmock/gmock.h>
#include <google/protobuf/descriptor.pb.h>
#include <grpc/health/v1/health.grpc.pb.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>

#include "reflection.grpc.pb.h"
#include "tests/integration/server_process.h"

namespace minitron::integration {
namespace {

using grpc::health::v1::Health;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using grpc::reflection::v1alpha::ServerReflection;
using grpc::reflection::v1alpha::ServerReflectionRequest;
using grpc::reflection::v1alpha::ServerReflectionResponse;
using ::testing::IsSupersetOf;

std::shared_ptr<grpc::Channel> Connect(const ServerProcess& server) {
  return grpc::CreateChannel("127.0.0.1:" + std::to_string(server.grpc_port), grpc::InsecureChannelCredentials());
}

// One question to the reflection service.
grpc::Status Ask(const ServerProcess& server, const ServerReflectionRequest& request,
                 ServerReflectionResponse* response) {
  const auto stub = ServerReflection::NewStub(Connect(server));
  grpc::ClientContext context;
  const auto stream = stub->ServerReflectionInfo(&context);
  stream->Write(request);
  stream->WritesDone();
  stream->Read(response);
  return stream->Finish();
}

TEST(DiscoveryTest, AHealthWatchSeesTheServerComeAndGo) {
  ServerProcess server({"--drain-delay=3600"});
  ASSERT_TRUE(server.WaitUntilReady()) << server.StandardError();
  const auto stub = Health::NewStub(Connect(server));
  HealthCheckRequest request;
  HealthCheckResponse response;
  grpc::ClientContext check;
  ASSERT_TRUE(stub->Check(&check, request, &response).ok());
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVING);
  request.set_service("minitron.v1.GenerationService");
  grpc::ClientContext watch;
  const auto reader = stub->Watch(&watch, request);
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVING);
  server.Signal(SIGTERM);
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::NOT_SERVING);
  server.Signal(SIGTERM);
  server.Wait();
}

TEST(DiscoveryTest, AHealthWatchDoesNotHoldADrainUp) {
  ServerProcess server({});
  ASSERT_TRUE(server.WaitUntilReady()) << server.StandardError();
  const auto stub = Health::NewStub(Connect(server));
  grpc::ClientContext watch;
  const auto reader = stub->Watch(&watch, HealthCheckRequest());
  HealthCheckResponse response;
  ASSERT_TRUE(reader->Read(&response));
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
  EXPECT_THAT(server.StandardError(), ::testing::HasSubstr("drained complete=true seconds=0."));
}

TEST(DiscoveryTest, ReflectionDescribesEveryService) {
  ServerProcess server({});
  ASSERT_TRUE(server.WaitUntilReady()) << server.StandardError();
  ServerReflectionRequest request;
  ServerReflectionResponse response;
  request.set_list_services("*");
  const grpc::Status status = Ask(server, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  std::vector<std::string> names;
  for (const auto& service : response.list_services_response().service()) names.push_back(service.name());
  EXPECT_THAT(names, IsSupersetOf({"minitron.v1.GenerationService", "minitron.v1.ModelService",
                                   "minitron.v1.AdminService", "grpc.health.v1.Health"}));
  request.set_file_containing_symbol("minitron.v1.GenerationService");
  ASSERT_TRUE(Ask(server, request, &response).ok());
  std::vector<std::string> methods;
  for (const std::string& bytes : response.file_descriptor_response().file_descriptor_proto()) {
    google::protobuf::FileDescriptorProto file;
    ASSERT_TRUE(file.ParseFromString(bytes));
    for (const auto& service : file.service()) {
      for (const auto& method : service.method()) {
        methods.push_back(method.name() + (method.server_streaming() ? " streams" : ""));
      }
    }
  }
  EXPECT_THAT(methods, ::testing::ElementsAre("GenerateStream streams", "Generate", "Score", "Tokenize", "Detokenize"));
  request.set_file_containing_symbol("minitron.v1.Nothing");
  ASSERT_TRUE(Ask(server, request, &response).ok());
  EXPECT_EQ(response.error_response().error_code(), static_cast<int>(grpc::StatusCode::NOT_FOUND));
}

TEST(DiscoveryTest, ReflectionCanBeSwitchedOff) {
  ServerProcess server({"--no-reflection"});
  ASSERT_TRUE(server.WaitUntilReady()) << server.StandardError();
  ServerReflectionRequest request;
  ServerReflectionResponse response;
  request.set_list_services("*");
  EXPECT_EQ(Ask(server, request, &response).error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

}  // namespace
}  // namespace minitron::integration
