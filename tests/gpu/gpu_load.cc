// minitron-gpu-load: streaming calls over gRPC against one address, and what their clients see. Prints one JSON object.
//   closed ADDRESS CLIENTS PROMPT OUTPUT REQUESTS    each client sends its next request when its last has ended
//   steady ADDRESS CLIENTS PROMPT OUTPUT SECONDS     the same without end, begun as it would be after a long time: each
//                                                    client's first request is somewhere on its way already (so much
//                                                    more prompt, so much less output). Counted are SECONDS that begin
//                                                    when every client has had its first token
//   poisson ADDRESS RATE PROMPT OUTPUT SECONDS       requests arrive by themselves, RATE per second, for SECONDS; times
//                                                    count from when a request was due
// minitron-bench can do far more, but links libcurl, whose libraries are 11 MB that the bundle has no room for.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
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
  std::string mode, address;
  double load = 0.0;  // clients, or requests per second
  int prompt = 0, output = 0;
  double extent = 0.0;  // requests, or seconds
};

double Milliseconds(Clock::duration duration) { return std::chrono::duration<double, std::milli>(duration).count(); }

// What all clients saw, in milliseconds. Thread-safe.
class Figures {
 public:
  void Add(const std::vector<double>& first, const std::vector<double>& between, int64_t tokens, bool failed) {
    const std::lock_guard lock(mutex_);
    first_token_.insert(first_token_.end(), first.begin(), first.end());
    between_.insert(between_.end(), between.begin(), between.end());
    tokens_ += tokens;
    failed_ += failed ? 1 : 0;
    ++requests_;
  }
  // Returns the exit code: a request that failed fails the run.
  int Print(const Options& options, double seconds) {
    const bool poisson = options.mode == "poisson";
    std::printf(
        "{\"kind\": \"load\", \"mode\": \"%s\", \"%s\": %g, \"prompt\": %d, \"output\": %d, \"requests\": %d, "
        "\"failed\": %d, \"seconds\": %.3f, \"tokens_per_s\": %.1f, \"ttft_p50_ms\": %.2f, \"ttft_p99_ms\": %.2f, "
        "\"itl_p50_ms\": %.3f, \"itl_p99_ms\": %.3f}\n",
        options.mode.c_str(), poisson ? "rate" : "clients", options.load, options.prompt, options.output, requests_,
        failed_, seconds, static_cast<double>(tokens_) / seconds, Percentile(first_token_, 0.5),
        Percentile(first_token_, 0.99), Percentile(between_, 0.5), Percentile(between_, 0.99));
    return failed_ == 0 && tokens_ > 0 ? 0 : 1;
  }

 private:
  static double Percentile(std::vector<double>& values, double share) {
    if (values.empty()) return 0.0;
    const auto at = values.begin() + static_cast<int64_t>(share * static_cast<double>(values.size() - 1));
    std::nth_element(values.begin(), at, values.end());
    return *at;
  }

  std::mutex mutex_;
  std::vector<double> first_token_, between_;
  int64_t tokens_ = 0;
  int requests_ = 0, failed_ = 0;
};

// A number in [0, 2^32) for each pair: prompts, phases and arrivals are the same in every run.
uint32_t Hash(uint32_t a, uint32_t b) {
  uint64_t z = (uint64_t{a} << 32 | b) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>(z >> 32);
}
double Share(uint32_t a, uint32_t b) { return (Hash(a, b) + 0.5) * 0x1.0p-32; }

v1::GenerateStreamRequest MakeRequest(int number, int prompt, int output) {
  v1::GenerateStreamRequest request;
  auto& task = *request.mutable_task();
  for (int i = 0; i < prompt; ++i) {  // no two prompts share a prefix: the cache must not answer
    task.mutable_token_ids()->add_ids(10 + Hash(static_cast<uint32_t>(number), static_cast<uint32_t>(i)) % 1000);
  }
  task.mutable_sampling()->set_temperature(0.0f);
  task.mutable_stopping()->set_max_tokens(static_cast<uint32_t>(output));
  task.mutable_stopping()->set_ignore_eos(true);
  task.mutable_output()->set_token_ids(true);
  return request;
}

// The time that counts: all of it, or, with clients that have to begin first, from then on.
struct Window {
  static constexpr Clock::rep kNever = Clock::duration::max().count();
  explicit Window(int clients) : waiting(clients), from(clients > 0 ? kNever : 0) {}

  std::atomic<int> waiting;  // clients without their first token
  std::atomic<Clock::rep> from, until{kNever};
  bool Holds(Clock::time_point time) const {
    const Clock::rep at = time.time_since_epoch().count();
    return at >= from && at < until;
  }
  bool IsOver() const { return Clock::now().time_since_epoch().count() >= until; }
};

