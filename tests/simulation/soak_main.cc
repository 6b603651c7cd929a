// minitron-soak-sim HOURS [FIRST_SEED]: the simulator for as long as told, one seed after another from FIRST_SEED
// (default: the time of day, so that each run sees other worlds). Prints a line a minute, each failing seed, and at the
// end which rare states occurred how often. Exit code 1 when a seed failed.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "tests/simulation/swarm.h"

namespace {

volatile uint64_t current_seed = 0;  // for the signal handler

void PrintSeedOnAbort(int) {
  char text[96];
  const int length = std::snprintf(text, sizeof(text), "aborted at MINITRON_SIM_SEED=%llu\n",
                                   static_cast<unsigned long long>(current_seed));
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, text, length);
}

}  // namespace

int main(int argc, char** argv) {
  using Clock = std::chrono::steady_clock;
  const double hours = argc > 1 ? std::strtod(argv[1], nullptr) : 0;
  if (argc > 3 || hours <= 0) {
    std::fprintf(stderr, "usage: %s HOURS [FIRST_SEED]\n", argv[0]);
    return 2;
  }
  const auto now_ns = std::chrono::system_clock::now().time_since_epoch().count();
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : static_cast<uint64_t>(now_ns);
  std::signal(SIGABRT, PrintSeedOnAbort);
  minitron::simulation::Marks marks;
  const auto start = Clock::now();
  auto next_line = start + std::chrono::minutes(1);
  uint64_t seed = first;
  int64_t num_steps = 0, num_failed = 0;
  for (; std::chrono::duration<double>(Clock::now() - start).count() < hours * 3600; ++seed) {
    current_seed = seed;
    const minitron::simulation::SwarmResult result = minitron::simulation::RunSeed(seed, &marks);
    num_steps += result.num_steps;
    for (const std::string& violation : result.violations) {
      std::printf("MINITRON_SIM_SEED=%llu violated: %s\n", static_cast<unsigned long long>(seed), violation.c_str());
    }
    num_failed += result.violations.empty() ? 0 : 1;
    if (Clock::now() < next_line) continue;
    next_line += std::chrono::minutes(1);
    std::printf("%llu seeds, %lld steps, %lld failed\n", static_cast<unsigned long long>(seed - first + 1),
                static_cast<long long>(num_steps), static_cast<long long>(num_failed));
    std::fflush(stdout);
  }
  for (const auto& [name, hits] : marks.counts())
    std::printf("%-36s %lld\n", name.c_str(), static_cast<long long>(hits));
  std::printf("%llu seeds from %llu, %lld steps, %lld failed\n", static_cast<unsigned long long>(seed - first),
              static_cast<unsigned long long>(first), static_cast<long long>(num_steps),
              static_cast<long long>(num_failed));
  return num_failed == 0 ? 0 : 1;
}
