#include "engine/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "engine/base/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/cpu/attention.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
// After highway.h.
#include "hwy/contrib/math/math-inl.h"

#ifndef MINITRON_ENGINE_CPU_ATTENTION_RANGE_
#define MINITRON_ENGINE_CPU_ATTENTION_RANGE_
namespace minitron::engine::cpu {

// One token row, one kv head and one range of positions: the queries of its group, and where keys and values are.
struct AttentionRange {
  const KvCache* cache;
  int layer;
  int head;  // key/value head
  int group_size;
  int64_t first_key;  // a multiple of kAttentionRange
  int64_t end_key;    // at most first_key + kAttentionRange, at most the row's position + 1
  const BlockId* block_ids;
  const float* queries;  // [group_size, head_dim]
  float* scores;         // [group_size, kAttentionRange]
  float* partial;        // the range's result: [group_size, head_dim] values, [group_size] maxima, [group_size] sums
};

}  // namespace minitron::engine::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace minitron::engine::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// A vector of cache elements as fp32.
template <class Tag>
HWY_INLINE hn::Vec<Tag> LoadElements(Tag tag, const float* p) {
  return hn::LoadU(tag, p);
}
template <class Tag>
HWY_INLINE hn::Vec<Tag> LoadElements(Tag tag, const uint16_t* p) {
  const hn::Rebind<uint16_t, Tag> narrow;
  const hn::RebindToUnsigned<Tag> wide;
  return hn::BitCast(tag, hn::ShiftLeft<16>(hn::PromoteTo(wide, hn::LoadU(narrow, p))));
}

// scores[v][h, key] = q[h] . K[key] * scale for kHeads heads and kKeyVectors vectors of keys, which start at keys[v];
// next[v] are fetched meanwhile. Every block is a page of its own to the processor's prefetcher, which starts anew on
// it.
template <int kHeads, int kKeyVectors, class Tag, typename Element>
HWY_INLINE void ScoreTile(Tag tag, const float* queries, const Element* const* keys, const Element* const* next,
                          int64_t head_dim, int64_t block_size, float scale, float* const* scores) {
  constexpr int64_t kLine = 64 / sizeof(Element);
  hn::Vec<Tag> sums[kHeads][kKeyVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kKeyVectors; ++v) sums[h][v] = hn::Zero(tag);
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    if (d * block_size % kLine == 0) {
      for (int v = 0; v < kKeyVectors; ++v) hwy::Prefetch(next[v] + d * block_size);
    }
    hn::Vec<Tag> key[kKeyVectors];
    for (int v = 0; v < kKeyVectors; ++v) key[v] = LoadElements(tag, keys[v] + d * block_size);
    for (int h = 0; h < kHeads; ++h) {
      const auto query = hn::Set(tag, queries[h * head_dim + d]);
      for (int v = 0; v < kKeyVectors; ++v) sums[h][v] = hn::MulAdd(query, key[v], sums[h][v]);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kKeyVectors; ++v) {
      hn::StoreU(hn::Mul(sums[h][v], hn::Set(tag, scale)), tag, scores[v] + h * kAttentionRange);
    }
  }
}

// Scores of the range's keys for kHeads heads from `first_head`. Lanes past end_key hold scores of stale keys: not
// used.
template <int kHeads, typename Element, class Tag>
HWY_INLINE void ScoreHeads(Tag tag, const AttentionRange& range, int first_head) {
  // 8 or 12 chains hide the latency of a multiply-add and fit AVX2's 16 registers.
  constexpr int kKeyVectors = kHeads > 2 ? 2 : 4;
  const KvCacheShape& shape = range.cache->shape();
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  const float* queries = range.queries + int64_t{first_head} * shape.head_dim;
  const int64_t vectors = (range.end_key - range.first_key + lanes - 1) / lanes;
  // Vector i of the range's keys; the last one for those behind it.
  const auto key_vector = [&](int64_t i) {
    const int64_t key = range.first_key + std::min(i, vectors - 1) * lanes;
    return range.cache->KeyBlock<Element>(range.layer, range.block_ids[key / shape.block_size], range.head) +
           key % shape.block_size;
  };
  const Element* keys[kKeyVectors];
  const Element* next[kKeyVectors];
  float* scores[kKeyVectors];
  const auto load = [&](int64_t first) {
    for (int v = 0; v < kKeyVectors; ++v) {
      keys[v] = key_vector(first + v);
      next[v] = key_vector(first + kKeyVectors + v);
      scores[v] = range.scores + first_head * kAttentionRange + (first + v) * lanes;
    }
  };
  int64_t i = 0;
  for (; i + kKeyVectors <= vectors; i += kKeyVectors) {
    load(i);
    ScoreTile<kHeads, kKeyVectors>(tag, queries, keys, next, shape.head_dim, shape.block_size, scale, scores);
  }
  load(i);
  for (int v = 0; i + v < vectors; ++v) {
    ScoreTile<kHeads, 1>(tag, queries, keys + v, next + v, shape.head_dim, shape.block_size, scale, scores + v);
  }
}

