#include "tests/bench/limits.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "engine/cpu/aligned_buffer.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/bench/limits.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace minitron::bench {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using Tag = hn::CappedTag<float, 16>;

// As far ahead as the panels are fetched (panel_tiles-inl.h): the limit is what can be read, not what a plain loop
// reads.
constexpr int64_t kPrefetchFloats = 6144 / 4;

// Largest of all floats of [data, data + count): every byte is loaded once.
float ReadAll(const float* data, int64_t count) {
  const Tag tag;
  constexpr int kChains = 8;
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  hn::Vec<Tag> largest[kChains];
  for (auto& v : largest) v = hn::Zero(tag);
  for (int64_t i = 0; i + kChains * lanes <= count; i += kChains * lanes) {
    for (int c = 0; c < kChains; ++c) {
      hwy::Prefetch(data + i + c * lanes + kPrefetchFloats);
      largest[c] = hn::Max(largest[c], hn::Load(tag, data + i + c * lanes));
    }
  }
  for (int c = 1; c < kChains; ++c) largest[0] = hn::Max(largest[0], largest[c]);
  return hn::GetLane(hn::MaxOfLanes(tag, largest[0]));
}

// `rounds` fused multiply-adds in each of 12 independent chains of vectors; returns the flops done through `flops`.
float FmaChains(int64_t rounds, double* flops) {
  const Tag tag;
  constexpr int kChains = 12;
  hn::Vec<Tag> sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = hn::Set(tag, static_cast<float>(c));
  const auto factor = hn::Set(tag, 0.999f), added = hn::Set(tag, 0.001f);
  for (int64_t i = 0; i < rounds; ++i) {
    for (int c = 0; c < kChains; ++c) sums[c] = hn::MulAdd(sums[c], factor, added);
  }
  for (int c = 1; c < kChains; ++c) sums[0] = hn::Add(sums[0], sums[c]);
  *flops = 2.0 * kChains * static_cast<double>(hn::Lanes(tag)) * static_cast<double>(rounds);
  return hn::GetLane(hn::MaxOfLanes(tag, sums[0]));
}

}  // namespace HWY_NAMESPACE
}  // namespace minitron::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace minitron::bench {

HWY_EXPORT(ReadAll);
HWY_EXPORT(FmaChains);

namespace {

constexpr int kRuns = 5;
constexpr int64_t kReadBytes = int64_t{1} << 30;
constexpr int64_t kChunkBytes = 256 << 10;
constexpr int64_t kRounds = 10'000'000;

double SecondsOf(const auto& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

Limits MeasureLimits(engine::cpu::ThreadPool& pool) {
  Limits limits;
  std::atomic<float> sink{0.0f};
  const engine::cpu::AlignedBuffer<float> buffer(kReadBytes / 4);
  madvise(buffer.data(), buffer.num_bytes(), MADV_HUGEPAGE);
  constexpr int64_t kChunk = kChunkBytes / 4;
  pool.ParallelFor(kReadBytes / kChunkBytes, 1, [&](int64_t begin, int64_t end, int) {
    std::fill(buffer.data() + begin * kChunk, buffer.data() + end * kChunk, 1.0f);
  });
  for (int run = 0; run < kRuns; ++run) {
    const double read_s = SecondsOf([&] {
      pool.ParallelFor(kReadBytes / kChunkBytes, 1, [&](int64_t begin, int64_t end, int) {
        sink.store(HWY_DYNAMIC_DISPATCH(ReadAll)(buffer.data() + begin * kChunk, (end - begin) * kChunk));
      });
    });
    limits.read_bytes_per_s = std::max(limits.read_bytes_per_s, static_cast<double>(kReadBytes) / read_s);
    std::atomic<double> total{0.0};
    const double fma_s = SecondsOf([&] {
      pool.ParallelFor(pool.num_threads(), 1, [&](int64_t, int64_t, int) {
        double flops = 0.0;
        sink.store(HWY_DYNAMIC_DISPATCH(FmaChains)(kRounds, &flops));
        total.fetch_add(flops);
      });
    });
    limits.fma_flops_per_s = std::max(limits.fma_flops_per_s, total.load() / fma_s);
  }
  return limits;
}

}  // namespace minitron::bench
#endif  // HWY_ONCE
