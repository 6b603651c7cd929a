#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "clients/bench/arrivals.h"

namespace minitron::bench {
namespace {

// Gaps between arrivals, the first one included.
std::vector<double> Gaps(const std::vector<double>& offsets) {
  std::vector<double> gaps;
  double before = 0;
  for (const double offset : offsets) {
    gaps.push_back(offset - before);
    before = offset;
  }
  return gaps;
}

struct Moments {
  double mean;
  double variation;  // deviation over mean
};

Moments MomentsOf(const std::vector<double>& values) {
  double sum = 0;
  double squares = 0;
  for (const double value : values) {
    sum += value;
    squares += value * value;
  }
  const auto count = static_cast<double>(values.size());
  const double mean = sum / count;
  return {mean, std::sqrt(squares / count - mean * mean) / mean};
}

constexpr size_t kCount = 20000;

TEST(ArrivalsTest, PoissonGapsAreExponential) {
  const std::vector<double> gaps = Gaps(ArrivalOffsets({.rate = 50, .seed = 1}, kCount));
  const Moments moments = MomentsOf(gaps);
  // Four standard errors of the mean and of the variation at this count.
  EXPECT_NEAR(moments.mean, 1.0 / 50, 4.0 / 50 / std::sqrt(kCount));
  EXPECT_NEAR(moments.variation, 1, 0.04);
  const auto longer = std::count_if(gaps.begin(), gaps.end(), [](double gap) { return gap > 1.0 / 50; });
  EXPECT_NEAR(static_cast<double>(longer) / kCount, std::exp(-1), 0.014);
}

TEST(ArrivalsTest, BurstinessIsTheShapeOfTheGamma) {
  // The variation of a gamma distribution is one over the root of its shape.
  for (const double shape : {0.25, 4.0}) {
    const Moments moments = MomentsOf(Gaps(ArrivalOffsets({.rate = 10, .burstiness = shape, .seed = 2}, kCount)));
    EXPECT_NEAR(moments.mean, 0.1, 0.1 * 4 / std::sqrt(shape * kCount)) << shape;
    EXPECT_NEAR(moments.variation, 1 / std::sqrt(shape), 0.06 / std::sqrt(shape)) << shape;
  }
}

TEST(ArrivalsTest, ARampMovesTheRateLinearly) {
  const std::vector<double> offsets =
      ArrivalOffsets({.rate = 10, .final_rate = 30, .burstiness = 100, .seed = 3}, kCount);
  EXPECT_TRUE(std::is_sorted(offsets.begin(), offsets.end()));
  const double end = 2.0 * kCount / (10 + 30);
  EXPECT_NEAR(offsets.back(), end, end * 0.01);
  // In the first and the last tenth of the time the mean rates are 11 and 29.
  const auto in = [&](double from, double to) {
    return static_cast<double>(std::count_if(offsets.begin(), offsets.end(),
                                             [&](double offset) { return offset >= from && offset < to; })) /
           (to - from);
  };
  EXPECT_NEAR(in(0, end / 10), 11, 0.3);
  EXPECT_NEAR(in(end / 2, end * 6 / 10), 21, 0.5);
  EXPECT_NEAR(in(end * 9 / 10, end), 29, 0.9);
}

TEST(ArrivalsTest, ARampMayGoDown) {
  const std::vector<double> offsets = ArrivalOffsets({.rate = 30, .final_rate = 1, .seed = 4}, 1000);
  EXPECT_TRUE(std::is_sorted(offsets.begin(), offsets.end()));
  EXPECT_TRUE(std::isfinite(offsets.back()));
}

TEST(ArrivalsTest, TheSeedDecides) {
  const ArrivalOptions options{.rate = 5, .seed = 7};
  ArrivalOptions other = options;
  other.seed = 8;
  EXPECT_EQ(ArrivalOffsets(options, 50), ArrivalOffsets(options, 50));
  EXPECT_NE(ArrivalOffsets(options, 50), ArrivalOffsets(other, 50));
  EXPECT_TRUE(ArrivalOffsets(options, 0).empty());
}

}  // namespace
}  // namespace minitron::bench
