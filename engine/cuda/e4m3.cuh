// E4M3: a sign, four bits of exponent, three of mantissa; 448 is the largest value. A row of the KV cache (one token's
// key or value of one head) is kept in it with a power of two of its own, its exponent: the mantissa is what costs
// accuracy, so a power of two serves as well as any scale, and taking it back is exact in bf16.
#pragma once

#include "engine/cuda/device.h"

namespace minitron::engine::cuda {

inline constexpr int kMinRowExponent = -100;
inline constexpr int kMaxRowExponent = 7;  // 448 * 2^7; a row with more in it is cut there
inline constexpr int kBrokenRow = -128;    // the exponent of a row that is not finite: all of it reads as NaN
inline constexpr float kMaxE4m3 = 448.0f;

#if defined(DEVICE)

// The exponent a row with this largest magnitude is kept with: the smallest with which nothing is cut.
DEVICE int RowExponent(float largest) {
  const uint32_t bits = FloatBits(largest);
  const int power = static_cast<int>(bits >> 23) - 127;
  const int exponent = power - 8 + ((bits & 0x7FFFFFu) > 0x600000u ? 1 : 0);  // 448 = 1.75 * 2^8
  return exponent < kMinRowExponent ? kMinRowExponent : exponent > kMaxRowExponent ? kMaxRowExponent : exponent;
}
// 2^-exponent.
DEVICE float InverseOfExponent(int exponent) { return BitsToFloat(static_cast<uint32_t>(127 - exponent) << 23); }

// Rounded to nearest even; cut at 448. Requires: finite.
DEVICE uint32_t EncodeE4m3(float x) {
  const uint32_t sign = FloatBits(x) >> 24 & 0x80u;
  float magnitude = BitsToFloat(FloatBits(x) & 0x7FFFFFFFu);
  magnitude = magnitude > kMaxE4m3 ? kMaxE4m3 : magnitude;
  if (magnitude < 0x1.0p-6f) {
    // Multiples of 2^-9: adding 2^14, whose unit in the last place that is, rounds. 8 of them are the first normal.
    return sign | (FloatBits(magnitude + 0x1.0p14f) & 0xFu);
  }
  const uint32_t bits = FloatBits(magnitude);
  return sign | (((bits + 0x7FFFFu + (bits >> 20 & 1u)) >> 20) - (120u << 3));
}

// What decoded bytes are multiplied by, as a pair of bf16. The byte's bits, moved into place, are a bf16 2^120 too
// small.
DEVICE uint32_t DecodingScale(int exponent) {
  const uint32_t scale = exponent == kBrokenRow ? 0x7FC0u : static_cast<uint32_t>(127 + 120 + exponent) << 7;
  return scale | scale << 16;
}
// Four bytes as four bf16 (two pairs), exactly.
DEVICE void DecodeE4m3(uint32_t bytes, uint32_t scale, uint32_t& low, uint32_t& high) {
  const auto decode = [scale](uint32_t pair) {
    return MultiplyBf16Pair((pair & 0x00800080u) << 8 | (pair & 0x007F007Fu) << 4, scale);
  };
  low = decode((bytes & 0xFFu) | (bytes & 0xFF00u) << 8);
  high = decode((bytes >> 16 & 0xFFu) | (bytes >> 8 & 0xFF0000u));
}

#endif  // DEVICE

}  // namespace minitron::engine::cuda
