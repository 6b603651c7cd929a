// Attention over the paged cache beyond ops_test: element types, ranges of positions and how they are shared out.
#include "engine/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "engine/convert.h"
#include "gtest/gtest.h"
#include "tests/engine/random_model.h"
#include "tests/engine/targets.h"

namespace minitron::engine::cpu {
namespace {

constexpr int kBlockSize = 16;
constexpr int kGroup = 6;
constexpr int kDim = 32;
constexpr int kHeads = 2;

// One sequence of `length` tokens with random keys and values, and one query row at its end.
class Scene {
 public:
  Scene(int length, KvCacheType type, int rows = 1)
      : length_(length),
        rows_(rows),
        cache_({.num_layers = 1,
                .num_blocks = (length + kBlockSize - 1) / kBlockSize,
                .num_heads = kHeads,
                .head_dim = kDim,
                .block_size = kBlockSize,
                .type = type}) {
    uint64_t state = 3;
    keys_.resize(static_cast<size_t>(length) * kHeads * kDim);
    values_.resize(keys_.size());
    for (float& x : keys_) x = Stored(NextUniform(state) * 2.0f);
    for (float& x : values_) x = Stored(NextUniform(state));
    queries_.resize(static_cast<size_t>(rows) * kHeads * kGroup * kDim);
    for (float& x : queries_) x = NextUniform(state) * 2.0f;
    const int blocks = cache_.shape().num_blocks;
    for (int b = 0; b < blocks; ++b) block_ids_.push_back(blocks - 1 - b);
    for (int p = 0; p < length; ++p) {
      for (int h = 0; h < kHeads; ++h) {
        for (int d = 0; d < kDim; ++d) Put(p, h, d);
      }
    }
  }

  std::vector<float> Attend(ThreadPool& pool) {
    std::vector<float> out(queries_.size(), -7.0f);
    const AttentionScratch scratch(kGroup, kDim, length_, pool.num_threads());
    std::vector<int32_t> positions(rows_), sequence(rows_, 0);
    for (int r = 0; r < rows_; ++r) positions[r] = length_ - rows_ + r;
    const std::vector<int32_t> query_start = {0, rows_};
    const std::vector<int32_t> block_start = {0, static_cast<int32_t>(block_ids_.size())};
    const std::vector<int32_t> kv_lens = {length_};
    const BatchView batch{.num_tokens = rows_,
                          .num_sequences = 1,
                          .positions = positions.data(),
                          .query_start = query_start.data(),
                          .block_start = block_start.data(),
                          .block_ids = block_ids_.data(),
                          .kv_lens = kv_lens.data()};
    const int64_t cols = int64_t{kHeads} * kGroup * kDim;
    PagedAttention(pool, batch, sequence.data(), cache_, 0, kGroup, {queries_.data(), rows_, cols},
                   {out.data(), rows_, cols}, scratch);
    return out;
  }

  // In double, for the last row.
  std::vector<double> Naive() const {
    std::vector<double> out;
    const float* queries = queries_.data() + queries_.size() - size_t{kHeads} * kGroup * kDim;
    for (int h = 0; h < kHeads * kGroup; ++h) {
      std::vector<double> weights(length_);
      for (int p = 0; p < length_; ++p) {
        double dot = 0.0;
        for (int d = 0; d < kDim; ++d) dot += double{queries[h * kDim + d]} * Key(p, h / kGroup, d);
        weights[p] = dot / std::sqrt(double{kDim});
      }
      const double maximum = *std::max_element(weights.begin(), weights.end());
      double total = 0.0;
      for (double& weight : weights) total += weight = std::exp(weight - maximum);
      for (int d = 0; d < kDim; ++d) {
        double sum = 0.0;
        for (int p = 0; p < length_; ++p) sum += weights[p] * values_[Index(p, h / kGroup, d)];
        out.push_back(sum / total);
      }
    }
    return out;
  }

 private:
  static size_t Index(int p, int h, int d) { return (static_cast<size_t>(p) * kHeads + h) * kDim + d; }
  float Key(int p, int h, int d) const { return keys_[Index(p, h, d)]; }
  float Stored(float x) const { return cache_.shape().type == KvCacheType::kBf16 ? Bf16ToFloat(FloatToBf16(x)) : x; }
  void Put(int p, int h, int d) {
    const int block = block_ids_[p / kBlockSize], offset = p % kBlockSize;
    const size_t key_at = static_cast<size_t>(d) * kBlockSize + offset,
                 value_at = static_cast<size_t>(offset) * kDim + d;
    if (cache_.shape().type == KvCacheType::kBf16) {
      cache_.KeyBlock<uint16_t>(0, block, h)[key_at] = FloatToBf16(Key(p, h, d));
      cache_.ValueBlock<uint16_t>(0, block, h)[value_at] = FloatToBf16(values_[Index(p, h, d)]);
    } else {
      cache_.KeyBlock<float>(0, block, h)[key_at] = Key(p, h, d);
      cache_.ValueBlock<float>(0, block, h)[value_at] = values_[Index(p, h, d)];
    }
  }

  int length_, rows_;
  KvCache cache_;
  std::vector<float> keys_, values_, queries_;
  std::vector<BlockId> block_ids_;
};

TEST(PagedAttention, EqualsDoubleReferenceAroundRangeEdgesInBothElementTypes) {
  ThreadPool one(1), three(3);
  for (const KvCacheType type : {KvCacheType::kBf16, KvCacheType::kF32}) {
    for (const int length : {1, 15, 16, 17, 511, 512, 513, 1023, 1024, 1025, 1700}) {
      Scene scene(length, type);
      const std::vector<double> expected = scene.Naive();
      ForEachTarget([&](int64_t) {
        for (ThreadPool* pool : {&one, &three}) {
          const std::vector<float> out = scene.Attend(*pool);
          // Rounding of scores up to 10 and of sums of 1700 weights.
          for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], expected[i], 2e-5) << length << " at " << i;
        }
      });
    }
  }
}

TEST(PagedAttention, OneThreadAndManyGiveTheSameBitsHoweverRangesAreShared) {
  ThreadPool one(1), two(2), five(5);
  ForEachTarget([&](int64_t) {
    for (const int length : {40, 700, 1100, 1700}) {
      // Few rows: ranges are shared out. Many rows: a row's ranges stay with one thread.
      Scene many(length, KvCacheType::kBf16, 33);
      const std::vector<float> expected = many.Attend(one);
      for (ThreadPool* pool : {&two, &five}) {
        const std::vector<float> out = many.Attend(*pool);
        ASSERT_EQ(std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)), 0) << length;
      }
      Scene single(length, KvCacheType::kBf16);
      const std::vector<float> alone = single.Attend(one);
      for (ThreadPool* pool : {&two, &five}) {
        const std::vector<float> out = single.Attend(*pool);
        ASSERT_EQ(std::memcmp(out.data(), alone.data(), out.size() * sizeof(float)), 0) << length;
      }
    }
  });
}

}  // namespace
}  // namespace minitron::engine::cpu
