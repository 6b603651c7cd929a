// What kernels on rows of bf16 share: eight at a time, the activation, and rows brought to E4M3, each with its largest
// magnitude / 448 as its scale, one block per row.
#pragma once

#include "engine/cuda/e4m3.cuh"

namespace minitron::engine::cuda {

// Eight bf16 as floats.
DEVICE void Unpack(const Vector16& vector, float (&values)[8]) {
  UNROLL
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = LowHalf(vector.words[i]);
    values[2 * i + 1] = HighHalf(vector.words[i]);
  }
}
DEVICE Vector16 Pack(const float (&values)[8]) {
  Vector16 vector;
  UNROLL
  for (int i = 0; i < 4; ++i) vector.words[i] = PackBf16(values[2 * i], values[2 * i + 1]);
  return vector;
}

// max(x, 0)^2 of eight bf16, rounded to bf16.
DEVICE Vector16 SquaredReluOf(const Vector16& vector) {
  float values[8];
  Unpack(vector, values);
  UNROLL
  for (int j = 0; j < 8; ++j) {
    const float positive = values[j] < 0.0f ? 0.0f : values[j];  // NaN stays: a broken row must be reported
    values[j] = positive * positive;
  }
  return Pack(values);
}

// Collects a row's largest magnitude, each thread over its own part.
struct RowScale {
  float largest = 0.0f;
  bool broken = false;  // a value is not finite

  DEVICE void Add(const Vector16& vector) {
    float values[8];
    Unpack(vector, values);
    UNROLL
    for (int j = 0; j < 8; ++j) {
      const float magnitude = BitsToFloat(FloatBits(values[j]) & 0x7FFFFFFFu);
      broken = broken || NotFinite(values[j]);
      largest = magnitude > largest ? magnitude : largest;
    }
  }

  // Stores the row's scale and returns what values are to be multiplied by. A broken row's scale is NaN and its factor
  // NaN: see StoreCodes. All threads of the block; scratch [2 * kWarps], which nobody may be reading any more.
  template <int kWarps>
  DEVICE float Finish(float* scratch, float* scale) {
    UNROLL
    for (int mask = 16; mask > 0; mask /= 2) {
      const float other = ShuffleXor(largest, mask);
      largest = other > largest ? other : largest;
    }
    broken = Any(broken);
    if (Lane() == 0) {
      scratch[WarpIndex()] = largest;
      scratch[kWarps + WarpIndex()] = broken ? 1.0f : 0.0f;
    }
    SyncThreads();
    UNROLL
    for (int w = 0; w < kWarps; ++w) {
      largest = scratch[w] > largest ? scratch[w] : largest;
      broken = broken || scratch[kWarps + w] != 0.0f;
    }
    const float nan = BitsToFloat(0x7FC00000u);
    if (ThreadIndex().x == 0) *scale = broken ? nan : largest / kMaxE4m3;
    return broken ? nan : largest > 0.0f ? kMaxE4m3 / largest : 0.0f;
  }
};

// Eight values times `inverse` as codes; zeros if it is NaN. `codes` is 8-byte aligned.
DEVICE void StoreCodes(const Vector16& vector, float inverse, uint8_t* codes) {
  float values[8];
  Unpack(vector, values);
  const bool broken = NotFinite(inverse);
  uint32_t bytes[2] = {};
  UNROLL
  for (int j = 0; j < 8; ++j) bytes[j / 4] |= (broken ? 0u : EncodeE4m3(values[j] * inverse)) << (8 * (j % 4));
  uint32_t* destination = reinterpret_cast<uint32_t*>(codes);
  destination[0] = bytes[0];
  destination[1] = bytes[1];
}

}  // namespace minitron::engine::cuda
