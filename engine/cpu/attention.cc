#include "engine/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "engine/base/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/cpu/attention.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
// After highway.h.
#include "hwy/contrib/math/math-inl.h"

#ifndef MINITRON_ENGINE_CPU_ATTENTION_ROW_
#define MINITRON_ENGINE_CPU_ATTENTION_ROW_
namespace minitron::engine::cpu {

// One token row and one kv head: the queries of its group, and where the keys and values are.
struct AttentionRow {
  const KvCache* cache;
  int layer;
  int head;  // key/value head
  int group_size;
  int64_t num_keys;  // position + 1
  const BlockId* block_ids;
  const float* queries;  // [group_size, head_dim]
  float* out;            // [group_size, head_dim]
  float* scores;         // [group_size, score_stride]
  int64_t score_stride;  // num_keys rounded up to whole blocks, at least
};

}  // namespace minitron::engine::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace minitron::engine::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// scores[h, key] = q[h] . K[key] * scale for kHeads heads and one vector of keys.
template <int kHeads, class Tag>
HWY_INLINE void ScoreTile(Tag tag, const float* queries, const float* keys, int64_t head_dim, int64_t block_size,
                          float scale, float* scores, int64_t score_stride) {
  hn::Vec<Tag> sums[kHeads];
  for (int h = 0; h < kHeads; ++h) sums[h] = hn::Zero(tag);
  for (int64_t d = 0; d < head_dim; ++d) {
    const auto key = hn::LoadU(tag, keys + d * block_size);
    for (int h = 0; h < kHeads; ++h) sums[h] = hn::MulAdd(hn::Set(tag, queries[h * head_dim + d]), key, sums[h]);
  }
  for (int h = 0; h < kHeads; ++h) {
    hn::StoreU(hn::Mul(sums[h], hn::Set(tag, scale)), tag, scores + h * score_stride);
  }
}

// Scores of all keys for kHeads heads from `first_head`. Lanes past num_keys hold scores of stale keys: not used.
template <int kHeads, class Tag>
HWY_INLINE void ScoreHeads(Tag tag, const AttentionRow& row, int first_head) {
  const KvCacheShape& shape = row.cache->shape();
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  for (int64_t block = 0; block * shape.block_size < row.num_keys; ++block) {
    const float* keys = row.cache->KeyBlock(row.layer, row.block_ids[block], row.head);
    const int64_t first_key = block * shape.block_size;
    for (int64_t offset = 0; offset < shape.block_size && first_key + offset < row.num_keys; offset += lanes) {
      ScoreTile<kHeads>(tag, row.queries + first_head * shape.head_dim, keys + offset, shape.head_dim, shape.block_size,
                        scale, row.scores + first_head * row.score_stride + first_key + offset, row.score_stride);
    }
  }
}

// scores[0 .. count) become exp(score - max); returns their sum.
template <class Tag>
HWY_INLINE float ExpAndSum(Tag tag, float* scores, int64_t count) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  auto maxima = hn::Set(tag, scores[0]);
  int64_t full = 0;
  for (; full + lanes <= count; full += lanes) maxima = hn::Max(maxima, hn::LoadU(tag, scores + full));
  float maximum = hn::GetLane(hn::MaxOfLanes(tag, maxima));
  for (; full < count; ++full) maximum = std::max(maximum, scores[full]);
  auto sums = hn::Zero(tag);
  for (int64_t i = 0; i < count; i += lanes) {
    const auto used = hn::FirstN(tag, static_cast<size_t>(std::min(lanes, count - i)));
    const auto shifted = hn::Sub(hn::LoadU(tag, scores + i), hn::Set(tag, maximum));
    const auto weights = hn::IfThenElseZero(used, hn::Exp(tag, hn::IfThenElseZero(used, shifted)));
    hn::StoreU(weights, tag, scores + i);
    sums = hn::Add(sums, weights);
  }
  return hn::GetLane(hn::SumOfLanes(tag, sums));
}

