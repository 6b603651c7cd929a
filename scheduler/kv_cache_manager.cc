#include "scheduler/kv_cache_manager.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"

namespace minitron::scheduler {

KvCacheManager::KvCacheManager(int num_blocks, int block_size, PrefixHashKey key, int hash_bits)
    : block_size_(block_size), allocator_(num_blocks), prefix_cache_(num_blocks, block_size, key, hash_bits) {}

int KvCacheManager::NumShareableTokens(const Sequence& sequence) const {
  int num_rows_not_needed = sequence.num_tokens() - 1;
  if (sequence.prompt_logprobs_pending()) {
    num_rows_not_needed = std::min(num_rows_not_needed, sequence.next_prompt_logprob() - 1);  // row p reports p + 1
  }
  return num_rows_not_needed / block_size_ * block_size_;
}

std::span<const TokenId> KvCacheManager::BlockTokens(const Sequence& sequence, int index) const {
  return std::span<const TokenId>(sequence.tokens()).subspan(static_cast<size_t>(index) * block_size_, block_size_);
}

KvCacheManager::Prefix KvCacheManager::FindPrefix(const Sequence& sequence) const {
  Prefix prefix;
  const int num_shareable = NumShareableTokens(sequence) / block_size_;
  PrefixChain chain = prefix_cache_.Root(sequence.cache_salt());
  while (prefix.num_blocks < num_shareable) {
    const BlockId block = prefix_cache_.Find(chain, BlockTokens(sequence, prefix.num_blocks), sequence.cache_salt());
    if (block == kNoBlock) break;
    if (!prefix_cache_.IsComputed(block)) {
      prefix.next_is_computing = true;
      break;
    }
    chain = prefix_cache_.ChainTo(block);
    prefix.num_idle_blocks += allocator_.is_cached(block) ? 1 : 0;
    ++prefix.num_blocks;
  }
  return prefix;
}

int KvCacheManager::Start(const Prefix& prefix, int num_reserved_tokens, Sequence& sequence) {
  KvState& kv = sequence.mutable_kv();
  CHECK(kv.blocks.empty() && kv.num_reserved == 0);
  // All it may ever need, so that decoding allocates nothing.
  kv.blocks.reserve(NumBlocksFor(sequence.num_prompt_tokens() + sequence.request().max_tokens));
  kv.chain = prefix_cache_.Root(sequence.cache_salt());
  for (int i = 0; i < prefix.num_blocks; ++i) {
    const BlockId block = prefix_cache_.Find(kv.chain, BlockTokens(sequence, i), sequence.cache_salt());
    CHECK(block != kNoBlock);
    allocator_.Share(block);
    kv.blocks.push_back(block);
    kv.chain = prefix_cache_.ChainTo(block);
  }
  kv.num_chained = kv.num_computed = prefix.num_blocks;
  const int num_blocks = NumBlocksFor(sequence.num_tokens());
  while (static_cast<int>(kv.blocks.size()) < num_blocks) AppendNewBlock(sequence);
  kv.num_reserved = std::max(0, NumBlocksFor(num_reserved_tokens) - num_blocks);
  num_reserved_ += kv.num_reserved;
  CHECK(num_unreserved_blocks() >= 0);
  InsertFilled(sequence.num_tokens() / block_size_, sequence);
  return prefix.num_blocks * block_size_;
}

void KvCacheManager::AppendNewBlock(Sequence& sequence) {
  const BlockId block = allocator_.Allocate();
  prefix_cache_.Erase(block);
  sequence.mutable_kv().blocks.push_back(block);
}

void KvCacheManager::InsertFilled(int num_blocks, Sequence& sequence) {
  KvState& kv = sequence.mutable_kv();
  for (; kv.num_chained < num_blocks; ++kv.num_chained) {
    kv.chain = prefix_cache_.Insert(kv.chain, BlockTokens(sequence, kv.num_chained), sequence.cache_salt(),
                                    kv.blocks[kv.num_chained]);
  }
}

bool KvCacheManager::TryGrow(int num_tokens, Sequence& sequence) {
  KvState& kv = sequence.mutable_kv();
  const int num_missing = NumBlocksFor(num_tokens) - static_cast<int>(kv.blocks.size());
  if (num_missing <= 0) return true;
  const int num_from_reserve = std::min(num_missing, kv.num_reserved);
  if (num_missing - num_from_reserve > num_unreserved_blocks()) return false;
  kv.num_reserved -= num_from_reserve;
  num_reserved_ -= num_from_reserve;
  for (int i = 0; i < num_missing; ++i) AppendNewBlock(sequence);
  return true;
}

void KvCacheManager::NotePlanned(Sequence& sequence) {
  KvState& kv = sequence.mutable_kv();
  const int num_filled = std::min(kv.num_chained, sequence.num_planned_tokens() / block_size_);
  for (; kv.num_computed < num_filled; ++kv.num_computed) {
    const BlockId block = kv.blocks[kv.num_computed];
    if (prefix_cache_.Contains(block)) prefix_cache_.MarkComputed(block);  // not when another block holds the tokens
  }
}

void KvCacheManager::NoteComputed(Sequence& sequence) {
  const int num_filled = sequence.num_computed_tokens() / block_size_;
  if (num_filled <= sequence.mutable_kv().num_chained) return;
  InsertFilled(num_filled, sequence);
  NotePlanned(sequence);
}

void KvCacheManager::Distrust(const Sequence& sequence) {
  for (const BlockId block : sequence.block_table()) prefix_cache_.Erase(block);
}

void KvCacheManager::Release(Sequence& sequence) {
  KvState& kv = sequence.mutable_kv();
  for (int i = static_cast<int>(kv.blocks.size()) - 1; i >= 0; --i) {
    const BlockId block = kv.blocks[i];
    // A block that was never filled holds nothing; nobody shares it, because nobody found it computed.
    if (!prefix_cache_.IsComputed(block)) prefix_cache_.Erase(block);
    allocator_.Release(block, prefix_cache_.Contains(block));
  }
  num_reserved_ -= kv.num_reserved;
  kv.num_reserved = kv.num_chained = kv.num_computed = 0;
  kv.blocks.clear();
}

absl::Status KvCacheManager::CheckConsistent(const std::vector<const Sequence*>& sequences) const {
  std::vector<int> num_owners(num_blocks(), 0);
  std::vector<const Sequence*> last_owner(num_blocks(), nullptr);
  int num_reserved = 0;
  for (const Sequence* sequence : sequences) {
    num_reserved += sequence->kv().num_reserved;
    for (const BlockId block : sequence->block_table()) {
      if (block < 0 || block >= num_blocks()) return absl::InternalError(absl::StrCat("no block ", block));
      if (last_owner[block] == sequence) return absl::InternalError(absl::StrCat("block ", block, " twice in a table"));
      last_owner[block] = sequence;
      ++num_owners[block];
    }
  }
  if (num_reserved != num_reserved_ || num_unreserved_blocks() < 0) {
    return absl::InternalError(absl::StrCat(num_reserved, " blocks reserved, ", num_reserved_, " counted, ",
                                            num_available_blocks(), " available"));
  }
  int num_owned = 0, num_entries = 0;
  for (BlockId block = 0; block < num_blocks(); ++block) {
    if (num_owners[block] != allocator_.ref_count(block)) {
      return absl::InternalError(absl::StrCat("block ", block, " is in ", num_owners[block], " tables but counts ",
                                              allocator_.ref_count(block), " owners"));
    }
    num_owned += num_owners[block] > 0 ? 1 : 0;
    num_entries += prefix_cache_.Contains(block) ? 1 : 0;
    if (num_owners[block] != 1 && prefix_cache_.Contains(block) && !prefix_cache_.IsComputed(block)) {
      return absl::InternalError(absl::StrCat("block ", block, " is being computed by ", num_owners[block], " owners"));
    }
  }
  const std::vector<BlockId> cached = allocator_.cached_blocks();
  if (static_cast<int>(cached.size()) != num_cached_blocks() || num_entries != prefix_cache_.num_entries() ||
      num_owned + allocator_.num_free() + num_cached_blocks() != num_blocks()) {
    return absl::InternalError(absl::StrCat(num_owned, " owned + ", allocator_.num_free(), " free + ", cached.size(),
                                            " cached != ", num_blocks()));
  }
  for (const BlockId block : cached) {
    if (num_owners[block] == 0 && prefix_cache_.IsComputed(block)) continue;
    return absl::InternalError(absl::StrCat("cached block ", block, " is owned or holds nothing"));
  }
  for (const BlockId block : allocator_.free_blocks()) {
    if (num_owners[block] == 0 && !prefix_cache_.Contains(block)) continue;
    return absl::InternalError(absl::StrCat("free block ", block, " is owned or said to hold something"));
  }
  return absl::OkStatus();
}

}  // namespace minitron::scheduler
