// Packing of weights into panels, and what quantisation rounds to.
//
// int8: scale = max|w| / 127 of the group, rounded to bf16; q = round(w / scale) in [-127, 127].
// int4: w ~ scale * (q - 8), q in 0..15, scale of either sign, so that the largest weight of the group can be the -8.
//       The scale is the best of a few candidates by squared error, then refined by least squares (for fixed q, the
//       best scale is sum(w q) / sum(q q)). Costs about 40 flops per weight once, and takes a fifth off the error of
//       the plain max / -8.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "engine/base/check.h"
#include "engine/convert.h"
#include "engine/cpu/panel_format.h"

namespace minitron::engine::cpu {
namespace {

constexpr int64_t kHalfOuts = 16;

void PackBf16Panel(const WeightView& source, int64_t panel, uint8_t* destination) {
  CHECK(source.dtype == DType::kBf16);
  const int64_t pairs = CeilDiv(source.cols, 2);
  const int64_t first = panel * kPanelOuts;
  const int64_t outs = std::min(kPanelOuts, source.rows - first);
  const uint16_t* rows = static_cast<const uint16_t*>(source.data) + first * source.cols;
  std::memset(destination, 0, PanelBytes(DType::kBf16Panels, source.cols));
  // In blocks of a few cache lines per row: 32 rows a power of two apart share one set of the L1 cache.
  constexpr int64_t kBlockPairs = 64;
  for (int64_t begin = 0; begin < pairs; begin += kBlockPairs) {
    const int64_t count = std::min(kBlockPairs, pairs - begin);
    for (int64_t o = 0; o < outs; ++o) {
      std::array<uint16_t, 2 * kBlockPairs> block{};
      std::memcpy(block.data(), rows + o * source.cols + 2 * begin,
                  std::min(2 * count, source.cols - 2 * begin) * sizeof(uint16_t));
      for (int64_t pair = 0; pair < count; ++pair) {
        std::memcpy(destination + (begin + pair) * kBf16PairBytes + o * 4, &block[2 * pair], 4);
      }
    }
  }
}

// Four floats, on any target the compiler has vectors for: one order of sums everywhere, so that a cache file made on
// one machine is the one another would make.
constexpr int kWidth = 4;
using Vector = float __attribute__((vector_size(kWidth * sizeof(float))));

template <int64_t kGroup>
using Group = std::array<Vector, kGroup / kWidth>;

// Round to nearest even of |x| < 2^22, without a call.
inline Vector RoundSmall(Vector x) {
  constexpr float kShift = 0x1.8p23f;
  return (x + kShift) - kShift;
}

inline Vector Clamp(Vector x, float low, float high) {
  const Vector lows = Vector{} + low, highs = Vector{} + high;
  x = x < lows ? lows : x;
  return x > highs ? highs : x;
}

inline float Sum(Vector v) { return (v[0] + v[1]) + (v[2] + v[3]); }

// A group that is not finite gets a NaN scale: its outputs say so instead of being quietly wrong.
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The value of largest magnitude, with its sign (the positive one of a tie); NaN if a value is not finite.
template <size_t kVectors>
float LargestWithSign(const std::array<Vector, kVectors>& w) {
  Vector low{}, high{}, zeros{};
  for (const Vector& v : w) {
    low = v < low ? v : low;
    high = v > high ? v : high;
    zeros += v * 0.0f;
  }
  if (Sum(zeros) != 0.0f) return kNan;
  float lowest = 0.0f, highest = 0.0f;
  for (int i = 0; i < kWidth; ++i) {
    lowest = std::min(lowest, low[i]);
    highest = std::max(highest, high[i]);
  }
  return highest >= -lowest ? highest : lowest;
}

// Quantises one group; q gets values in [-127, 127]. Returns the scale, a bf16 value.
float QuantizeInt8Group(const Group<kInt8Group>& w, Group<kInt8Group>& q) {
  q.fill(Vector{});
  const float largest = LargestWithSign(w);
  if (std::isnan(largest)) return kNan;
  const float scale = Bf16ToFloat(FloatToBf16(std::abs(largest) / 127.0f));
  const float inverse = 1.0f / scale;
  if (scale == 0.0f || !std::isfinite(inverse)) return 0.0f;  // nothing, or nothing but subnormals
  for (size_t i = 0; i < w.size(); ++i) q[i] = RoundSmall(Clamp(w[i] * inverse, -127.0f, 127.0f));
  return scale;
}

// q in [-8, 7] for a scale; returns the squared error.
float RoundInt4Group(const Group<kInt4Group>& w, float scale, Group<kInt4Group>& q) {
  const float inverse = 1.0f / scale;
  Vector error{};
  for (size_t i = 0; i < w.size(); ++i) {
    q[i] = RoundSmall(Clamp(w[i] * inverse, -8.0f, 7.0f));
    const Vector difference = w[i] - scale * q[i];
    error += difference * difference;
  }
  return Sum(error);
}

// As QuantizeInt8Group, q in [-8, 7], and the scale may be negative.
float QuantizeInt4Group(const Group<kInt4Group>& w, Group<kInt4Group>& q) {
  q.fill(Vector{});
  const float largest = LargestWithSign(w);
  if (std::isnan(largest)) return kNan;
  if (!std::isnormal(largest / 16.0f) || !std::isfinite(16.0f / largest)) return 0.0f;
  float best_scale = 0.0f;
  float best_error = std::numeric_limits<float>::infinity();
  Group<kInt4Group> trial;
  const auto consider = [&](float scale) {
    scale = Bf16ToFloat(FloatToBf16(scale));
    const float error = RoundInt4Group(w, scale, trial);
    if (error >= best_error) return;
    best_error = error;
    best_scale = scale;
    q = trial;
  };
  // The largest becomes -8, or is clipped a little, or the range is mirrored (+7).
  for (const float level : {-8.0f, -7.4f, -8.7f, 7.0f, 7.6f}) consider(largest / level);
  Vector products{}, squares{};
  for (size_t i = 0; i < w.size(); ++i) {
    products += w[i] * q[i];
    squares += q[i] * q[i];
  }
  const float refined = Sum(products) / Sum(squares);
  if (std::isnormal(refined) && std::isfinite(1.0f / refined)) consider(refined);
  return best_scale;
}

// The floats of inputs [begin, begin + group) of output `o`; zero past the ends.
void LoadGroup(const WeightView& source, int64_t o, int64_t begin, int64_t count, float* group) {
  std::fill_n(group, count, 0.0f);
  if (o < source.rows) WeightsToFloat(source, o * source.cols + begin, std::min(count, source.cols - begin), group);
}

void StoreScale(float scale, int64_t o, uint8_t* scales) {
  const uint16_t bits = FloatToBf16(scale);
  std::memcpy(scales + o * 2, &bits, 2);
}

constexpr int64_t Int8Offset(int64_t o, int64_t i) {
  constexpr int kOrder[4] = {0, 2, 1, 3};  // its own inverse
  return o / kHalfOuts * (kHalfOuts * kInt8Group) + i / 4 * (kHalfOuts * 4) + o % kHalfOuts * 4 + kOrder[i % 4];
}

constexpr int64_t Int4Offset(int64_t o, int64_t i) {
  return o / kHalfOuts * (kHalfOuts * kInt4Group / 2) + i / 8 * (kHalfOuts * 4) + o % kHalfOuts * 4 + i % 4;
}

// Returns whether all numbers are finite.
bool PackInt8Panel(const WeightView& source, int64_t panel, uint8_t* block) {
  Group<kInt8Group> w, q;
  bool finite = true;
  for (int64_t begin = 0; begin < source.cols; begin += kInt8Group, block += kInt8BlockBytes) {
    for (int64_t o = 0; o < kPanelOuts; ++o) {
      LoadGroup(source, panel * kPanelOuts + o, begin, kInt8Group, reinterpret_cast<float*>(w.data()));
      const float scale = QuantizeInt8Group(w, q);
      finite = finite && !std::isnan(scale);
      StoreScale(scale, o, block + kPanelOuts * kInt8Group);
      for (int64_t i = 0; i < kInt8Group; ++i) {
        block[Int8Offset(o, i)] = static_cast<uint8_t>(static_cast<int8_t>(q[i / kWidth][i % kWidth]));
      }
    }
  }
  return finite;
}

bool PackInt4Panel(const WeightView& source, int64_t panel, uint8_t* block) {
  Group<kInt4Group> w, q;
  bool finite = true;
  for (int64_t begin = 0; begin < source.cols; begin += kInt4Group, block += kInt4BlockBytes) {
    for (int64_t o = 0; o < kPanelOuts; ++o) {
      LoadGroup(source, panel * kPanelOuts + o, begin, kInt4Group, reinterpret_cast<float*>(w.data()));
      const float scale = QuantizeInt4Group(w, q);
      finite = finite && !std::isnan(scale);
      StoreScale(scale, o, block + kPanelOuts * kInt4Group / 2);
      for (int64_t octet = 0; octet < kInt4Group; octet += 8) {
        for (int64_t j = 0; j < 4; ++j) {
          const int low = static_cast<int>(q[octet / kWidth][j]) + 8;
          const int high = static_cast<int>(q[octet / kWidth + 1][j]) + 8;
          block[Int4Offset(o, octet + j)] = static_cast<uint8_t>(high << 4 | low);
        }
      }
    }
  }
  return finite;
}

// The value at (o, i) of a panel.
float PanelValue(DType dtype, const uint8_t* panel, int64_t o, int64_t i) {
  uint16_t bits = 0;
  if (dtype == DType::kBf16Panels) {
    std::memcpy(&bits, panel + i / 2 * kBf16PairBytes + o * 4 + i % 2 * 2, 2);
    return Bf16ToFloat(bits);
  }
  if (dtype == DType::kInt8Panels) {
    const uint8_t* block = panel + i / kInt8Group * kInt8BlockBytes;
    std::memcpy(&bits, block + kPanelOuts * kInt8Group + o * 2, 2);
    return Bf16ToFloat(bits) * static_cast<float>(static_cast<int8_t>(block[Int8Offset(o, i % kInt8Group)]));
  }
  const uint8_t* block = panel + i / kInt4Group * kInt4BlockBytes;
  std::memcpy(&bits, block + kPanelOuts * kInt4Group / 2 + o * 2, 2);
  const int byte = block[Int4Offset(o, i % kInt4Group)];
  return Bf16ToFloat(bits) * static_cast<float>((i % 8 < 4 ? byte & 15 : byte >> 4) - 8);
}

}  // namespace

bool PackPanel(const WeightView& source, DType dtype, int64_t panel, uint8_t* destination) {
  CHECK(!IsPanels(source.dtype) && panel >= 0 && panel < NumPanels(source.rows));
  switch (dtype) {
    case DType::kBf16Panels:
      PackBf16Panel(source, panel, destination);
      return true;
    case DType::kInt8Panels:
      return PackInt8Panel(source, panel, destination);
    case DType::kInt4Panels:
      return PackInt4Panel(source, panel, destination);
    default:
      CHECK(false);
  }
  return false;
}

void UnpackPanels(const WeightView& packed, float* destination) {
  const int64_t panel_bytes = PanelBytes(packed.dtype, packed.cols);
  for (int64_t o = 0; o < packed.rows; ++o) {
    const uint8_t* panel = static_cast<const uint8_t*>(packed.data) + o / kPanelOuts * panel_bytes;
    for (int64_t i = 0; i < packed.cols; ++i) {
      destination[o * packed.cols + i] = PanelValue(packed.dtype, panel, o % kPanelOuts, i);
    }
  }
}

}  // namespace minitron::engine::cpu
