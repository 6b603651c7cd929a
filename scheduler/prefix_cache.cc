#include "scheduler/prefix_cache.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "engine/base/check.h"

namespace minitron::scheduler {
namespace {

// SipHash-2-4 over whole 64-bit words (Aumasson and Bernstein, "SipHash: a fast short-input PRF").
class SipHash {
 public:
  explicit SipHash(PrefixHashKey key)
      : v0_(key.low ^ 0x736F6D6570736575ull),
        v1_(key.high ^ 0x646F72616E646F6Dull),
        v2_(key.low ^ 0x6C7967656E657261ull),
        v3_(key.high ^ 0x7465646279746573ull) {}

  void Add(uint64_t word) {
    v3_ ^= word;
    Round();
    Round();
    v0_ ^= word;
    ++num_words_;
  }

  uint64_t Finish() {
    Add(num_words_ << 59);  // the length in bytes, in the top byte
    v2_ ^= 0xFF;
    for (int i = 0; i < 4; ++i) Round();
    return v0_ ^ v1_ ^ v2_ ^ v3_;
  }

 private:
  void Round() {
    v0_ += v1_;
    v2_ += v3_;
    v1_ = std::rotl(v1_, 13) ^ v0_;
    v3_ = std::rotl(v3_, 16) ^ v2_;
    v0_ = std::rotl(v0_, 32);
    v2_ += v1_;
    v0_ += v3_;
    v1_ = std::rotl(v1_, 17) ^ v2_;
    v3_ = std::rotl(v3_, 21) ^ v0_;
    v2_ = std::rotl(v2_, 32);
  }

  uint64_t v0_, v1_, v2_, v3_;
  uint64_t num_words_ = 0;
};

uint64_t MaskOf(int bits) { return bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1; }

}  // namespace

PrefixCache::PrefixCache(int num_blocks, int block_size, PrefixHashKey key, int hash_bits)
    : block_size_(block_size),
      key_(key),
      hash_mask_(MaskOf(hash_bits)),
      entries_(num_blocks),
      tokens_(static_cast<size_t>(num_blocks) * block_size),
      salts_(num_blocks),
      buckets_(std::bit_ceil(static_cast<size_t>(num_blocks)), kNoBlock) {
  CHECK(num_blocks > 0 && block_size > 0 && hash_bits >= 0 && hash_bits <= 64);
}

PrefixChain PrefixCache::Root(std::string_view salt) const {
  SipHash hash(key_);
  for (size_t i = 0; i < salt.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, salt.data() + i, std::min<size_t>(8, salt.size() - i));
    hash.Add(word);
  }
  hash.Add(salt.size());
  return {.hash = hash.Finish() & hash_mask_, .content = 0};
}

uint64_t PrefixCache::HashBlock(uint64_t before, std::span<const TokenId> tokens) const {
  SipHash hash(key_);
  hash.Add(before);
  size_t i = 0;
  for (; i + 2 <= tokens.size(); i += 2) {
    hash.Add(uint64_t{static_cast<uint32_t>(tokens[i])} << 32 | static_cast<uint32_t>(tokens[i + 1]));
  }
  if (i < tokens.size()) hash.Add(static_cast<uint32_t>(tokens[i]));
  return hash.Finish() & hash_mask_;
}

BlockId PrefixCache::FindWithHash(uint64_t hash, uint64_t parent_content, std::span<const TokenId> tokens,
                                  std::string_view salt) const {
  for (BlockId block = buckets_[hash & (buckets_.size() - 1)]; block != kNoBlock; block = entries_[block].next) {
    const Entry& entry = entries_[block];
    if (entry.hash != hash || entry.parent_content != parent_content) continue;
    if (!std::equal(tokens.begin(), tokens.end(), tokens_.begin() + int64_t{block} * block_size_)) continue;
    if (parent_content == 0 && salts_[block] != salt) continue;
    return block;
  }
  return kNoBlock;
}

BlockId PrefixCache::Find(const PrefixChain& chain, std::span<const TokenId> tokens, std::string_view salt) const {
  CHECK(static_cast<int>(tokens.size()) == block_size_);
  return FindWithHash(HashBlock(chain.hash, tokens), chain.content, tokens, salt);
}

PrefixChain PrefixCache::Insert(const PrefixChain& chain, std::span<const TokenId> tokens, std::string_view salt,
                                BlockId block) {
  CHECK(static_cast<int>(tokens.size()) == block_size_);
  const uint64_t hash = HashBlock(chain.hash, tokens);
  const BlockId present = FindWithHash(hash, chain.content, tokens, salt);
  if (present != kNoBlock) return ChainTo(present);
  Entry& entry = entries_[block];
  CHECK(entry.state == State::kAbsent);
  entry = {.hash = hash,
           .content = next_content_++,
           .parent_content = chain.content,
           .next = Bucket(hash),
           .state = State::kComputing};
  Bucket(hash) = block;
  std::copy(tokens.begin(), tokens.end(), tokens_.begin() + int64_t{block} * block_size_);
  if (chain.content == 0) salts_[block].assign(salt);
  ++num_entries_;
  return ChainTo(block);
}

void PrefixCache::MarkComputed(BlockId block) {
  CHECK(entries_[block].state == State::kComputing);
  entries_[block].state = State::kComputed;
}

void PrefixCache::Erase(BlockId block) {
  Entry& entry = entries_[block];
  if (entry.state == State::kAbsent) return;
  BlockId* link = &Bucket(entry.hash);
  while (*link != block) link = &entries_[*link].next;
  *link = entry.next;
  entry = {};
  --num_entries_;
}

}  // namespace minitron::scheduler
