#include "scheduler/kv_cache_manager.h"

#include <numeric>

#include "gtest/gtest.h"

namespace minitron::scheduler {
namespace {

constexpr int kBlockSize = 8;

// Prompts are 1, 2, 3, ...
std::shared_ptr<const Request> MakeRequest(int num_prompt, int max_tokens = 8) {
  Request request;
  request.prompt_token_ids.resize(num_prompt);
  std::iota(request.prompt_token_ids.begin(), request.prompt_token_ids.end(), 1);
  request.num_sequences = 2;
  request.max_tokens = max_tokens;
  return std::make_shared<const Request>(request);
}

// What the scheduler does with a sequence, without its queues.
int Start(KvCacheManager& manager, Sequence& sequence, int num_reserved_tokens = 0) {
  const int num_cached = manager.Start(manager.FindPrefix(sequence), num_reserved_tokens, sequence);
  sequence.Start(num_cached, engine::kNone, TimePoint{});
  return num_cached;
}

void Compute(KvCacheManager& manager, Sequence& sequence, int num_tokens) {
  sequence.BeginStep(num_tokens, 0, engine::kNone);
  manager.NotePlanned(sequence);
  sequence.EndStep(num_tokens, 0);
  manager.NoteComputed(sequence);
}

TEST(KvCacheManagerTest, GrowTakesOnlyMissingBlocksAllOrNothing) {
  KvCacheManager manager(4, kBlockSize);
  Sequence sequence(MakeRequest(9), 0, 0);
  Start(manager, sequence);
  EXPECT_EQ(sequence.block_table().size(), 2u);
  EXPECT_TRUE(manager.TryGrow(16, sequence));
  EXPECT_EQ(sequence.block_table().size(), 2u);
  EXPECT_FALSE(manager.TryGrow(33, sequence));
  EXPECT_EQ(sequence.block_table().size(), 2u);
  EXPECT_TRUE(manager.CheckConsistent({&sequence}).ok());
}

TEST(KvCacheManagerTest, TheLastTokenIsNeverSharedNorARowThatReports) {
  KvCacheManager manager(4, kBlockSize);
  const auto num_shareable = [&](int num_prompt) {
    return manager.NumShareableTokens(Sequence(MakeRequest(num_prompt), 0, 0));
  };
  EXPECT_EQ(num_shareable(1), 0);
  EXPECT_EQ(num_shareable(8), 0);
  EXPECT_EQ(num_shareable(9), 8);
  EXPECT_EQ(num_shareable(17), 16);
  Request scored = *MakeRequest(40);
  scored.num_prompt_top_logprobs = 0;
  scored.prompt_logprobs_start = 16;  // from row 15
  EXPECT_EQ(manager.NumShareableTokens(Sequence(std::make_shared<const Request>(scored), 0, 0)), 8);
  scored.prompt_logprobs_start = 17;
  EXPECT_EQ(manager.NumShareableTokens(Sequence(std::make_shared<const Request>(scored), 0, 0)), 16);
}

TEST(KvCacheManagerTest, SharedPrefixOutlivesItsFirstOwner) {
  KvCacheManager manager(8, kBlockSize);
  const auto request = MakeRequest(20);
  Sequence leader(request, 0, 0), follower(request, 1, 0);
  Start(manager, leader);
  Compute(manager, leader, 16);
  EXPECT_EQ(Start(manager, follower), 16);
  EXPECT_EQ(follower.block_table()[1], leader.block_table()[1]);
  EXPECT_NE(follower.block_table()[2], leader.block_table()[2]);
  EXPECT_EQ(manager.num_used_blocks(), 4);
  EXPECT_TRUE(manager.CheckConsistent({&leader, &follower}).ok());
  manager.Release(leader);
  EXPECT_EQ(manager.num_used_blocks(), 3);
  EXPECT_TRUE(manager.CheckConsistent({&follower}).ok());
}

TEST(KvCacheManagerTest, WhatIsBeingComputedIsSeenButNotShared) {
  KvCacheManager manager(8, kBlockSize);
  const auto request = MakeRequest(20);
  Sequence first(request, 0, 0), second(request, 1, 0);
  Start(manager, first);
  Compute(manager, first, 8);
  const KvCacheManager::Prefix prefix = manager.FindPrefix(second);
  EXPECT_EQ(prefix.num_blocks, 1);
  EXPECT_EQ(prefix.num_idle_blocks, 0);
  EXPECT_TRUE(prefix.next_is_computing);
  manager.Release(first);  // never filled its second block: nobody can wait for it any more
  EXPECT_EQ(manager.FindPrefix(second).num_blocks, 1);
  EXPECT_EQ(manager.FindPrefix(second).num_idle_blocks, 1);
  EXPECT_FALSE(manager.FindPrefix(second).next_is_computing);
  EXPECT_EQ(manager.num_cached_blocks(), 1);
}

TEST(KvCacheManagerTest, TheEndOfAReleasedPrefixIsEvictedFirst) {
  KvCacheManager manager(4, kBlockSize);
  Sequence first(MakeRequest(32), 0, 0), again(MakeRequest(33), 0, 1);
  Start(manager, first);
  Compute(manager, first, 32);
  manager.Release(first);
  EXPECT_EQ(manager.num_cached_blocks(), 4);
  Sequence other(MakeRequest(3), 0, 2, "other");
  Start(manager, other);
  EXPECT_EQ(manager.FindPrefix(again).num_blocks, 3);
  EXPECT_TRUE(manager.CheckConsistent({&other}).ok());
}

TEST(KvCacheManagerTest, BlocksFilledByDecodingAreFoundByTheNextTurn) {
  KvCacheManager manager(8, kBlockSize);
  Sequence first(MakeRequest(7), 0, 0);
  Start(manager, first);
  for (const TokenId token : {8, 9}) {
    first.BeginStep(first.num_wanted_tokens(), 0, 0);
    first.EndStep(first.num_planned_tokens() - first.num_computed_tokens(), 0);
    manager.NoteComputed(first);
    first.AppendOutput(token, TimePoint{});
  }
  manager.Release(first);
  EXPECT_EQ(manager.FindPrefix(Sequence(MakeRequest(20), 0, 1)).num_blocks, 1);
}

TEST(KvCacheManagerTest, AReservationCannotBeTakenByOthers) {
  KvCacheManager manager(4, kBlockSize);
  Sequence careful(MakeRequest(8, 16), 0, 0, "a"), greedy(MakeRequest(8), 0, 1, "b");
  Start(manager, careful, 24);
  EXPECT_EQ(manager.num_unreserved_blocks(), 1);
  Start(manager, greedy);
  EXPECT_FALSE(manager.TryGrow(9, greedy));
  EXPECT_TRUE(manager.TryGrow(24, careful));
  EXPECT_EQ(manager.num_available_blocks(), 0);
  EXPECT_TRUE(manager.CheckConsistent({&careful, &greedy}).ok());
  manager.Release(careful);
  EXPECT_TRUE(manager.TryGrow(9, greedy));
}

TEST(KvCacheManagerTest, DistrustedContentIsNotFoundAgain) {
  KvCacheManager manager(8, kBlockSize);
  const auto request = MakeRequest(20);
  Sequence first(request, 0, 0), second(request, 1, 0);
  Start(manager, first);
  Compute(manager, first, 16);
  manager.Distrust(first);
  manager.Release(first);
  EXPECT_EQ(manager.FindPrefix(second).num_blocks, 0);
  EXPECT_EQ(manager.num_cached_blocks(), 0);
  EXPECT_TRUE(manager.CheckConsistent({}).ok());
}

TEST(KvCacheManagerTest, CheckConsistentFindsALostAndADoubledBlock) {
  KvCacheManager manager(4, kBlockSize);
  Sequence sequence(MakeRequest(16), 0, 0);
  Start(manager, sequence);
  EXPECT_FALSE(manager.CheckConsistent({}).ok());
  sequence.mutable_kv().blocks[1] = sequence.block_table()[0];
  EXPECT_FALSE(manager.CheckConsistent({&sequence}).ok());
}

}  // namespace
}  // namespace minitron::scheduler
