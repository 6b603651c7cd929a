#include "scheduler/block_allocator.h"

#include <set>

#include "gtest/gtest.h"

namespace minitron::scheduler {
namespace {

TEST(BlockAllocatorTest, AllocateIsAllOrNothing) {
  BlockAllocator allocator(4);
  const std::vector<BlockId> first = *allocator.Allocate(3);
  EXPECT_EQ(std::set<BlockId>(first.begin(), first.end()).size(), 3u);
  const auto refused = allocator.Allocate(2);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(refused.status().message(), "2 KV blocks wanted, 1 of 4 free");
  EXPECT_EQ(allocator.num_free(), 1);
  EXPECT_TRUE(allocator.Allocate(1).ok());
  EXPECT_TRUE(allocator.Allocate(0).ok());
}

TEST(BlockAllocatorTest, ReleaseOfSharedBlockKeepsItInUse) {
  BlockAllocator allocator(2);
  const BlockId block = allocator.Allocate(1)->front();
  allocator.Share(block);
  allocator.Release(block);
  EXPECT_EQ(allocator.ref_count(block), 1);
  EXPECT_EQ(allocator.num_used(), 1);
  allocator.Release(block);
  EXPECT_EQ(allocator.num_used(), 0);
}

TEST(BlockAllocatorDeathTest, ReleasingAFreeBlockAborts) {
  BlockAllocator allocator(2);
  EXPECT_DEATH(allocator.Release(0), "ref_count");
  EXPECT_DEATH(allocator.Share(1), "ref_count");
}

}  // namespace
}  // namespace minitron::scheduler
