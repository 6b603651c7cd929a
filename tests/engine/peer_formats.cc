#include "tests/engine/peer_formats.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "engine/base/check.h"

namespace minitron::engine {
namespace {

// To fp16, half to even, subnormal numbers too; scales are far from its largest number.
float RoundToF16(float value) {
  int exponent = 0;
  std::frexp(value, &exponent);
  const float quantum = std::ldexp(1.0f, std::max(exponent, -13) - 11);
  return std::nearbyint(value / quantum) * quantum;
}

template <typename RoundBlock>
void ForBlocks(float* data, int64_t count, const RoundBlock& round_block) {
  CHECK(count % kPeerBlock == 0);
  for (int64_t i = 0; i < count; i += kPeerBlock) round_block(data + i);
}

// The number of the block with the largest magnitude, the first of equals.
float Extreme(const float* block) {
  return *std::max_element(block, block + kPeerBlock, [](float a, float b) { return std::abs(a) < std::abs(b); });
}

}  // namespace

void RoundThroughQ80(float* data, int64_t count) {
  ForBlocks(data, count, [](float* block) {
    const float scale = std::abs(Extreme(block)) / 127.0f;
    const float inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
    for (int64_t i = 0; i < kPeerBlock; ++i) block[i] = std::round(block[i] * inverse) * RoundToF16(scale);
  });
}

void RoundThroughQ40(float* data, int64_t count) {
  ForBlocks(data, count, [](float* block) {
    const float scale = Extreme(block) / -8.0f;
    const float inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
    for (int64_t i = 0; i < kPeerBlock; ++i) {
      const float code = std::min(15.0f, std::trunc(block[i] * inverse + 8.5f));
      block[i] = (code - 8.0f) * RoundToF16(scale);
    }
  });
}

void RoundThroughBf16(float* data, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = std::bit_cast<uint32_t>(data[i]);
    data[i] = std::bit_cast<float>((bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u);
  }
}

}  // namespace minitron::engine
