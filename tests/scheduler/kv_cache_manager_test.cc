#include "scheduler/kv_cache_manager.h"

#include "gtest/gtest.h"

namespace minitron::scheduler {
namespace {

std::shared_ptr<const Request> MakeRequest(int num_prompt) {
  Request request;
  request.prompt_token_ids.assign(num_prompt, 4);
  request.num_sequences = 2;
  return std::make_shared<const Request>(request);
}

TEST(KvCacheManagerTest, GrowTakesOnlyMissingBlocksAllOrNothing) {
  KvCacheManager manager(4, 8);
  Sequence sequence(MakeRequest(9), 0, 0);
  ASSERT_TRUE(manager.Grow(9, sequence).ok());
  EXPECT_EQ(sequence.block_table().size(), 2u);
  ASSERT_TRUE(manager.Grow(16, sequence).ok());
  EXPECT_EQ(sequence.block_table().size(), 2u);
  EXPECT_EQ(manager.Grow(33, sequence).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(sequence.block_table().size(), 2u);
  EXPECT_TRUE(manager.CheckConsistent({&sequence}).ok());
}

TEST(KvCacheManagerTest, TheLastPromptTokenIsNeverShared) {
  KvCacheManager manager(4, 8);
  EXPECT_EQ(manager.NumShareableTokens(*MakeRequest(1)), 0);
  EXPECT_EQ(manager.NumShareableTokens(*MakeRequest(8)), 0);
  EXPECT_EQ(manager.NumShareableTokens(*MakeRequest(9)), 8);
  EXPECT_EQ(manager.NumShareableTokens(*MakeRequest(17)), 16);
}

TEST(KvCacheManagerTest, SharedPrefixOutlivesItsFirstOwner) {
  KvCacheManager manager(8, 8);
  const auto request = MakeRequest(20);
  Sequence leader(request, 0, 0), follower(request, 1, 0);
  ASSERT_TRUE(manager.Grow(20, leader).ok());
  leader.Start(0, engine::kNone, TimePoint{});
  leader.AdvanceComputed(16);
  EXPECT_EQ(manager.ShareComputedPrefix(leader, follower), 16);
  ASSERT_TRUE(manager.Grow(20, follower).ok());
  EXPECT_EQ(follower.block_table()[1], leader.block_table()[1]);
  EXPECT_NE(follower.block_table()[2], leader.block_table()[2]);
  EXPECT_EQ(manager.num_used_blocks(), 4);
  EXPECT_TRUE(manager.CheckConsistent({&leader, &follower}).ok());
  manager.Release(leader);
  EXPECT_EQ(manager.num_used_blocks(), 3);
  EXPECT_TRUE(manager.CheckConsistent({&follower}).ok());
}

TEST(KvCacheManagerTest, CheckConsistentFindsALostAndADoubledBlock) {
  KvCacheManager manager(4, 8);
  Sequence sequence(MakeRequest(16), 0, 0);
  ASSERT_TRUE(manager.Grow(16, sequence).ok());
  EXPECT_FALSE(manager.CheckConsistent({}).ok());
  sequence.mutable_block_table()[1] = sequence.block_table()[0];
  EXPECT_FALSE(manager.CheckConsistent({&sequence}).ok());
}

}  // namespace
}  // namespace minitron::scheduler
