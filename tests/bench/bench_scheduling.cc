// Prints the tables of scheduling in virtual time (overload, fairness, latency) as Markdown.
#include <cstdio>

#include "tests/bench/scenarios.h"

namespace minitron::bench {
namespace {

void PrintOverload() {
  const OverloadResult result = MeasureOverload({1, 2, 10, 100});
  std::printf("Capacity %.1f requests/s, peak goodput %.1f requests/s.\n\n", result.capacity, result.peak);
  std::printf(
      "| offered load | requests/s | goodput, requests/s | of peak | p99 first token, ms | refused | expired |\n");
  std::printf("|---|---|---|---|---|---|---|\n");
  for (const OverloadPoint& point : result.points) {
    std::printf("| %gx | %.0f | %.1f | %.1f %% | %.0f | %.1f %% | %.2f %% |\n", point.load, point.offered,
                point.goodput, 100 * point.share_of_peak, 1000 * point.p99_ttft_s, 100 * point.refused_share,
                100 * point.expired_share);
  }
  std::printf("\n");
}

void PrintFairness() {
  const FairnessResult flood = MeasureFlood();
  std::printf(
      "| well-behaved tenant | p50 first token, ms | p99, ms | p99 against alone | completed | goodput of all, "
      "requests/s |\n|---|---|---|---|---|---|\n");
  std::printf("| alone | %.1f | %.1f | 1 | all | |\n", 1000 * flood.alone_p50_s, 1000 * flood.alone_p99_s);
  std::printf("| while another sends 100x | %.1f | %.1f | %.2f | %.1f %% | %.1f |\n\n", 1000 * flood.flood_p50_s,
              1000 * flood.flood_p99_s, flood.flood_p99_s / flood.alone_p99_s, 100 * flood.served_share,
              flood.completed_per_s);
  std::printf("Jain's index of service at 10:1 offered load: %.4f\n\n", MeasureJain());
}

void PrintLatency() {
  std::printf(
      "| prompts are limited by | median, ms | p99, ms | worst, ms | p99 / median | 4k prompt's first token, ms |\n");
  std::printf("|---|---|---|---|---|---|\n");
  const struct {
    const char* name;
    double target_ms;
    int step, chunk;
  } kRows[] = {{"`--itl-target=10`", 10, 4096, 4096},
               {"`--itl-target=15`", 15, 4096, 4096},
               {"512 tokens a step", 0, 512, 512},
               {"2048 tokens a step", 0, 2048, 2048},
               {"4096 tokens a step", 0, 4096, 4096}};
  for (const auto& row : kRows) {
    const LatencyResult result = MeasureLatency(row.target_ms, row.step, row.chunk);
    std::printf("| %s | %.2f | %.2f | %.2f | %.2f | %.0f |\n", row.name, 1000 * result.median_s, 1000 * result.p99_s,
                1000 * result.worst_s, result.p99_s / result.median_s, 1000 * result.prompt_ttft_s);
  }
}

}  // namespace
}  // namespace minitron::bench

int main() {
  minitron::bench::PrintOverload();
  minitron::bench::PrintFairness();
  minitron::bench::PrintLatency();
  return 0;
}
