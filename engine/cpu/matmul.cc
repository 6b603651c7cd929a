#include "engine/cpu/matmul.h"

#include <algorithm>
#include <cstdint>

#include "engine/base/check.h"
#include "engine/convert.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/cpu/matmul.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace minitron::engine::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using FloatTag = hn::ScalableTag<float>;
using FloatVector = hn::Vec<FloatTag>;

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

HWY_INLINE FloatVector LoadWeights(FloatTag tag, const float* w) { return hn::LoadU(tag, w); }
HWY_INLINE FloatVector LoadWeights(FloatTag tag, const Bf16* w) {
  const hn::Rebind<uint16_t, FloatTag> narrow;
  const hn::RebindToUnsigned<FloatTag> wide;
  const auto bits = hn::LoadU(narrow, reinterpret_cast<const uint16_t*>(w));
  return hn::BitCast(tag, hn::ShiftLeft<16>(hn::PromoteTo(wide, bits)));
}
HWY_INLINE FloatVector LoadWeights(FloatTag tag, const F16* w) {
  const hn::Rebind<hwy::float16_t, FloatTag> narrow;
  return hn::PromoteTo(tag, hn::LoadU(narrow, reinterpret_cast<const hwy::float16_t*>(w)));
}

HWY_INLINE float ToFloat(float w) { return w; }
HWY_INLINE float ToFloat(Bf16 w) { return Bf16ToFloat(w.bits); }
HWY_INLINE float ToFloat(F16 w) { return F16ToFloat(w.bits); }

// The last count < Lanes elements, then zeros. Reading a whole vector could leave the mapped file.
template <typename W>
HWY_NOINLINE FloatVector LoadTail(FloatTag tag, const W* source, int64_t count) {
  HWY_ALIGN float lanes[hn::MaxLanes(tag)] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = ToFloat(source[i]);
  return hn::Load(tag, lanes);
}

// kRows x kOuts dot products of `depth` elements, one accumulator each, so that all tiles sum in the same order.
template <int kRows, int kOuts, typename W>
HWY_INLINE void DotTile(const float* x, const W* w, int64_t depth, float* out, int64_t out_stride) {
  const FloatTag tag;
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  FloatVector sums[kRows][kOuts];
  for (int r = 0; r < kRows; ++r) {
    for (int o = 0; o < kOuts; ++o) sums[r][o] = hn::Zero(tag);
  }
  int64_t i = 0;
  for (; i + lanes <= depth; i += lanes) {
    FloatVector weights[kOuts];
    for (int o = 0; o < kOuts; ++o) weights[o] = LoadWeights(tag, w + o * depth + i);
    for (int r = 0; r < kRows; ++r) {
      const FloatVector inputs = hn::LoadU(tag, x + r * depth + i);
      for (int o = 0; o < kOuts; ++o) sums[r][o] = hn::MulAdd(inputs, weights[o], sums[r][o]);
    }
  }
  if (i < depth) {
    for (int r = 0; r < kRows; ++r) {
      const FloatVector inputs = LoadTail(tag, x + r * depth + i, depth - i);
      for (int o = 0; o < kOuts; ++o) {
        sums[r][o] = hn::MulAdd(inputs, LoadTail(tag, w + o * depth + i, depth - i), sums[r][o]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int o = 0; o < kOuts; ++o) out[r * out_stride + o] = hn::GetLane(hn::SumOfLanes(tag, sums[r][o]));
  }
}

// All outputs [begin, end) of kRows rows.
template <int kRows, typename W>
HWY_INLINE void RowTile(const float* x, const W* w, int64_t depth, int64_t begin, int64_t end, float* out,
                        int64_t out_stride) {
  // Eight accumulators for a single row cover the latency of a fused multiply-add (4 cycles, 2 per cycle); sixteen for
  // four rows are what half of AVX-512's registers hold.
  constexpr int kOuts = kRows == 1 ? 8 : 4;
  int64_t o = begin;
  for (; o + kOuts <= end; o += kOuts) DotTile<kRows, kOuts>(x, w + o * depth, depth, out + o, out_stride);
  for (; o < end; ++o) DotTile<kRows, 1>(x, w + o * depth, depth, out + o, out_stride);
}

template <typename W>
HWY_INLINE void OutputRange(const MatrixView<const float>& x, const W* w, int64_t begin, int64_t end,
                            const MatrixView<float>& out) {
  int64_t r = 0;
  for (; r + 4 <= x.rows; r += 4) RowTile<4>(x.row(r), w, x.cols, begin, end, out.row(r), out.cols);
  for (; r < x.rows; ++r) RowTile<1>(x.row(r), w, x.cols, begin, end, out.row(r), out.cols);
}

void MatMulOutputRange(const MatrixView<const float>& x, const WeightView& w, int64_t begin, int64_t end,
                       const MatrixView<float>& out) {
  switch (w.dtype) {
    case DType::kBf16:
      return OutputRange(x, static_cast<const Bf16*>(w.data), begin, end, out);
    case DType::kF16:
      return OutputRange(x, static_cast<const F16*>(w.data), begin, end, out);
    case DType::kF32:
      return OutputRange(x, static_cast<const float*>(w.data), begin, end, out);
    default:
      CHECK(false);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace minitron::engine::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace minitron::engine::cpu {

HWY_EXPORT(MatMulOutputRange);

void MatMul(ThreadPool& pool, MatrixView<const float> x, const WeightView& w, MatrixView<float> out) {
  CHECK(x.rows == out.rows && x.cols == w.cols && out.cols == w.rows);
  if (x.rows == 0) return;
  // A range is worth a thread's wake-up from about 64 Ki multiply-adds (a few microseconds), and its weights should
  // stay in half of a 512 KiB L2 while all rows pass over them.
  constexpr int64_t kMinWork = 64 << 10;
  constexpr int64_t kMaxWeightBytes = 256 << 10;
  constexpr int64_t kTile = 8;
  const int64_t for_work = kMinWork / (x.rows * x.cols);
  const int64_t for_cache = std::min<int64_t>(32, kMaxWeightBytes / (x.cols * DTypeBytes(w.dtype)));
  const int64_t grain = std::max<int64_t>({for_work, for_cache, 1});
  const int64_t whole_tiles = (grain + kTile - 1) / kTile * kTile;
  pool.ParallelFor(out.cols, whole_tiles, [&](int64_t begin, int64_t end, int) {
    HWY_DYNAMIC_DISPATCH(MatMulOutputRange)(x, w, begin, end, out);
  });
}

}  // namespace minitron::engine::cpu
#endif  // HWY_ONCE
