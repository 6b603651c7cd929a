// PrefixCache: which KV block holds which tokens, after which tokens, under which salt.
//
// Full blocks only. The blocks of one prefix form a chain: a block's hash covers the salt, all tokens before it and its
// own, keyed with a secret, so nobody can aim at a bucket. The hash only finds candidates: a hit compares the block's
// tokens and the identity of the block before it, which was compared in the same way, back to the salt itself. So two
// prefixes are never taken for each other, whatever the hash does.
//
// Ids only; owns no memory of the KV cache and does not decide what is evicted. Allocates only where a chain starts
// under a salt longer than std::string keeps in place. Engine thread only; not synchronized.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/batch.h"

namespace minitron::scheduler {

using engine::BlockId;
using engine::TokenId;

inline constexpr BlockId kNoBlock = -1;

// The secret of the hash; random for each process.
struct PrefixHashKey {
  uint64_t low = 0;
  uint64_t high = 0;
};

// A place in a chain of full blocks: all that comes before the next one.
struct PrefixChain {
  uint64_t hash = 0;
  uint64_t content = 0;  // identity of the last block's content, never given twice; 0 before the first block
  friend bool operator==(const PrefixChain&, const PrefixChain&) = default;
};

class PrefixCache {
 public:
  // hash_bits [0, 64]: fewer than 64 make collisions, for tests.
  PrefixCache(int num_blocks, int block_size, PrefixHashKey key, int hash_bits = 64);

  // The chain without blocks.
  PrefixChain Root(std::string_view salt) const;

  // The block that holds `tokens` (one block full) after `chain`, or kNoBlock. `salt` is the one of the chain's root.
  BlockId Find(const PrefixChain& chain, std::span<const TokenId> tokens, std::string_view salt) const;

  // The chain up to and with an entry's block.
  PrefixChain ChainTo(BlockId block) const { return {entries_[block].hash, entries_[block].content}; }

  // Remembers that `block` will hold `tokens` after `chain`. CHECKs that it holds nothing else. It is being computed
  // until MarkComputed: found, but not to be used. Nothing changes when another block holds these tokens already.
  // Returns the chain with the tokens, through whichever block holds them.
  PrefixChain Insert(const PrefixChain& chain, std::span<const TokenId> tokens, std::string_view salt, BlockId block);
  void MarkComputed(BlockId block);

  // Forgets what the block holds, if anything.
  void Erase(BlockId block);

  bool Contains(BlockId block) const { return entries_[block].state != State::kAbsent; }
  bool IsComputed(BlockId block) const { return entries_[block].state == State::kComputed; }
  int num_entries() const { return num_entries_; }
  uint64_t parent_content(BlockId block) const { return entries_[block].parent_content; }  // for inspection

 private:
  enum class State : uint8_t { kAbsent, kComputing, kComputed };
  struct Entry {
    uint64_t hash = 0;
    uint64_t content = 0;
    uint64_t parent_content = 0;
    BlockId next = kNoBlock;  // in the bucket
    State state = State::kAbsent;
  };

  uint64_t HashBlock(uint64_t before, std::span<const TokenId> tokens) const;
  BlockId& Bucket(uint64_t hash) { return buckets_[hash & (buckets_.size() - 1)]; }
  BlockId FindWithHash(uint64_t hash, uint64_t parent_content, std::span<const TokenId> tokens,
                       std::string_view salt) const;

  const int block_size_;
  const PrefixHashKey key_;
  const uint64_t hash_mask_;
  std::vector<Entry> entries_;      // by block
  std::vector<TokenId> tokens_;     // [num_blocks, block_size]
  std::vector<std::string> salts_;  // by block; of first blocks only
  std::vector<BlockId> buckets_;    // a power of two of them; heads of lists through Entry::next
  uint64_t next_content_ = 1;
  int num_entries_ = 0;
};

}  // namespace minitron::scheduler
