#include "engine/cpu/quantize_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "engine/base/check.h"
#include "engine/cpu/amx_matmul.h"
#include "engine/cpu/panel_format.h"
#include "engine/cpu/panel_matmul.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/cpu/quantize_rows.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
// After highway.h.
#include "engine/cpu/panel_tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace minitron::engine::cpu {
namespace HWY_NAMESPACE {

using FloatTag = hn::CappedTag<float, 16>;

// max|x[0 .. count)|, or NaN if a value is not finite. Exact, so in any order.
HWY_INLINE float Largest(const float* x, int64_t count) {
  const FloatTag tag;
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  auto largest = hn::Zero(tag);
  auto zeros = hn::Zero(tag);  // x * 0 is NaN unless x is finite
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto values = hn::LoadU(tag, x + i);
    largest = hn::Max(largest, hn::Abs(values));
    zeros = hn::Add(zeros, hn::Mul(values, hn::Zero(tag)));
  }
  float maximum = hn::GetLane(hn::MaxOfLanes(tag, largest));
  float zero = hn::GetLane(hn::SumOfLanes(tag, zeros));
  for (; i < count; ++i) {
    maximum = std::max(maximum, std::abs(x[i]));
    zero += x[i] * 0.0f;
  }
  return zero == 0.0f ? maximum : std::numeric_limits<float>::quiet_NaN();
}

// q[i] = round(x[i] * inverse), `padded` of them, zeros from `count` on. Half to even, in every lane alike.
template <typename Q>
HWY_INLINE void Round(const float* x, int64_t count, int64_t padded, float inverse, Q* q) {
  const FloatTag tag;
  const hn::Rebind<Q, FloatTag> narrow;
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  HWY_ALIGN float tail[hn::MaxLanes(tag)] = {};
  for (int64_t i = 0; i < padded; i += lanes) {
    const float* from = x + i;
    if (i + lanes > count) {
      for (int64_t lane = 0; lane < lanes; ++lane) tail[lane] = i + lane < count ? x[i + lane] : 0.0f;
      from = tail;
    }
    const auto scaled = hn::Mul(hn::LoadU(tag, from), hn::Set(tag, inverse));
    hn::StoreU(hn::DemoteTo(narrow, hn::NearestInt(scaled)), narrow, q + i);
  }
}

struct Scale {
  float scale, inverse;
};

// So small a maximum that its inverse overflows rounds to zero; NaN keeps its scale and zero values.
HWY_INLINE Scale ScaleFor(float largest, float limit) {
  const float inverse = limit / largest;
  if (!(largest > 0.0f) || !std::isfinite(inverse)) return {largest > 0.0f ? 0.0f : largest, 0.0f};
  return {largest / limit, inverse};
}

HWY_INLINE const float* Finite(const Scale& scale, const float* x, const float* zeros) {
  return std::isnan(scale.scale) ? zeros : x;
}

alignas(64) constexpr float kZeros[kInt8Group] = {};

void QuantizeWide(const MatrixView<const float>& x, int64_t begin, int64_t end, const QuantizedRows& out) {
  for (int64_t r = begin; r < end; ++r) {
    const float* row = x.row(r);
    const Scale scale = ScaleFor(Largest(row, x.cols), 32767.0f);
    out.row_scales[r] = scale.scale;
    for (int64_t first = 0, group = 0; first < x.cols; first += kInt8Group, ++group) {
      Round(Finite(scale, row + first, kZeros), std::min(kInt8Group, x.cols - first), kInt8Group, scale.inverse,
            out.wide + (group * x.rows + r) * kInt8Group);
      if (out.for_amx) SplitWideRows(out.wide + (group * x.rows + r) * kInt8Group, 1);
    }
  }
}

// Calls arrange(from, to) for each slice of `slice` inputs of the rows [begin, end); out is [slices, x.rows, slice]. A
// slice that ends early comes with zeros behind it.
template <typename Out, class Arrange>
HWY_INLINE void ForSlices(const MatrixView<const float>& x, int64_t begin, int64_t end, int64_t slice, Out* out,
                          const Arrange& arrange) {
  HWY_ALIGN float tail[kFloatSlice];
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t first = 0; first < x.cols; first += slice) {
      const float* from = x.row(r) + first;
      if (const int64_t count = x.cols - first; count < slice) {
        std::fill(std::copy_n(from, count, tail), tail + slice, 0.0f);
        from = tail;
      }
      arrange(from, out + first * x.rows + r * slice);
    }
  }
}

// What a group of int8 rows becomes, besides its numbers.
struct NarrowGroup {
  float scale;
  int32_t offset;
};

