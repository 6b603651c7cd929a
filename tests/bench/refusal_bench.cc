// How long a full server takes to refuse, in real time and through gRPC.
//
// Usage: minitron-bench-refusals [CALLS_PER_RUN]     prints a table in Markdown
// The real server with the shipped model as a process of its own: one sequence runs, which keeps a core busy, and the
// queue is never empty. The clients, each with a connection of its own, ask for more sequences than the queue has
// places, each call as soon as the one before is answered: far more than there is. All of it shares the same cores.
#include <grpcpp/grpcpp.h>
#include <minitron/v1/generation.grpc.pb.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "engine/base/check.h"
#include "tests/integration/server_process.h"

namespace minitron::bench {
namespace {

using Clock = std::chrono::steady_clock;
using Stub = v1::GenerationService::Stub;

constexpr int kQueue = 8;
constexpr int kRuns = 5;

std::unique_ptr<Stub> Connect(int port) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return v1::GenerationService::NewStub(
      grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(port), grpc::InsecureChannelCredentials(), arguments));
}

v1::GenerateStreamRequest MakeRequest(int num_sequences) {
  v1::GenerateStreamRequest request;
  std::string text;
  for (int i = 0; i < 20; ++i) text += "To be or not to be, that is the question. ";
  request.mutable_task()->set_text(text);
  request.mutable_task()->mutable_stopping()->set_ignore_eos(true);
  request.mutable_task()->mutable_stopping()->set_max_tokens(256);
  request.mutable_task()->mutable_sampling()->set_num_sequences(static_cast<uint32_t>(num_sequences));
  return request;
}

// The status of a call, read to its end or to the first message after `stop`.
grpc::Status Call(Stub& stub, const v1::GenerateStreamRequest& request, const std::atomic<bool>& stop) {
  grpc::ClientContext context;
  const auto reader = stub.GenerateStream(&context, request);
  v1::GenerateStreamResponse response;
  while (reader->Read(&response)) {
    if (stop) context.TryCancel();
  }
  return reader->Finish();
}

// One stream after the other. Together they are as many as the server has places, so none is refused, and whenever one
// ends the others still fill the queue but for one place.
void KeepFull(int port, const std::atomic<bool>& stop, std::atomic<int>& num_calls) {
  const auto stub = Connect(port);
  while (!stop) {
    ++num_calls;
    const grpc::Status status = Call(*stub, MakeRequest(1), stop);
    CHECK(status.ok() || stop);
  }
}

struct Run {
  double calls_per_s = 0;
  double p50_ms = 0, p99_ms = 0, worst_ms = 0;
};

double Quantile(const std::vector<double>& sorted, double share) {
  return sorted[std::min(sorted.size() - 1, static_cast<size_t>(share * static_cast<double>(sorted.size())))];
}

std::vector<double> CallOften(int port, int num_calls) {
  const auto stub = Connect(port);
  const v1::GenerateStreamRequest request = MakeRequest(kQueue);
  const std::atomic<bool> never = false;
  std::vector<double> times_ms;
  times_ms.reserve(num_calls);
  for (int i = 0; i <= num_calls; ++i) {
    const auto start = Clock::now();
    const grpc::Status status = Call(*stub, request, never);
    CHECK(status.error_code() == grpc::StatusCode::UNAVAILABLE &&
          status.error_message().rfind("queue full", 0) == 0);  // anything else is not what is measured
    // The first one connects.
    if (i > 0) times_ms.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  }
  return times_ms;
}

Run Measure(int port, int num_clients, int num_calls) {
  const auto start = Clock::now();
  std::vector<std::future<std::vector<double>>> clients;
  clients.reserve(num_clients);
  for (int i = 0; i < num_clients; ++i) {
    clients.push_back(std::async(std::launch::async, CallOften, port, num_calls / num_clients));
  }
  std::vector<double> times_ms;
  for (auto& client : clients) {
    const std::vector<double> own = client.get();
    times_ms.insert(times_ms.end(), own.begin(), own.end());
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  std::sort(times_ms.begin(), times_ms.end());
  return {static_cast<double>(times_ms.size()) / seconds, Quantile(times_ms, 0.5), Quantile(times_ms, 0.99),
          times_ms.back()};
}

double Median(const std::vector<Run>& runs, double Run::*figure) {
  std::vector<double> values;
  values.reserve(runs.size());
  for (const Run& run : runs) values.push_back(run.*figure);
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void PrintRow(int port, int num_clients, int num_calls) {
  std::vector<Run> runs;
  runs.reserve(kRuns);
  for (int i = 0; i < kRuns; ++i) runs.push_back(Measure(port, num_clients, num_calls));
  const auto less = [](const Run& a, const Run& b) { return a.p99_ms < b.p99_ms; };
  const auto [least, most] = std::minmax_element(runs.begin(), runs.end(), less);
  std::printf("| %d | %.0f | %.2f | %.2f | %.2f to %.2f | %.2f |\n", num_clients, Median(runs, &Run::calls_per_s),
              Median(runs, &Run::p50_ms), Median(runs, &Run::p99_ms), least->p99_ms, most->p99_ms,
              Median(runs, &Run::worst_ms));
  std::fflush(stdout);
}

int Main(int num_calls) {
  integration::ServerProcess server({"--max-num-sequences=1", "--max-queued-requests=" + std::to_string(kQueue)});
  CHECK(server.WaitUntilReady());
  std::atomic<bool> stop = false;
  std::atomic<int> num_filled = 0;
  std::vector<std::future<void>> fillers;
  fillers.reserve(kQueue);
  for (int i = 0; i < kQueue; ++i) {
    fillers.push_back(std::async(std::launch::async, [&] { KeepFull(server.grpc_port, stop, num_filled); }));
  }
  // Once the first stream has ended and begun again, the others are in the queue.
  while (num_filled <= kQueue) std::this_thread::yield();
  std::printf(
      "| clients | refusals/s | p50 to refuse, ms | p99, ms | p99 of single runs, ms | worst, ms "
      "|\n|---|---|---|---|---|---|\n");
  for (const int num_clients : {1, 2, 8, 16, 64}) PrintRow(server.grpc_port, num_clients, num_calls);
  stop = true;
  for (auto& filler : fillers) filler.get();
  return 0;
}

}  // namespace
}  // namespace minitron::bench

int main(int argc, char** argv) { return minitron::bench::Main(argc > 1 ? std::atoi(argv[1]) : 6400); }
