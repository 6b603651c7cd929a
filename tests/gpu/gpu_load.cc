// minitron-gpu-load ADDRESS CLIENTS PROMPT_TOKENS OUTPUT_TOKENS REQUESTS: a closed loop of streaming calls over gRPC.
// Each client sends its next request when its last has ended. Prints one JSON object. Bounded by its arguments.
// minitron-bench can do far more, but links libcurl, whose libraries are 11 MB that the bundle has no room for.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "clients/cpp/client.h"

namespace minitron::gpu {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  std::string address;
  int clients = 0, prompt = 0, output = 0, requests = 0;
};

// What all clients saw, in milliseconds.
struct Figures {
  std::vector<double> first_token, between;
  int64_t tokens = 0;
  int failed = 0;
};

double Percentile(std::vector<double>& values, double share) {
  if (values.empty()) return 0.0;
  const auto at = values.begin() + static_cast<int64_t>(share * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

v1::GenerateStreamRequest MakeRequest(const Options& options, int number) {
  v1::GenerateStreamRequest request;
  auto& task = *request.mutable_task();
  for (int i = 0; i < options.prompt; ++i) {  // no two prompts share a prefix: the cache must not answer
    task.mutable_token_ids()->add_ids(static_cast<uint32_t>(10 + (number * 7919 + i * 31 + i * number) % 1000));
  }
  task.mutable_sampling()->set_temperature(0.0f);
  task.mutable_stopping()->set_max_tokens(static_cast<uint32_t>(options.output));
  task.mutable_stopping()->set_ignore_eos(true);
  task.mutable_output()->set_token_ids(true);
  return request;
}

void RunClient(const Options& options, std::atomic<int>& next, Figures& figures, std::mutex& mutex) {
  client::ClientOptions client_options;
  client_options.target = options.address;
  client::Client client(client_options);
  for (int number = next++; number < options.requests; number = next++) {
    Figures own;
    const Clock::time_point begin = Clock::now();
    Clock::time_point last = begin;
    const auto outcome = client.GenerateStream(MakeRequest(options, number), [&](const auto& event) {
      if (!event.has_delta() || event.delta().token_ids_size() == 0) return true;
      const Clock::time_point now = Clock::now();
      const double ms = std::chrono::duration<double, std::milli>(now - last).count();
      (own.tokens == 0 ? own.first_token : own.between).push_back(ms);
      own.tokens += event.delta().token_ids_size();
      last = now;
      return true;
    });
    const std::lock_guard lock(mutex);
    figures.failed += outcome.has_value() || own.tokens != options.output ? 1 : 0;
    figures.tokens += own.tokens;
    figures.first_token.insert(figures.first_token.end(), own.first_token.begin(), own.first_token.end());
    figures.between.insert(figures.between.end(), own.between.begin(), own.between.end());
  }
}

int Main(const Options& options) {
  std::atomic<int> next{0};
  Figures figures;
  std::mutex mutex;
  const Clock::time_point begin = Clock::now();
  std::vector<std::thread> threads;
  threads.reserve(options.clients);
  for (int i = 0; i < options.clients; ++i) {
    threads.emplace_back([&] { RunClient(options, next, figures, mutex); });
  }
  for (std::thread& thread : threads) thread.join();
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  std::printf(
      "{\"kind\": \"load\", \"clients\": %d, \"prompt\": %d, \"output\": %d, \"requests\": %d, \"failed\": %d, "
      "\"seconds\": %.3f, \"tokens_per_s\": %.1f, \"ttft_p50_ms\": %.2f, \"ttft_p99_ms\": %.2f, \"itl_p50_ms\": %.3f, "
      "\"itl_p99_ms\": %.3f}\n",
      options.clients, options.prompt, options.output, options.requests, figures.failed, seconds,
      static_cast<double>(figures.tokens) / seconds, Percentile(figures.first_token, 0.5),
      Percentile(figures.first_token, 0.99), Percentile(figures.between, 0.5), Percentile(figures.between, 0.99));
  return figures.failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace minitron::gpu

int main(int argc, char** argv) {
  minitron::gpu::Options options;
  const auto number = [argv](int i, int most) { return std::clamp(std::atoi(argv[i]), 0, most); };
  if (argc == 6) options = {argv[1], number(2, 1024), number(3, 65536), number(4, 65536), number(5, 65536)};
  if (options.clients == 0 || options.prompt == 0 || options.output == 0 || options.requests == 0) {
    std::fprintf(stderr, "usage: minitron-gpu-load ADDRESS CLIENTS PROMPT_TOKENS OUTPUT_TOKENS REQUESTS\n");
    return 2;
  }
  return minitron::gpu::Main(options);
}
