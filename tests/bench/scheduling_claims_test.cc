// What the scheduler promises under load, in virtual time and so without timing anything: overload, fairness, latency.
// The same scenarios as minitron-bench-scheduling prints; the bounds are the goals, where they are met.
#include "gtest/gtest.h"
#include "tests/bench/scenarios.h"

namespace minitron::bench {
namespace {

TEST(SchedulingClaims, GoodputHoldsUnderAnyLoad) {
  const OverloadResult result = MeasureOverload({2, 10, 100});
  ASSERT_EQ(result.points.size(), 3u);
  EXPECT_GT(result.peak, 0.95 * result.capacity);
  EXPECT_GE(result.points[0].share_of_peak, 0.98);
  EXPECT_GE(result.points[1].share_of_peak, 0.95);
  EXPECT_GE(result.points[2].share_of_peak, 0.90);
  for (const OverloadPoint& point : result.points) {
    EXPECT_LE(point.p99_ttft_s, 2.0) << "the first-token timeout";
    EXPECT_GT(point.refused_share, 0.3) << point.load;  // what cannot be served is told so, not kept waiting
  }
}

TEST(SchedulingClaims, AFloodDoesNotDelayAWellBehavedTenant) {
  const FairnessResult result = MeasureFlood();
  EXPECT_EQ(result.served_share, 1.0);
  EXPECT_LE(result.flood_p99_s, 1.3 * result.alone_p99_s);
  // What is kept free for it costs the flood little.
  EXPECT_GE(result.completed_per_s, 0.95 * MeasureCapacity());
}

TEST(SchedulingClaims, TwoGreedyTenantsGetTheSameAtTenToOne) { EXPECT_GE(MeasureJain(), 0.95); }

TEST(SchedulingClaims, PromptsDoNotStallStreamsBeyondTheTarget) {
  const LatencyResult paced = MeasureLatency(/*itl_target_ms=*/10, 4096, 4096);
  EXPECT_LE(paced.p99_s, 2 * paced.median_s);
  EXPECT_LE(paced.p99_s, 1.05 * 10e-3);
  EXPECT_GT(paced.prompt_ttft_s, 0) << "and prompts get on";
  EXPECT_LT(paced.prompt_ttft_s, 0.5);
  const LatencyResult fixed = MeasureLatency(/*itl_target_ms=*/0, 2048, 2048);
  EXPECT_GT(fixed.p99_s, 4 * fixed.median_s);  // the scenario is one in which prompts do stall streams
}

TEST(SchedulingClaims, TheSameLoadGivesTheSameNumbers) {
  const FairnessResult first = MeasureFlood(), second = MeasureFlood();
  EXPECT_EQ(first.flood_p99_s, second.flood_p99_s);
  EXPECT_EQ(first.flood_p50_s, second.flood_p50_s);
}

}  // namespace
}  // namespace minitron::bench