// Quantises the kInt4Group floats at x. The group stays in registers.
HWY_INLINE NarrowGroup QuantizeGroup(const float* x, int8_t* q) {
  const FloatTag tag;
  const hn::RebindToSigned<FloatTag> bits_tag;
  const hn::Rebind<int8_t, FloatTag> narrow;
  constexpr int64_t kLanesHere = hn::MaxLanes(FloatTag()), kVectors = kInt4Group / kLanesHere;
  hn::Vec<FloatTag> values[kVectors];
  auto largest_bits = hn::Zero(bits_tag);  // the bits of |x| are in the order of |x|, infinity and NaN on top
  for (int64_t v = 0; v < kVectors; ++v) {
    values[v] = hn::LoadU(tag, x + v * kLanesHere);
    largest_bits = hn::Max(largest_bits, hn::BitCast(bits_tag, hn::Abs(values[v])));
  }
  const float largest = std::bit_cast<float>(hn::GetLane(hn::MaxOfLanes(bits_tag, largest_bits)));
  const bool finite = std::isfinite(largest);
  const Scale scale = ScaleFor(finite ? largest : std::numeric_limits<float>::quiet_NaN(), 127.0f);
  const auto in_last = hn::Ne(hn::And(hn::Iota(bits_tag, 0), hn::Set(bits_tag, 2)), hn::Zero(bits_tag));
  auto sums = hn::Zero(bits_tag), last_sums = hn::Zero(bits_tag);  // of all, of the last two inputs of each quad
  for (int64_t v = 0; v < kVectors; ++v) {
    const auto value = finite ? values[v] : hn::Zero(tag);
    const auto rounded = hn::NearestInt(hn::Mul(value, hn::Set(tag, scale.inverse)));
    hn::StoreU(hn::DemoteTo(narrow, rounded), narrow, q + v * kLanesHere);
    sums = hn::Add(sums, rounded);
    if constexpr (kSumHalves) last_sums = hn::Add(last_sums, hn::IfThenElseZero(in_last, rounded));
  }
  const int32_t offset = -8 * hn::GetLane(hn::SumOfLanes(bits_tag, sums));
  if constexpr (!kSumHalves) return {scale.scale, offset};
  const int32_t last = -8 * hn::GetLane(hn::SumOfLanes(bits_tag, last_sums));
  return {scale.scale, last * (1 << 16) | ((offset - last) & 0xFFFF)};
}

void QuantizeNarrow(const MatrixView<const float>& x, int64_t begin, int64_t end, const QuantizedRows& out) {
  ForSlices(x, begin, end, kInt4Group, out.narrow, [&](const float* from, int8_t* to) HWY_ATTR {
    const NarrowGroup group = QuantizeGroup(from, to);
    const int64_t at = (to - out.narrow) / kInt4Group;
    out.group_scales[at] = group.scale;
    out.offsets[at] = group.offset;
  });
}

// Rounded to nearest, ties to even; NaN stays NaN. In the upper half of each lane, with something in the lower.
HWY_INLINE auto RoundToBf16(hn::Vec<FloatTag> values) {
  const hn::RebindToUnsigned<FloatTag> tag;
  const auto bits = hn::BitCast(tag, values);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(tag, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(tag, 0x7FFF)));
  const auto quiet = hn::Or(bits, hn::Set(tag, 0x00400000));
  return hn::IfThenElse(hn::RebindMask(tag, hn::IsNaN(values)), quiet, rounded);
}

void RoundToHalves(const MatrixView<const float>& x, int64_t begin, int64_t end, int64_t slice, uint16_t* out) {
  const FloatTag tag;
  const hn::Rebind<uint16_t, FloatTag> narrow;
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  ForSlices(x, begin, end, slice, out, [&](const float* from, uint16_t* to) HWY_ATTR {
    for (int64_t i = 0; i < slice; i += lanes) {
      const auto rounded = RoundToBf16(hn::LoadU(tag, from + i));
      hn::StoreU(hn::TruncateTo(narrow, hn::ShiftRight<16>(rounded)), narrow, to + i);
    }
  });
}

