// What streaming costs beside the model: our whole server over a runner whose steps cost nothing, against a bare
// callback server that writes ready-made messages of one token. Same client, same two cores, alternating in one run.
// Then both at a model's pace, where there is nothing to put together: one message per token and stream.
//
// Usage: minitron-bench-streaming [SECONDS_PER_POINT]     prints tables in Markdown
// The server is a child process of its own, so that the two ends share nothing but the loopback and the processors.
#include <fcntl.h>
#include <grpcpp/alarm.h>
#include <grpcpp/grpcpp.h>
#include <minitron/v1/generation.grpc.pb.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/base/check.h"
#include "server/serving.h"
#include "tests/bench/null_runner.h"

extern char** environ;

namespace minitron::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kTokensPerStream = 512;
constexpr int kChannels = 4;
constexpr std::chrono::milliseconds kPace{20};

double CpuSeconds(int who) {
  rusage usage{};
  CHECK(getrusage(who, &usage) == 0);
  const auto seconds = [](const timeval& time) { return static_cast<double>(time.tv_sec) + time.tv_usec * 1e-6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// --- The servers; each prints its port and serves until standard input ends. ---

// Writes the same message of one token as often as the request asks for tokens, one per `pace` where that is not 0.
class RawCall final : public grpc::ServerWriteReactor<v1::GenerateStreamResponse> {
 public:
  RawCall(int num_messages, std::chrono::milliseconds pace)
      : num_left_(num_messages), pace_(pace), next_(std::chrono::system_clock::now()) {
    message_.mutable_delta()->set_text(" quick");
    message_.mutable_delta()->add_token_ids(1234);
    StartWrite(&message_);
  }
  void OnWriteDone(bool ok) override {
    if (!ok || --num_left_ == 0) return Finish(grpc::Status::OK);
    if (pace_.count() == 0) return StartWrite(&message_);
    next_ += pace_;
    alarm_.Set(next_, [this](bool) { StartWrite(&message_); });
  }
  void OnDone() override { delete this; }

 private:
  int num_left_;
  const std::chrono::milliseconds pace_;
  std::chrono::system_clock::time_point next_;
  grpc::Alarm alarm_;
  v1::GenerateStreamResponse message_;
};

class RawService final : public v1::GenerationService::CallbackService {
 public:
  explicit RawService(std::chrono::milliseconds pace) : pace_(pace) {}

 private:
  grpc::ServerWriteReactor<v1::GenerateStreamResponse>* GenerateStream(
      grpc::CallbackServerContext*, const v1::GenerateStreamRequest* request) override {
    return new RawCall(static_cast<int>(request->task().stopping().max_tokens()), pace_);
  }

  const std::chrono::milliseconds pace_;
};

void ServeUntilInputEnds(int port) {
  std::printf("%d\n", port);
  std::fflush(stdout);
  char ignored = 0;
  while (read(STDIN_FILENO, &ignored, 1) > 0) {
  }
}

void ServeRaw(std::chrono::milliseconds pace) {
  RawService service(pace);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const auto server = builder.BuildAndStart();
  ServeUntilInputEnds(port);
  server->Shutdown();
}

void ServeOurs(std::chrono::milliseconds step) {
  server::BlockSignals();
  auto tokenizer = server::Tokenizer::Load(MINITRON_SOURCE_DIR "/deploy/models/minitron-tiny", 2048);
  CHECK(tokenizer.ok());
  NullRunner runner((*tokenizer)->Encode("the quick brown fox jumps over the lazy dog", {}), step);
  server::ServerOptions options;
  options.host = "127.0.0.1";
  options.port = 0;
  options.max_queued_requests = 4096;
  server::Lifecycle lifecycle;
  auto serving = server::Serving::Start(options, {"null", &runner, tokenizer->get(), {}}, &lifecycle);
  CHECK(serving.ok());
  ServeUntilInputEnds((*serving)->port());
}

// A child process that serves.
class Server {
 public:
  explicit Server(const char* kind) {
    int in[2];
    int out[2];
    CHECK(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
    std::string program = "/proc/self/exe";
    std::string flag = std::string("--serve=") + kind;
    char* argv[] = {program.data(), flag.data(), nullptr};
    CHECK(posix_spawn(&pid_, program.c_str(), &actions, nullptr, argv, environ) == 0);
    posix_spawn_file_actions_destroy(&actions);
    close(in[0]);
    close(out[1]);
    stop_fd_ = in[1];
    std::string line;
    for (char c = 0; read(out[0], &c, 1) == 1 && c != '\n';) line.push_back(c);
    close(out[0]);
    port_ = std::atoi(line.c_str());
    CHECK(port_ > 0);
  }
  // Ends it; its processor time is the caller's children's from then on.
  ~Server() {
    close(stop_fd_);
    CHECK(waitpid(pid_, nullptr, 0) == pid_);
  }
  int port() const { return port_; }

 private:
  pid_t pid_ = 0;
  int stop_fd_ = -1;
  int port_ = 0;
};

// --- The client ---

// Shared with the readers: the last of them is still in it when the one who waits goes on.
struct Counters {
  std::atomic<int64_t> tokens{0};
  std::atomic<int64_t> messages{0};
  std::atomic<int> num_open{0};
  std::promise<void> all_done;
};

// One stream after the other until `end`.
class Reader final : public grpc::ClientReadReactor<v1::GenerateStreamResponse> {
 public:
  Reader(v1::GenerationService::Stub* stub, const v1::GenerateStreamRequest* request,
         std::shared_ptr<Counters> counters, Clock::time_point end)
      : stub_(stub), request_(request), counters_(std::move(counters)), end_(end) {
    stub_->async()->GenerateStream(&context_, request_, this);
    StartRead(&message_);
    StartCall();
  }
  void OnReadDone(bool ok) override {
    if (!ok) return;
    counters_->tokens.fetch_add(message_.delta().token_ids_size(), std::memory_order_relaxed);
    counters_->messages.fetch_add(1, std::memory_order_relaxed);
    StartRead(&message_);
  }
  // The last reference to a channel must not go on this thread, which gRPC would then wait for: first this object goes,
  // then the one who waits is told.
  void OnDone(const grpc::Status& status) override {
    CHECK(status.ok());
    const std::shared_ptr<Counters> counters = counters_;
    const bool again = Clock::now() < end_;
    if (again) new Reader(stub_, request_, counters, end_);
    delete this;
    if (!again && counters->num_open.fetch_sub(1) == 1) counters->all_done.set_value();
  }

 private:
  v1::GenerationService::Stub* stub_;         // owned by Measure
  const v1::GenerateStreamRequest* request_;  // likewise
  const std::shared_ptr<Counters> counters_;
  const Clock::time_point end_;
  grpc::ClientContext context_;
  v1::GenerateStreamResponse message_;
};

struct Figures {
  double tokens_per_s = 0;
  double cpu_us_per_token = 0;  // both ends
  double tokens_per_message = 0;
};

Figures Measure(const char* kind, int num_streams, double seconds) {
  const double own_before = CpuSeconds(RUSAGE_SELF);
  const double children_before = CpuSeconds(RUSAGE_CHILDREN);
  const auto counters = std::make_shared<Counters>();
  double elapsed = 0;
  {
    const Server server(kind);
    std::vector<std::unique_ptr<v1::GenerationService::Stub>> stubs;
    for (int i = 0; i < std::min(kChannels, num_streams); ++i) {
      grpc::ChannelArguments arguments;
      arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
      stubs.push_back(v1::GenerationService::NewStub(grpc::CreateCustomChannel(
          "127.0.0.1:" + std::to_string(server.port()), grpc::InsecureChannelCredentials(), arguments)));
    }
    v1::GenerateStreamRequest request;
    for (int i = 0; i < 16; ++i) request.mutable_task()->mutable_token_ids()->add_ids(300 + i);
    request.mutable_task()->mutable_stopping()->set_max_tokens(kTokensPerStream);
    counters->num_open = num_streams;
    const auto start = Clock::now();
    const auto end = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    for (int i = 0; i < num_streams; ++i) new Reader(stubs[i % stubs.size()].get(), &request, counters, end);
    counters->all_done.get_future().wait();
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  }
  const double cpu = CpuSeconds(RUSAGE_SELF) - own_before + CpuSeconds(RUSAGE_CHILDREN) - children_before;
  const auto tokens = static_cast<double>(counters->tokens.load());
  return {tokens / elapsed, cpu / tokens * 1e6, tokens / static_cast<double>(counters->messages.load())};
}

struct Pair {
  Figures raw, ours;
};

// Medians by tokens/s of `num_runs` alternating measurements.
Pair Compare(const char* raw_kind, const char* our_kind, int num_streams, double seconds, int num_runs) {
  std::vector<Figures> raw, ours;
  for (int run = 0; run < num_runs; ++run) {
    raw.push_back(Measure(raw_kind, num_streams, seconds));
    ours.push_back(Measure(our_kind, num_streams, seconds));
  }
  const auto median = [](std::vector<Figures>& runs) {
    std::sort(runs.begin(), runs.end(),
              [](const Figures& a, const Figures& b) { return a.tokens_per_s < b.tokens_per_s; });
    return runs[runs.size() / 2];
  };
  return {median(raw), median(ours)};
}

void PrintAsFastAsTheyCan(double seconds) {
  std::printf(
      "| streams | raw tokens/s | ours tokens/s | ours / raw | raw CPU us/token | ours CPU us/token | ours "
      "tokens/message |\n"
      "|---|---|---|---|---|---|---|\n");
  for (const int num_streams : {1, 64, 256, 1000}) {
    const auto [raw, ours] = Compare("raw", "ours", num_streams, seconds, 3);
    std::printf("| %d | %.0f | %.0f | %.0f %% | %.1f | %.1f | %.1f |\n", num_streams, raw.tokens_per_s,
                ours.tokens_per_s, 100 * ours.tokens_per_s / raw.tokens_per_s, raw.cpu_us_per_token,
                ours.cpu_us_per_token, ours.tokens_per_message);
    std::fflush(stdout);
  }
}

void PrintPaced(double seconds) {
  std::printf(
      "\n| streams, a token every %d ms each | raw, of the pace | ours, of the pace | raw CPU us/token | ours CPU "
      "us/token | ours tokens/message |\n|---|---|---|---|---|---|\n",
      static_cast<int>(kPace.count()));
  for (const int num_streams : {64, 256, 1000}) {
    const double pace_percent = 100 * kPace.count() / 1000.0 / num_streams;
    const auto [raw, ours] = Compare("raw-paced", "ours-paced", num_streams, std::max(seconds, 0.5), 1);
    std::printf("| %d | %.0f %% | %.0f %% | %.1f | %.1f | %.2f |\n", num_streams, raw.tokens_per_s * pace_percent,
                ours.tokens_per_s * pace_percent, raw.cpu_us_per_token, ours.cpu_us_per_token, ours.tokens_per_message);
    std::fflush(stdout);
  }
}

int Main(int argc, char** argv) {
  const std::string argument = argc > 1 ? argv[1] : "1";
  if (argument == "--serve=raw") return ServeRaw({}), 0;
  if (argument == "--serve=raw-paced") return ServeRaw(kPace), 0;
  if (argument == "--serve=ours") return ServeOurs({}), 0;
  if (argument == "--serve=ours-paced") return ServeOurs(kPace), 0;
  const double seconds = std::atof(argument.c_str());
  CHECK(seconds > 0);
  PrintAsFastAsTheyCan(seconds);
  PrintPaced(seconds);
  return 0;
}

}  // namespace
}  // namespace minitron::bench

int main(int argc, char** argv) { return minitron::bench::Main(argc, argv); }
