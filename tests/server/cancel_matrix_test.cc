// Every way a call can end early, in every phase it can be in: not one token is computed after the step that was
// running, its blocks are back with the end of that step, and nothing is left. The phases are exact: the fake runner
// holds the step in which the call is where it should be, until the server has heard of the end.
#include <arpa/inet.h>
#include <fcntl.h>
#include <grpcpp/create_channel_posix.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <future>
#include <sstream>

#include "engine/base/check.h"
#include "server/grpc_status.h"
#include "tests/server/serving_harness.h"
#include "tests/server/wire.h"

namespace minitron::server {
namespace {

enum class Phase { kQueued, kPrefill, kFirstToken, kMiddle, kLastToken, kFinished };
// A client's cancel is an RST_STREAM frame. A TCP reset comes without a word, a TCP drop as an end of the stream of
// bytes.
enum class Way { kCancel, kDeadline, kTcpReset, kTcpDrop, kServerStop };

constexpr const char* kPhaseNames[] = {"Queued", "Prefill", "FirstToken", "Middle", "LastToken", "Finished"};
constexpr const char* kWayNames[] = {"Cancel", "Deadline", "TcpReset", "TcpDrop", "ServerStop"};
constexpr grpc::StatusCode kCodes[] = {grpc::StatusCode::CANCELLED, grpc::StatusCode::DEADLINE_EXCEEDED,
                                       grpc::StatusCode::UNAVAILABLE, grpc::StatusCode::UNAVAILABLE,
                                       grpc::StatusCode::UNAVAILABLE};
constexpr int kPromptTokens = 40;
constexpr int kChunk = 16;  // three steps of prefill
constexpr int kMaxTokens = 12;
constexpr int kBlocks = 64;
constexpr int kBlockSize = 8;

struct Case {
  Phase phase;
  Way way;
};

// Which token is computed by the step that is held; 0: a step before the first.
int HeldToken(Phase phase) {
  switch (phase) {
    case Phase::kFirstToken:
      return 1;
    case Phase::kMiddle:
      return kMaxTokens / 2;
    case Phase::kLastToken:
      return kMaxTokens;
    default:
      return 0;
  }
}

int ConnectTcp(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  CHECK(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
  CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
  return fd;
}

// Sends RST, whoever else has a descriptor of the socket.
void ResetTcp(int fd) {
  sockaddr nowhere{};
  nowhere.sa_family = AF_UNSPEC;
  connect(fd, &nowhere, sizeof(nowhere));
}

v1::GenerateStreamRequest Request(int max_tokens = kMaxTokens) {
  v1::GenerateStreamRequest request;
  for (int i = 0; i < kPromptTokens; ++i) request.mutable_task()->mutable_token_ids()->add_ids(5 + i);
  request.mutable_task()->mutable_stopping()->set_max_tokens(static_cast<uint32_t>(max_tokens));
  request.mutable_task()->mutable_stopping()->set_ignore_eos(true);
  return request;
}

// One server with one call in it; when that is to be queued, behind another that occupies the only place.
class Stage {
 public:
  explicit Stage(const Case& which) : which_(which) {
    ServingSetup setup;
    setup.server.max_prefill_chunk = kChunk;
    setup.server.drain_timeout_s = 0;
    setup.runner.max_num_sequences = 1;
    setup.runner.num_kv_blocks = kBlocks;
    setup.runner.block_size = kBlockSize;
    setup.runner.choose_token = [this](engine::TokenId, int) {
      if (++num_computed_ == HeldToken(which_.phase)) runner_.load()->Hold();
      return engine::TokenId{100};
    };
    harness_ = std::make_unique<ServingHarness>(setup);
    runner_ = &harness_->runner;
    fd_ = ConnectTcp(harness_->serving->port());
    // gRPC closes the descriptor it gets.
    stub_ = v1::GenerationService::NewStub(grpc::CreateInsecureChannelFromFd("test", dup(fd_)));
  }
  ~Stage() {
    context_.TryCancel();
    harness_->runner.Release();
    if (drained_.valid()) drained_.wait();
    if (occupant_ != nullptr) EndOccupant();
    close(fd_);
  }

  // Starts the call and waits until it is in its phase. False when its deadline was faster.
  bool Begin(std::chrono::milliseconds deadline) {
    if (which_.phase == Phase::kQueued) {
      harness_->runner.Hold();
      occupant_ = harness_->generation->GenerateStream(&occupant_context_, Request());
      harness_->runner.WaitUntilHeld();
    }
    if (which_.phase == Phase::kPrefill) harness_->runner.Hold();  // its first step is the prompt's first chunk
    deadline_ = std::chrono::system_clock::now() + deadline;
    if (which_.way == Way::kDeadline) context_.set_deadline(deadline_);
    reader_ = stub_->GenerateStream(&context_, Request());
    drained_ = std::async(std::launch::async, [this] {
      v1::GenerateStreamResponse response;
      while (reader_->Read(&response)) finished_ = finished_ || response.has_finished();
      status_ = reader_->Finish();
    });
    while (drained_.wait_for(std::chrono::seconds(0)) != std::future_status::ready) {
      if (IsInPhase()) return true;
    }
    return which_.phase == Phase::kFinished && finished_;
  }

  // Ends the call and lets the step go on once the server knows.
  void End() {
    const int computed = num_computed_;
    const int64_t steps = harness_->runner.num_steps();
    if (which_.way == Way::kCancel) context_.TryCancel();
    if (which_.way == Way::kTcpReset) ResetTcp(fd_);
    if (which_.way == Way::kTcpDrop) shutdown(fd_, SHUT_RDWR);
    if (which_.way == Way::kServerStop) harness_->lifecycle.RequestDrain();
    if (which_.way == Way::kDeadline) {
      harness_->WaitForLoad([this](const auto&) { return std::chrono::system_clock::now() > deadline_; });
    }
    drained_.wait();
    // A call leaves after it has asked the engine for its end. The held step knows nothing of it.
    if (occupant_ != nullptr && which_.way != Way::kServerStop) {
      WaitForStreams(1);
      EndOccupant();
    }
    WaitForStreams(0);
    harness_->runner.Release();
    if (which_.way == Way::kServerStop) {
      EXPECT_EQ(harness_->WaitForExit(), kExitOk);
    } else {
      harness_->WaitUntilIdle();
    }
    const int held = which_.phase == Phase::kFinished ? 0 : 1;
    EXPECT_EQ(harness_->runner.num_steps() - steps, held) << "the step that was running is the last one";
    EXPECT_EQ(num_computed_, computed);
  }

  // A request that needs every block there is.
  void ExpectThatEveryBlockIsFree() {
    grpc::ClientContext context;
    StreamResult result;
    const auto reader = harness_->generation->GenerateStream(&context, Request(kBlocks * kBlockSize - kPromptTokens));
    ReadToEnd(*reader, context, result);
    EXPECT_TRUE(result.status.ok()) << result.status.error_message();
    EXPECT_EQ(Sum("minitron_preemptions_total"), 0);
    harness_->WaitUntilIdle();
  }

  // The sum of the series of this name; fails when there is none.
  double Sum(const std::string& name) const {
    double sum = 0;
    int count = 0;
    std::istringstream lines(harness_->MetricsText());
    for (std::string line; std::getline(lines, line);) {
      if (line.rfind(name + "{", 0) != 0) continue;
      sum += std::stod(line.substr(line.rfind(' ')));
      ++count;
    }
    EXPECT_GT(count, 0) << name;
    return sum;
  }
  const grpc::Status& status() const { return status_; }
  bool finished() const { return finished_; }

 private:
  bool IsInPhase() const {
    if (which_.phase == Phase::kQueued) return harness_->Load().waiting_sequences() == 1;
    return which_.phase != Phase::kFinished && harness_->runner.IsHeld();
  }
  void WaitForStreams(int count) const {
    harness_->WaitForMetric("minitron_grpc_streams_active{model_name=\"fake\"} " + std::to_string(count));
  }
  void EndOccupant() {
    occupant_context_.TryCancel();
    v1::GenerateStreamResponse response;
    while (occupant_->Read(&response)) {
    }
    occupant_->Finish();
    occupant_.reset();
  }

  const Case which_;
  std::atomic<int> num_computed_ = 0;                        // tokens
  std::atomic<testing::FakeModelRunner*> runner_ = nullptr;  // the harness's, for the engine thread
  std::unique_ptr<ServingHarness> harness_;
  int fd_ = -1;
  std::unique_ptr<v1::GenerationService::Stub> stub_;
  grpc::ClientContext occupant_context_;
  std::unique_ptr<grpc::ClientReader<v1::GenerateStreamResponse>> occupant_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<v1::GenerateStreamResponse>> reader_;
  std::chrono::system_clock::time_point deadline_;
  std::future<void> drained_;  // guards the two below
  bool finished_ = false;
  grpc::Status status_;
};

class CancelMatrixTest : public ::testing::TestWithParam<Case> {};

TEST_P(CancelMatrixTest, NoStepIsComputedForItAndEveryBlockIsBack) {
  const Case& which = GetParam();
  auto stage = std::make_unique<Stage>(which);
  for (std::chrono::milliseconds deadline(100); !stage->Begin(deadline); deadline *= 4) {
    stage.reset();
    stage = std::make_unique<Stage>(which);
  }
  stage->End();
  const bool after_the_end = which.phase == Phase::kFinished;
  const grpc::StatusCode code = after_the_end ? grpc::StatusCode::OK : kCodes[static_cast<int>(which.way)];
  EXPECT_EQ(stage->status().error_code(), code) << stage->status().error_message();
  EXPECT_EQ(stage->finished(), after_the_end) << "only a whole stream looks whole";
  if (which.way == Way::kServerStop) {  // its blocks end with the process
    EXPECT_EQ(InfoOf(stage->status()).reason(), after_the_end ? "" : reason::kDraining);
    return;
  }
  for (const char* gauge :
       {"minitron_kv_cache_blocks_used", "minitron_requests_running", "minitron_requests_waiting"}) {
    EXPECT_EQ(stage->Sum(gauge), 0) << gauge;
  }
  stage->ExpectThatEveryBlockIsFree();
}

std::vector<Case> AllCases() {
  std::vector<Case> cases;
  for (int phase = 0; phase <= static_cast<int>(Phase::kFinished); ++phase) {
    for (int way = 0; way <= static_cast<int>(Way::kServerStop); ++way) {
      cases.push_back({static_cast<Phase>(phase), static_cast<Way>(way)});
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, CancelMatrixTest, ::testing::ValuesIn(AllCases()), [](const auto& one) {
  return std::string(kPhaseNames[static_cast<int>(one.param.phase)]) + kWayNames[static_cast<int>(one.param.way)];
});

}  // namespace
}  // namespace minitron::server
