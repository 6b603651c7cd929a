// Weight element conversions, exact: every bf16 and f16 value is an fp32 value.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "engine/tensor.h"

namespace minitron::engine {

inline float Bf16ToFloat(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Rounded to nearest even; NaN stays NaN.
inline uint16_t FloatToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (!std::isfinite(value)) return static_cast<uint16_t>(bits >> 16 | (std::isnan(value) ? 0x40u : 0u));
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

inline float F16ToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1Fu;
  const uint32_t mantissa = bits & 0x3FFu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1.0p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const uint32_t wide_exponent = exponent == 0x1Fu ? 0xFFu : exponent + (127 - 15);
  return std::bit_cast<float>(sign | wide_exponent << 23 | mantissa << 13);
}

// out[i] = weights[offset + i] for `count` elements of bf16, f16 or f32.
inline void WeightsToFloat(const WeightView& weights, int64_t offset, int64_t count, float* out) {
  if (weights.dtype == DType::kF32) {
    std::memcpy(out, static_cast<const float*>(weights.data) + offset, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(weights.data) + offset;
  if (weights.dtype == DType::kBf16) {
    for (int64_t i = 0; i < count; ++i) out[i] = Bf16ToFloat(bits[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = F16ToFloat(bits[i]);
  }
}

}  // namespace minitron::engine
