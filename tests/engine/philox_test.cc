#include "engine/philox.h"

#include <cstdint>

#include "gtest/gtest.h"

namespace minitron::engine {
namespace {

TEST(PhiloxTest, MatchesTheKnownAnswersOfItsPaper) {
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}), (PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(Philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
            (PhiloxCounter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (PhiloxCounter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(PhiloxTest, UniformDependsOnSeedAndPositionOnlyAndStaysBelowOne) {
  EXPECT_EQ(UniformForPosition(7, 3), UniformForPosition(7, 3));
  EXPECT_NE(UniformForPosition(7, 3), UniformForPosition(7, 4));
  EXPECT_NE(UniformForPosition(7, 3), UniformForPosition(uint64_t{7} << 32, 3));
  double sum = 0.0;
  for (int32_t i = 0; i < 10000; ++i) {
    const double u = UniformForPosition(42, i);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    sum += u;
  }
  EXPECT_NEAR(sum / 10000, 0.5, 0.012);  // four standard errors
}

}  // namespace
}  // namespace minitron::engine
