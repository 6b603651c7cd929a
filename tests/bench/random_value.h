// The numbers random checkpoints are made of: a function of (seed, index), so that any part can be made on its own, by
// a file's writer as by a kernel, with the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MINITRON_BOTH_SIDES __host__ __device__
#else
#define MINITRON_BOTH_SIDES
#endif

namespace minitron::bench {

// Uniform in [-scale, scale), on a grid of 2^-15, rounded to bf16; its bits.
MINITRON_BOTH_SIDES inline uint16_t RandomBf16Value(uint64_t seed, uint64_t index, float scale) {
  uint64_t z = seed + index * 0x9E3779B97F4A7C15u;  // splitmix64 of the index
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  const auto grid = static_cast<int32_t>(z >> 48) - 32768;
  const float value = static_cast<float>(grid) * 0x1.0p-15f * scale;
  uint32_t bits = 0;
  memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace minitron::bench
