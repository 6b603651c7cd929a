#include "scheduler/block_allocator.h"

#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace minitron::scheduler {
namespace {

using ::testing::ElementsAre;

TEST(BlockAllocatorTest, EveryBlockIsHandedOutOnce) {
  BlockAllocator allocator(4);
  std::set<BlockId> blocks;
  while (allocator.num_available() > 0) blocks.insert(allocator.Allocate());
  EXPECT_EQ(blocks.size(), 4u);
  EXPECT_EQ(allocator.num_used(), 4);
}

TEST(BlockAllocatorTest, ReleaseOfSharedBlockKeepsItInUse) {
  BlockAllocator allocator(2);
  const BlockId block = allocator.Allocate();
  allocator.Share(block);
  allocator.Release(block, false);
  EXPECT_EQ(allocator.ref_count(block), 1);
  EXPECT_EQ(allocator.num_used(), 1);
  allocator.Release(block, false);
  EXPECT_EQ(allocator.num_used(), 0);
  EXPECT_EQ(allocator.num_free(), 2);
}

TEST(BlockAllocatorTest, FreeBlocksGoBeforeCachedAndOfTheseTheOldest) {
  BlockAllocator allocator(4);
  BlockId blocks[4];
  for (BlockId& block : blocks) block = allocator.Allocate();
  allocator.Release(blocks[2], true);
  allocator.Release(blocks[0], true);
  allocator.Release(blocks[3], true);
  allocator.Release(blocks[1], false);
  EXPECT_EQ(allocator.num_cached(), 3);
  EXPECT_THAT(allocator.cached_blocks(), ElementsAre(blocks[2], blocks[0], blocks[3]));
  allocator.Share(blocks[0]);  // wanted again: in use, not to be handed out
  EXPECT_EQ(allocator.num_available(), 3);
  EXPECT_EQ(allocator.Allocate(), blocks[1]);
  EXPECT_EQ(allocator.Allocate(), blocks[2]);
  EXPECT_EQ(allocator.Allocate(), blocks[3]);
  EXPECT_EQ(allocator.num_available(), 0);
}

TEST(BlockAllocatorDeathTest, ReleasingAFreeBlockOrTakingFromNothingAborts) {
  BlockAllocator allocator(2);
  EXPECT_DEATH(allocator.Release(0, false), "ref_count");
  EXPECT_DEATH(allocator.Share(1), "ref_count");
  allocator.Allocate();
  allocator.Allocate();
  EXPECT_DEATH(allocator.Allocate(), "num_available");
}

}  // namespace
}  // namespace minitron::scheduler