// scores[0 .. count) become exp(score - max); returns their sum.
template <class Tag>
HWY_INLINE float ExpAndSum(Tag tag, float* scores, int64_t count, float* max) {
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
  *max = maximum;
  return hn::GetLane(hn::SumOfLanes(tag, sums));
}

// partial[h, dims] = sum_key weights[h, key] * V[key, dims] for kVectors vectors of dims from `d`.
template <int kHeads, int kVectors, typename Element, class Tag>
HWY_INLINE void ValueTile(Tag tag, const AttentionRange& range, int first_head, int64_t d) {
  const KvCacheShape& shape = range.cache->shape();
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  const float* weights = range.scores + first_head * kAttentionRange;
  hn::Vec<Tag> totals[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int n = 0; n < kVectors; ++n) totals[h][n] = hn::Zero(tag);
  }
  const int64_t last_block = (range.end_key - 1) / shape.block_size;
  const auto block_values = [&](int64_t block) {
    return range.cache->ValueBlock<Element>(range.layer, range.block_ids[std::min(block, last_block)], range.head) + d;
  };
  constexpr int64_t kLine = 64 / sizeof(Element);
  for (int64_t key = range.first_key; key < range.end_key;) {
    const Element* values = block_values(key / shape.block_size);
    const Element* next = block_values(key / shape.block_size + 1);
    const int64_t block_end = std::min<int64_t>(key + shape.block_size, range.end_key);
    for (; key < block_end; ++key, values += shape.head_dim, next += shape.head_dim, ++weights) {
      for (int64_t n = 0; n < kVectors * lanes; n += kLine) hwy::Prefetch(next + n);
      hn::Vec<Tag> value[kVectors];
      for (int n = 0; n < kVectors; ++n) value[n] = LoadElements(tag, values + n * lanes);
      for (int h = 0; h < kHeads; ++h) {
        const auto weight = hn::Set(tag, weights[h * kAttentionRange]);
        for (int n = 0; n < kVectors; ++n) totals[h][n] = hn::MulAdd(weight, value[n], totals[h][n]);
      }
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    float* out = range.partial + int64_t{first_head + h} * shape.head_dim + d;
    for (int n = 0; n < kVectors; ++n) hn::StoreU(totals[h][n], tag, out + n * lanes);
  }
}

template <int kHeads, typename Element, class Tag>
HWY_INLINE void AttendHeads(Tag tag, const AttentionRange& range, int first_head) {
  const int64_t head_dim = range.cache->shape().head_dim;
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  ScoreHeads<kHeads, Element>(tag, range, first_head);
  float* maxima = range.partial + range.group_size * head_dim;
  float* sums = maxima + range.group_size;
  for (int h = first_head; h < first_head + kHeads; ++h) {
    sums[h] = ExpAndSum(tag, range.scores + h * kAttentionRange, range.end_key - range.first_key, &maxima[h]);
  }
  // As many vectors of dims at a time as there are registers for, or the values are read again and again: 6 heads x 4
  // vectors are 24 of AVX-512's 32 registers, 6 x 2 are 12 of AVX2's 16.
  constexpr int kMost = HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86 ? 24 : 12;
  constexpr int kWide = kHeads * 8 <= kMost ? 8 : 4;
  int64_t d = 0;
  if constexpr (kHeads * kWide <= kMost) {
    for (; d + kWide * lanes <= head_dim; d += kWide * lanes) {
      ValueTile<kHeads, kWide, Element>(tag, range, first_head, d);
    }
  }
  for (; d + 2 * lanes <= head_dim; d += 2 * lanes) ValueTile<kHeads, 2, Element>(tag, range, first_head, d);
  for (; d + lanes <= head_dim; d += lanes) ValueTile<kHeads, 1, Element>(tag, range, first_head, d);
  for (; d < head_dim; ++d) ValueTile<kHeads, 1, Element>(hn::CappedTag<float, 1>(), range, first_head, d);
}

template <typename Element, class Tag>
HWY_INLINE void AttendGroup(Tag tag, const AttentionRange& range) {
  int head = 0;
  for (; head + 6 <= range.group_size; head += 6) AttendHeads<6, Element>(tag, range, head);  // the family's group
  for (; head + 4 <= range.group_size; head += 4) AttendHeads<4, Element>(tag, range, head);
  for (; head + 2 <= range.group_size; head += 2) AttendHeads<2, Element>(tag, range, head);
  for (; head < range.group_size; ++head) AttendHeads<1, Element>(tag, range, head);
}

template <class Tag>
HWY_INLINE void AttendElements(Tag tag, const AttentionRange& range) {
  if (range.cache->shape().type == KvCacheType::kBf16) {
    AttendGroup<uint16_t>(tag, range);
  } else {
    AttendGroup<float>(tag, range);
  }
}

