#include "scheduler/request.h"

#include <set>

#include "gtest/gtest.h"

namespace minitron::scheduler {
namespace {

TEST(SequenceSeedTest, FirstSequenceDrawsWithTheRequestsSeed) { EXPECT_EQ(SequenceSeed(42, 0), 42u); }

TEST(SequenceSeedTest, NeighbouringSeedsAndIndicesDoNotCollide) {
  std::set<uint64_t> seen;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    for (int index = 0; index < 16; ++index) EXPECT_TRUE(seen.insert(SequenceSeed(seed, index)).second);
  }
}

}  // namespace
}  // namespace minitron::scheduler
