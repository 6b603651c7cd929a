// The accept loop: limits per address and in all, storms of resets, lost descriptors, connections that say nothing.
#include "server/listener.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/server/raw_call.h"
#include "tests/server/server_harness.h"

namespace minitron::server {
namespace {

using ::testing::HasSubstr;

// A connected socket; closed with a reset.
class Client {
 public:
  explicit Client(int port) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  }
  Client(Client&& other) noexcept : fd_(std::exchange(other.fd_, -1)), connected_(other.connected_) {}
  ~Client() {
    const linger reset = {1, 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    if (fd_ >= 0) close(fd_);
  }
  // Reads until the other side closes or has said something; returns whether it closed. Waits at most 20 s.
  bool IsClosedBySomebody() {
    pollfd polled = {fd_, POLLIN, 0};
    char buffer[4096];
    return connected_ && poll(&polled, 1, 20'000) == 1 && read(fd_, buffer, sizeof(buffer)) <= 0;
  }
  bool HearsSettings() {
    pollfd polled = {fd_, POLLIN, 0};
    char buffer[9];
    return connected_ && poll(&polled, 1, 20'000) == 1 && read(fd_, buffer, sizeof(buffer)) == 9 && buffer[3] == 4;
  }

 private:
  int fd_;
  bool connected_;
};

HarnessOptions Limited(int max_connections, int per_address,
                       std::chrono::milliseconds handshake = std::chrono::seconds(10)) {
  HarnessOptions options;
  options.grpc.listener = {max_connections, per_address};
  options.grpc.handshake_timeout = handshake;
  return options;
}

bool Answers(ServerHarness& harness) {
  return CallRaw(harness.Connect(), "/grpc.health.v1.Health/Check", "").status.ok();
}

TEST(ListenerTest, ConnectionsBeyondTheLimitOfAnAddressAreClosedAndCounted) {
  ServerHarness harness(Limited(0, 3));
  std::vector<Client> clients;
  for (int i = 0; i < 3; ++i) {
    clients.emplace_back(harness.server->port());
    EXPECT_TRUE(clients.back().HearsSettings());
  }
  EXPECT_TRUE(Client(harness.server->port()).IsClosedBySomebody());
  EXPECT_THAT(harness.MetricsText(),
              HasSubstr(R"(connections_refused_total{model_name="tiny",reason="address_limit"} 1)"));
  clients.clear();
  while (!Answers(harness)) {  // the places are free once the server has noticed the ends
  }
}

TEST(ListenerTest, ConnectionsBeyondTheTotalAreClosedAndCounted) {
  ServerHarness harness(Limited(2, 0));
  Client first(harness.server->port());
  Client second(harness.server->port());
  EXPECT_TRUE(first.HearsSettings() && second.HearsSettings());
  EXPECT_TRUE(Client(harness.server->port()).IsClosedBySomebody());
  EXPECT_THAT(harness.MetricsText(), HasSubstr(R"(reason="total_limit"} 1)"));
}

TEST(ListenerTest, AcceptsAfterTenThousandConnectionsThatWereReset) {
  ServerHarness harness;
  for (int i = 0; i < 10'000; ++i) Client ends_at_once(harness.server->port());
  EXPECT_TRUE(Answers(harness));
}

TEST(ListenerTest, AcceptsAgainOnceDescriptorsAreBack) {
  ServerHarness harness;
  ASSERT_TRUE(Answers(harness));
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  const int lowest_free = open("/dev/null", O_RDONLY | O_CLOEXEC);
  close(lowest_free);
  Client waiting(harness.server->port());  // in the backlog, or accepted, before none are left
  const rlimit none = {static_cast<rlim_t>(lowest_free), before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  // The test's own sockets need descriptors too, so the storm comes from another process.
  const pid_t child = fork();
  if (child == 0) {
    setrlimit(RLIMIT_NOFILE, &before);
    for (int i = 0; i < 200; ++i) Client refused(harness.server->port());
    _exit(0);
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_TRUE(Answers(harness));
}

TEST(ListenerTest, AConnectionThatNeverSpeaksIsClosed) {
  ServerHarness harness(Limited(0, 0, std::chrono::milliseconds(200)));
  Client silent(harness.server->port());
  ASSERT_TRUE(silent.HearsSettings());
  while (!silent.IsClosedBySomebody()) {
    ASSERT_TRUE(true);
  }
}

TEST(ListenerTest, TheHealthPortAnswersHealthAlone) {
  HarnessOptions options;
  options.grpc.health_port = 0;
  ServerHarness harness(options);
  ASSERT_GT(harness.server->health_port(), 0);
  const auto channel = grpc::CreateChannel("127.0.0.1:" + std::to_string(harness.server->health_port()),
                                           grpc::InsecureChannelCredentials());
  EXPECT_TRUE(CallRaw(channel, "/grpc.health.v1.Health/Check", "").status.ok());
  for (const char* method : {"/minitron.v1.ModelService/ListModels", "/minitron.v1.AdminService/Drain",
                             "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/nobody.Knows/It"}) {
    EXPECT_EQ(CallRaw(channel, method, "").status.error_code(), grpc::StatusCode::PERMISSION_DENIED) << method;
  }
  EXPECT_EQ(harness.num_drain_requests, 0);
}

}  // namespace
}  // namespace minitron::server