void AttendRange(const AttentionRange& range) {
  const hn::ScalableTag<float> tag;
  if (static_cast<int64_t>(hn::Lanes(tag)) <= range.cache->shape().block_size) {
    AttendElements(tag, range);
  } else {
    AttendElements(hn::CappedTag<float, 8>(), range);  // the smallest block: 8 tokens
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace minitron::engine::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace minitron::engine::cpu {

HWY_EXPORT(AttendRange);

AttentionScratch::AttentionScratch(int group_size, int head_dim, int max_context_tokens, int num_threads)
    : scores_floats_(group_size * kAttentionRange),
      partial_floats_(int64_t{group_size} * (head_dim + 2)),
      max_ranges_((max_context_tokens + kAttentionRange - 1) / kAttentionRange),
      split_items_(int64_t{4} * num_threads),
      scores_(scores_floats_ * num_threads),
      partials_(split_items_ * max_ranges_ * partial_floats_) {}

namespace {

// out[h] = sum_r values_r[h] * w_r / sum_r sums_r[h] * w_r, w_r = exp(max_r - max over r), r in order.
void MergeRanges(const float* partials, int64_t num_ranges, int64_t partial_floats, int group_size, int64_t head_dim,
                 float* out) {
  for (int h = 0; h < group_size; ++h) {
    const float* maxima = partials + group_size * head_dim + h;
    float maximum = maxima[0];
    for (int64_t r = 1; r < num_ranges; ++r) maximum = std::max(maximum, maxima[r * partial_floats]);
    float* row = out + h * head_dim;
    std::fill_n(row, head_dim, 0.0f);
    float total = 0.0f;
    for (int64_t r = 0; r < num_ranges; ++r) {
      const float weight = std::exp(maxima[r * partial_floats] - maximum);
      total += maxima[r * partial_floats + group_size] * weight;
      const float* values = partials + r * partial_floats + h * head_dim;
      for (int64_t d = 0; d < head_dim; ++d) row[d] += values[d] * weight;
    }
    for (int64_t d = 0; d < head_dim; ++d) row[d] /= total;
  }
}

}  // namespace

void PagedAttention(ThreadPool& pool, const BatchView& batch, const int32_t* token_sequence, const KvCache& cache,
                    int layer, int group_size, MatrixView<const float> q, MatrixView<float> out,
                    const AttentionScratch& scratch) {
  const KvCacheShape& shape = cache.shape();
  CHECK(q.rows == batch.num_tokens && out.rows == q.rows && out.cols == q.cols);
  CHECK(q.cols == int64_t{shape.num_heads} * group_size * shape.head_dim);
  const int64_t items = q.rows * shape.num_heads;  // (row, kv head)
  const auto num_ranges = [&](int64_t item) { return batch.positions[item / shape.num_heads] / kAttentionRange + 1; };
  const auto attend = [&](int64_t item, int64_t r, int thread, float* partial) {
    const int64_t t = item / shape.num_heads;
    const int head = static_cast<int>(item % shape.num_heads);
    HWY_DYNAMIC_DISPATCH(AttendRange)
    ({.cache = &cache,
      .layer = layer,
      .head = head,
      .group_size = group_size,
      .first_key = r * kAttentionRange,
      .end_key = std::min<int64_t>((r + 1) * kAttentionRange, int64_t{batch.positions[t]} + 1),
      .block_ids = batch.block_ids + batch.block_start[token_sequence[t]],
      .queries = q.row(t) + int64_t{head} * group_size * shape.head_dim,
      .scores = scratch.scores(thread),
      .partial = partial});
  };
  const auto merge = [&](int64_t item, const float* partials) {
    float* row = out.row(item / shape.num_heads) + item % shape.num_heads * group_size * shape.head_dim;
    MergeRanges(partials, num_ranges(item), scratch.partial_floats(), group_size, shape.head_dim, row);
  };
  // Short contexts are cheap: give a thread a few heads at a time, long ones one.
  int32_t longest = 1;
  for (int s = 0; s < batch.num_sequences; ++s) longest = std::max(longest, batch.kv_lens[s]);
  if (items <= scratch.split_items() && longest > kAttentionRange && pool.num_threads() > 1) {
    const int64_t most = (longest + kAttentionRange - 1) / kAttentionRange;
    pool.ParallelFor(items * most, 1, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t item = i / most, r = i % most;
        if (r < num_ranges(item)) attend(item, r, thread, scratch.partials(item) + r * scratch.partial_floats());
      }
    });
    for (int64_t item = 0; item < items; ++item) merge(item, scratch.partials(item));
    return;
  }
  constexpr int64_t kMinWork = 64 << 10;  // multiply-adds; see MatMul
  const int64_t grain = std::max<int64_t>(1, kMinWork / (int64_t{2} * longest * group_size * shape.head_dim));
  pool.ParallelFor(items, grain, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t item = begin; item < end; ++item) {
      float* partials = scratch.partials(thread);
      for (int64_t r = 0; r < num_ranges(item); ++r) attend(item, r, thread, partials + r * scratch.partial_floats());
      merge(item, partials);
    }
  });
}

}  // namespace minitron::engine::cpu
#endif  // HWY_ONCE