void ArrangeFloats(const MatrixView<const float>& x, int64_t begin, int64_t end, bool round, float* out) {
  const FloatTag tag;
  const hn::RebindToUnsigned<FloatTag> bits_tag;
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  ForSlices(x, begin, end, kFloatSlice, out, [&](const float* from, float* to) HWY_ATTR {
    for (int64_t i = 0; i < kFloatSlice; i += lanes) {
      auto values = hn::LoadU(tag, from + i);
      if (round) values = hn::BitCast(tag, hn::And(RoundToBf16(values), hn::Set(bits_tag, 0xFFFF0000)));
#if HWY_TARGET == HWY_SCALAR
      hn::StoreU(values, tag, to + (i ^ 1));
#else
      hn::StoreU(hn::Shuffle2301(values), tag, to + i);
#endif
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace minitron::engine::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace minitron::engine::cpu {

HWY_EXPORT(QuantizeWide);
HWY_EXPORT(QuantizeNarrow);
HWY_EXPORT(RoundToHalves);
HWY_EXPORT(ArrangeFloats);

namespace {

constexpr int64_t kAmxInputs = 32;

// 32 Ki elements are about 5 microseconds of work: less is not worth a wake-up.
int64_t RowGrain(int64_t cols) { return std::max<int64_t>(1, (32 << 10) / cols); }

// Rows from which AMX is used. For fewer the vector kernels read quantised weights faster, and their bits are the same;
// bf16's are not, so its rows all go one way.
constexpr int64_t AmxFrom(DType dtype) {
  if (dtype == DType::kBf16Panels) return 1;
  return dtype == DType::kInt8Panels ? 8 : 9;
}

// [tiles of 32 inputs, x.rows, 3 parts, 32 inputs]
void SplitRows(const MatrixView<const float>& x, int64_t begin, int64_t end, uint16_t* out) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t first = 0, tile = 0; first < x.cols; first += kAmxInputs, ++tile) {
      SplitFloats(x.row(r) + first, std::min(kAmxInputs, x.cols - first), out + (tile * x.rows + r) * 3 * kAmxInputs);
    }
  }
}

}  // namespace

// 6 bytes a value in AMX's parts of a float, and room for 16 rows of 192 bytes that a tile may read past the end.
QuantizedRowsBuffer::QuantizedRowsBuffer(int64_t max_rows, int64_t max_depth, bool round)
    : round_(round),
      values_(max_rows * CeilDiv(max_depth, kFloatSlice) * kFloatSlice * 3 / 2 + 16 * 192 / 4),
      scales_(max_rows * CeilDiv(max_depth, kInt4Group)),
      offsets_(max_rows * CeilDiv(max_depth, kInt4Group)) {}

void QuantizedRowsBuffer::ArrangeForBf16(ThreadPool& pool, const MatrixView<const float>& x, QuantizedRows& rows) {
  const auto for_rows = [&](const auto& arrange) {
    pool.ParallelFor(x.rows, RowGrain(x.cols), [&](int64_t begin, int64_t end, int) { arrange(begin, end); });
  };
  float* floats = values_.data();
  auto* halves = reinterpret_cast<uint16_t*>(floats);
  if (rows.for_amx) {
    rows.parts = halves;
    rows.num_parts = round_ ? 1 : 3;
    if (round_) {
      for_rows([&](int64_t begin, int64_t end) {
        HWY_DYNAMIC_DISPATCH(RoundToHalves)(x, begin, end, kAmxInputs, halves);
      });
    } else {
      for_rows([&](int64_t begin, int64_t end) { SplitRows(x, begin, end, halves); });
    }
  } else if (round_ && Bf16ProductsUsable()) {
    rows.pairs = halves;
    for_rows([&](int64_t begin, int64_t end) {
      HWY_DYNAMIC_DISPATCH(RoundToHalves)(x, begin, end, kFloatSlice, halves);
    });
  } else {
    rows.floats = floats;
    for_rows([&](int64_t begin, int64_t end) { HWY_DYNAMIC_DISPATCH(ArrangeFloats)(x, begin, end, round_, floats); });
  }
}

QuantizedRows QuantizedRowsBuffer::Quantize(ThreadPool& pool, MatrixView<const float> x, DType dtype) {
  CHECK(x.rows * CeilDiv(x.cols, kFloatSlice) * kFloatSlice * 3 / 2 + 16 * 192 / 4 <= values_.size());
  QuantizedRows rows{.rows = x.rows, .for_amx = x.rows >= AmxFrom(dtype) && AmxUsable()};
  const int64_t grain = RowGrain(x.cols);
  if (dtype == DType::kBf16Panels) {
    ArrangeForBf16(pool, x, rows);
  } else if (dtype == DType::kInt8Panels) {
    rows.wide = reinterpret_cast<int16_t*>(values_.data());
    rows.row_scales = scales_.data();
    pool.ParallelFor(x.rows, grain, [&](int64_t begin, int64_t end, int) {
      HWY_DYNAMIC_DISPATCH(QuantizeWide)(x, begin, end, rows);
    });
  } else {
    CHECK(dtype == DType::kInt4Panels);
    rows.narrow = reinterpret_cast<int8_t*>(values_.data());
    rows.group_scales = scales_.data();
    rows.offsets = offsets_.data();
    pool.ParallelFor(x.rows, grain, [&](int64_t begin, int64_t end, int) {
      HWY_DYNAMIC_DISPATCH(QuantizeNarrow)(x, begin, end, rows);
    });
  }
  return rows;
}

}  // namespace minitron::engine::cpu
#endif  // HWY_ONCE