// One request, whose times count from `begin`. A run with a window ends the request with it.
void RunRequest(client::Client& client, const Options& options, const v1::GenerateStreamRequest& request,
                Clock::time_point begin, Window& window, bool first, Figures& figures) {
  std::vector<double> first_token, between;
  int64_t tokens = 0, counted = 0;
  bool was_waiting = first;
  Clock::time_point last = begin;
  const auto outcome = client.GenerateStream(request, [&](const auto& event) {
    if (!event.has_delta() || event.delta().token_ids_size() == 0) return true;
    const Clock::time_point now = Clock::now();
    if (was_waiting && --window.waiting == 0) {
      window.until = (now + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(options.extent)))
                         .time_since_epoch()
                         .count();
      window.from = now.time_since_epoch().count();
    }
    was_waiting = false;
    if (window.Holds(now)) {
      (tokens == 0 ? first_token : between).push_back(Milliseconds(now - last));
      counted += event.delta().token_ids_size();
    }
    tokens += event.delta().token_ids_size();
    last = now;
    return !window.IsOver();
  });
  const bool cut = window.IsOver();
  const bool complete = !outcome.has_value() && tokens == request.task().stopping().max_tokens();
  figures.Add(first_token, between, counted, !complete && !cut);
  if (was_waiting) window.until = 0;  // it never had a token: the window would not begin
}

int RunClosed(const Options& options, Figures& figures) {
  const bool steady = options.mode == "steady";
  const auto clients = static_cast<int>(options.load);
  Window window(steady ? clients : 0);
  std::atomic<int> next{0};
  std::vector<std::thread> threads;
  threads.reserve(clients);
  const Clock::time_point begin = Clock::now();
  for (int c = 0; c < clients; ++c) {
    threads.emplace_back([&] {
      client::Client client(client::ClientOptions{.target = options.address, .timeout = {}, .metadata = {}});
      for (int number = next++; steady ? !window.IsOver() : number < options.extent; number = next++) {
        const bool first = steady && number < clients;
        const int gone = first ? static_cast<int>(Share(static_cast<uint32_t>(number), 1u << 31) * options.output) : 0;
        const auto request = MakeRequest(number, options.prompt + gone, options.output - gone);
        RunRequest(client, options, request, Clock::now(), window, first, figures);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return figures.Print(options, steady ? options.extent : Milliseconds(Clock::now() - begin) / 1e3);
}

// Each request has a thread, so that one that waits keeps none from arriving.
int RunPoisson(const Options& options, Figures& figures) {
  Window window(0);
  client::Client client(client::ClientOptions{.target = options.address, .timeout = {}, .metadata = {}});
  std::vector<std::thread> threads;
  std::mutex mutex;
  std::condition_variable never;
  std::unique_lock lock(mutex);
  const Clock::time_point begin = Clock::now();
  double due_s = 0.0;
  for (int number = 0;; ++number) {
    due_s -= std::log(Share(static_cast<uint32_t>(number), 1u << 30)) / options.load;
    if (due_s >= options.extent) break;
    const auto due = begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(due_s));
    while (never.wait_until(lock, due) != std::cv_status::timeout) {
    }
    threads.emplace_back([&, number, due] {
      RunRequest(client, options, MakeRequest(number, options.prompt, options.output), due, window, false, figures);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return figures.Print(options, Milliseconds(Clock::now() - begin) / 1e3);
}

int Main(const Options& options) {
  Figures figures;
  return options.mode == "poisson" ? RunPoisson(options, figures) : RunClosed(options, figures);
}

}  // namespace
}  // namespace minitron::gpu

int main(int argc, char** argv) {
  minitron::gpu::Options options;
  const auto number = [argv](int i, double most) { return std::clamp(std::atof(argv[i]), 0.0, most); };
  if (argc == 7) {
    options = {argv[1],
               argv[2],
               number(3, 1024),
               static_cast<int>(number(4, 65536)),
               static_cast<int>(number(5, 65536)),
               number(6, 65536)};
  }
  const bool known = options.mode == "closed" || options.mode == "steady" || options.mode == "poisson";
  if (!known || options.load <= 0 || options.prompt == 0 || options.output == 0 || options.extent <= 0) {
    std::fprintf(stderr,
                 "usage: minitron-gpu-load closed ADDRESS CLIENTS PROMPT_TOKENS OUTPUT_TOKENS REQUESTS\n"
                 "       minitron-gpu-load steady ADDRESS CLIENTS PROMPT_TOKENS OUTPUT_TOKENS SECONDS\n"
                 "       minitron-gpu-load poisson ADDRESS RATE PROMPT_TOKENS OUTPUT_TOKENS SECONDS\n");
    return 2;
  }
  return minitron::gpu::Main(options);
}
