#include "scheduler/prefix_cache.h"

#include <vector>

#include "gtest/gtest.h"

namespace minitron::scheduler {
namespace {

using Tokens = std::vector<TokenId>;

constexpr int kBlockSize = 3;
constexpr char kSalt[] = "salt";

// Every claim must hold with a good hash and with one on which everything collides.
class PrefixCacheTest : public ::testing::TestWithParam<int> {
 protected:
  PrefixCacheTest() : cache_(8, kBlockSize, {.low = 1, .high = 2}, GetParam()) {}
  PrefixChain Add(const PrefixChain& chain, const Tokens& tokens, BlockId block, const char* salt = kSalt) {
    const PrefixChain result = cache_.Insert(chain, tokens, salt, block);
    if (cache_.Contains(block) && !cache_.IsComputed(block)) cache_.MarkComputed(block);
    return result;
  }
  PrefixCache cache_;
};

TEST_P(PrefixCacheTest, ABlockIsFoundByItsTokensAndAllBeforeThem) {
  const PrefixChain root = cache_.Root(kSalt);
  const PrefixChain first = Add(root, {1, 2, 3}, 5);
  const PrefixChain second = Add(first, {4, 5, 6}, 6);
  EXPECT_EQ(cache_.Find(root, Tokens{1, 2, 3}, kSalt), 5);
  EXPECT_EQ(cache_.Find(first, Tokens{4, 5, 6}, kSalt), 6);
  EXPECT_EQ(cache_.ChainTo(6), second);
  EXPECT_EQ(cache_.Find(root, Tokens{4, 5, 6}, kSalt), kNoBlock);
  EXPECT_EQ(cache_.Find(second, Tokens{4, 5, 6}, kSalt), kNoBlock);
  EXPECT_EQ(cache_.Find(first, Tokens{4, 5, 7}, kSalt), kNoBlock);
}

TEST_P(PrefixCacheTest, SaltsKeepEqualTokensApart) {
  Add(cache_.Root(kSalt), {1, 2, 3}, 5);
  EXPECT_EQ(cache_.Find(cache_.Root("other"), Tokens{1, 2, 3}, "other"), kNoBlock);
  Add(cache_.Root("other"), {1, 2, 3}, 6, "other");
  EXPECT_EQ(cache_.Find(cache_.Root("other"), Tokens{1, 2, 3}, "other"), 6);
  EXPECT_EQ(cache_.Find(cache_.Root(kSalt), Tokens{1, 2, 3}, kSalt), 5);
}

TEST_P(PrefixCacheTest, AfterItsPrefixIsGoneABlockIsNeverFoundBehindAnother) {
  const PrefixChain root = cache_.Root(kSalt);
  const PrefixChain first = Add(root, {1, 2, 3}, 5);
  Add(first, {4, 5, 6}, 6);
  cache_.Erase(5);
  // The same block with other tokens, and another with the same tokens: neither is what block 6 was computed after.
  const PrefixChain other = Add(root, {7, 8, 9}, 5);
  const PrefixChain again = Add(root, {1, 2, 3}, 4);
  EXPECT_EQ(cache_.Find(other, Tokens{4, 5, 6}, kSalt), kNoBlock);
  EXPECT_EQ(cache_.Find(again, Tokens{4, 5, 6}, kSalt), kNoBlock);
  EXPECT_EQ(cache_.num_entries(), 3);
}

TEST_P(PrefixCacheTest, TheSecondBlockOfEqualContentIsNotEntered) {
  const PrefixChain root = cache_.Root(kSalt);
  const PrefixChain chain = Add(root, {1, 2, 3}, 5);
  EXPECT_EQ(Add(root, {1, 2, 3}, 6), chain);
  EXPECT_FALSE(cache_.Contains(6));
  EXPECT_EQ(cache_.Find(root, Tokens{1, 2, 3}, kSalt), 5);
}

TEST_P(PrefixCacheTest, ABlockBeingComputedIsFoundButNotComputed) {
  const PrefixChain root = cache_.Root(kSalt);
  cache_.Insert(root, Tokens{1, 2, 3}, kSalt, 5);
  EXPECT_EQ(cache_.Find(root, Tokens{1, 2, 3}, kSalt), 5);
  EXPECT_FALSE(cache_.IsComputed(5));
  cache_.MarkComputed(5);
  EXPECT_TRUE(cache_.IsComputed(5));
  cache_.Erase(5);
  cache_.Erase(5);
  EXPECT_EQ(cache_.num_entries(), 0);
  EXPECT_EQ(cache_.Find(root, Tokens{1, 2, 3}, kSalt), kNoBlock);
}

INSTANTIATE_TEST_SUITE_P(HashBits, PrefixCacheTest, ::testing::Values(64, 1, 0));

TEST(PrefixCacheHashTest, DependsOnTheKeyAndOnNothingElse) {
  const PrefixCache a(8, 4, {.low = 1, .high = 2}), same(100, 4, {.low = 1, .high = 2}), b(8, 4, {.low = 1, .high = 3});
  EXPECT_EQ(a.Root(kSalt), same.Root(kSalt));
  EXPECT_NE(a.Root(kSalt).hash, b.Root(kSalt).hash);
  EXPECT_NE(a.Root("").hash, a.Root(std::string_view("\0", 1)).hash);
}

}  // namespace
}  // namespace minitron::scheduler