// out[h, dims] = sum_key weights[h, key] * V[key, dims] / sums[h] for kVectors vectors of dims from `d`.
template <int kHeads, int kVectors, class Tag>
HWY_INLINE void ValueTile(Tag tag, const AttentionRow& row, int first_head, int64_t d, const float* sums) {
  const KvCacheShape& shape = row.cache->shape();
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  const float* weights = row.scores + first_head * row.score_stride;
  hn::Vec<Tag> totals[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int n = 0; n < kVectors; ++n) totals[h][n] = hn::Zero(tag);
  }
  for (int64_t key = 0; key < row.num_keys;) {
    const float* values = row.cache->ValueBlock(row.layer, row.block_ids[key / shape.block_size], row.head) + d;
    const int64_t block_end = std::min<int64_t>(key + shape.block_size, row.num_keys);
    for (; key < block_end; ++key, values += shape.head_dim) {
      hn::Vec<Tag> value[kVectors];
      for (int n = 0; n < kVectors; ++n) value[n] = hn::LoadU(tag, values + n * lanes);
      for (int h = 0; h < kHeads; ++h) {
        const auto weight = hn::Set(tag, weights[h * row.score_stride + key]);
        for (int n = 0; n < kVectors; ++n) totals[h][n] = hn::MulAdd(weight, value[n], totals[h][n]);
      }
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    float* out = row.out + (first_head + h) * shape.head_dim + d;
    for (int n = 0; n < kVectors; ++n) {
      hn::StoreU(hn::Div(totals[h][n], hn::Set(tag, sums[h])), tag, out + n * lanes);
    }
  }
}

template <int kHeads, class Tag>
HWY_INLINE void AttendHeads(Tag tag, const AttentionRow& row, int first_head) {
  const int64_t head_dim = row.cache->shape().head_dim;
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  ScoreHeads<kHeads>(tag, row, first_head);
  float sums[kHeads];
  for (int h = 0; h < kHeads; ++h) {
    sums[h] = ExpAndSum(tag, row.scores + (first_head + h) * row.score_stride, row.num_keys);
  }
  // 6 heads x 2 vectors are 12 of AVX2's 16 registers and more than enough chains to hide the latency.
  int64_t d = 0;
  for (; d + 2 * lanes <= head_dim; d += 2 * lanes) ValueTile<kHeads, 2>(tag, row, first_head, d, sums);
  for (; d + lanes <= head_dim; d += lanes) ValueTile<kHeads, 1>(tag, row, first_head, d, sums);
  for (; d < head_dim; ++d) ValueTile<kHeads, 1>(hn::CappedTag<float, 1>(), row, first_head, d, sums);
}

template <class Tag>
HWY_INLINE void AttendGroup(Tag tag, const AttentionRow& row) {
  int head = 0;
  for (; head + 6 <= row.group_size; head += 6) AttendHeads<6>(tag, row, head);  // the family's group size
  for (; head + 4 <= row.group_size; head += 4) AttendHeads<4>(tag, row, head);
  for (; head + 2 <= row.group_size; head += 2) AttendHeads<2>(tag, row, head);
  for (; head < row.group_size; ++head) AttendHeads<1>(tag, row, head);
}

void AttendRow(const AttentionRow& row) {
  const hn::ScalableTag<float> tag;
  if (static_cast<int64_t>(hn::Lanes(tag)) <= row.cache->shape().block_size) {
    AttendGroup(tag, row);
  } else {
    AttendGroup(hn::CappedTag<float, 8>(), row);  // the smallest block: 8 tokens
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace minitron::engine::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace minitron::engine::cpu {

HWY_EXPORT(AttendRow);

void PagedAttention(ThreadPool& pool, const BatchView& batch, const int32_t* token_sequence, const KvCache& cache,
                    int layer, int group_size, MatrixView<const float> q, MatrixView<float> out, float* scratch,
                    int64_t scratch_floats) {
  const KvCacheShape& shape = cache.shape();
  CHECK(q.rows == batch.num_tokens && out.rows == q.rows && out.cols == q.cols);
  CHECK(q.cols == int64_t{shape.num_heads} * group_size * shape.head_dim);
  const int64_t score_stride = scratch_floats / group_size;
  // Short contexts are cheap: give a thread a few heads at a time, long ones one.
  int32_t longest = 0;
  for (int s = 0; s < batch.num_sequences; ++s) longest = std::max(longest, batch.kv_lens[s]);
  constexpr int64_t kMinWork = 64 << 10;  // multiply-adds; see MatMul
  const int64_t grain = std::max<int64_t>(1, kMinWork / (int64_t{2} * longest * group_size * shape.head_dim));
  pool.ParallelFor(q.rows * shape.num_heads, grain, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t t = item / shape.num_heads;
      const int head = static_cast<int>(item % shape.num_heads);
      const int64_t first_dim = int64_t{head} * group_size * shape.head_dim;
      HWY_DYNAMIC_DISPATCH(AttendRow)
      ({.cache = &cache,
        .layer = layer,
        .head = head,
        .group_size = group_size,
        .num_keys = int64_t{batch.positions[t]} + 1,
        .block_ids = batch.block_ids + batch.block_start[token_sequence[t]],
        .queries = q.row(t) + first_dim,
        .out = out.row(t) + first_dim,
        .scores = scratch + thread * scratch_floats,
        .score_stride = score_stride});
    }
  });
}

}  // namespace minitron::engine::cpu
#endif  // HWY_ONCE
