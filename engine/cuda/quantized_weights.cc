#include "engine/cuda/quantized_weights.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "engine/base/check.h"
#include "engine/convert.h"
#include "engine/cuda/e4m3.cuh"

namespace minitron::engine::cuda {
namespace {

float Largest(const float* values, int count) {
  float largest = 0.0f;
  for (int i = 0; i < count; ++i) largest = std::max(largest, std::abs(values[i]));
  return largest;
}

// What to multiply by in order to divide by a scale: 0 for scales so small that their reciprocal is no float.
float InverseOf(float scale) {
  const float inverse = 1.0f / scale;
  return std::isfinite(inverse) ? inverse : 0.0f;
}

int Nearest(float value, float inverse, int low, int high) {
  return std::clamp(static_cast<int>(std::lrintf(value * inverse)), low, high);
}

// The bf16 scale of a group of int4: of a few around the largest magnitude / 7.5, the one with the least squared error.
// Below that the largest weights are cut and the many small ones gain.
uint16_t Int4Scale(const float* values, int count) {
  constexpr float kDivisors[] = {7.0f, 7.5f, 8.0f, 8.5f, 9.25f};
  const float largest = Largest(values, count);
  uint16_t best = 0;
  float least = INFINITY;
  for (const float divisor : kDivisors) {
    const uint16_t candidate = FloatToBf16(largest / divisor);
    const float scale = Bf16ToFloat(candidate), inverse = InverseOf(scale);
    float error = 0.0f;
    for (int i = 0; i < count; ++i) {
      const float difference = values[i] - scale * static_cast<float>(Nearest(values[i], inverse, -8, 7));
      error += difference * difference;
    }
    if (error < least) least = error, best = candidate;
  }
  return best;
}

// The nearest code to a value of at most 448; ties to the even code. As EncodeE4m3 of e4m3.cuh.
uint8_t NearestE4m3(float value) {
  const uint32_t sign = std::bit_cast<uint32_t>(value) >> 24 & 0x80u;
  const float magnitude = std::min(std::abs(value), 448.0f);
  if (magnitude < 0x1.0p-6f) {  // multiples of 2^-9, the unit in the last place of 2^14
    return static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(magnitude + 0x1.0p14f) & 0xFu));
  }
  const auto bits = std::bit_cast<uint32_t>(magnitude);
  return static_cast<uint8_t>(sign | (((bits + 0x7FFFFu + (bits >> 20 & 1u)) >> 20) - (120u << 3)));
}

// Where a weight lies among its tile's: operand A has rows lane / 4 and + 8, inputs 2 * (lane % 4) + {0, 1} and + 8.
struct Place {
  int64_t lane;
  int64_t word;  // of the lane's four registers per 16 inputs
  int64_t half;  // of the register
};
Place PlaceOf(int row, int input) { return {row % 8 * 4 + input % 8 / 2, row / 8 + input % 16 / 8 * 2, input % 2}; }

// 8 bits: a chunk of 32 inputs is two steps of 16; a lane's byte is step * 8 + word * 2 + half.
void PutByte(unsigned char* tile, int row, int input, uint8_t value) {
  const Place place = PlaceOf(row, input);
  tile[int64_t{input / 32} * 512 + place.lane * 16 + int64_t{input % 32 / 16} * 8 + place.word * 2 + place.half] =
      value;
}
// 4 bits: a chunk of 64 inputs is four steps, each a 32-bit word; the register's halves are 16 bits apart in it.
void PutNibble(unsigned char* tile, int row, int input, int value) {
  const Place place = PlaceOf(row, input);
  unsigned char* byte = tile + int64_t{input / 64} * 512 + place.lane * 16 + int64_t{input % 64 / 16} * 4 +
                        place.half * 2 + place.word / 2;
  *byte = static_cast<unsigned char>(*byte | (value + 8) << (place.word % 2 * 4));
}

}  // namespace

void QuantizeTile(WeightFormat format, const float* weights, int rows, int depth, unsigned char* tile) {
  CHECK(rows > 0 && rows <= kTileRows && depth % kDepthStep == 0);
  std::memset(tile, 0, static_cast<size_t>(TileBytes(format, depth)));
  const int group = GroupSize(format, depth);
  auto* scales = reinterpret_cast<uint16_t*>(tile + TileWeightBytes(format, depth));
  for (int row = 0; row < kTileRows; ++row) {
    for (int first = 0; first < depth; first += group) {
      // int4's zero is not a zero byte, and 0 * 0 would do, but a defined weight is easier to reason about.
      const float* values = row < rows ? weights + int64_t{row} * depth + first : nullptr;
      uint16_t scale_bits = 0;
      if (values != nullptr) {
        scale_bits = format == WeightFormat::kInt4
                         ? Int4Scale(values, group)
                         : FloatToBf16(Largest(values, group) / (format == WeightFormat::kInt8 ? 127.0f : 448.0f));
      }
      const float scale = Bf16ToFloat(scale_bits), inverse = InverseOf(scale);
      scales[first / group * kTileRows + row] = scale_bits;
      for (int i = 0; i < group; ++i) {
        const float value = values != nullptr ? values[i] : 0.0f;
        switch (format) {
          case WeightFormat::kInt8:
            PutByte(tile, row, first + i, static_cast<uint8_t>(Nearest(value, inverse, -127, 127)));
            break;
          case WeightFormat::kInt4:
            PutNibble(tile, row, first + i, Nearest(value, inverse, -8, 7));
            break;
          case WeightFormat::kE4m3:
            PutByte(tile, row, first + i, NearestE4m3(value * inverse));
            break;
        }
      }
    }
  }
}

void PackE4m3Tile(const uint8_t* codes, const float* scales, int rows, int depth, unsigned char* tile) {
  CHECK(rows > 0 && rows <= kTileRows && depth % kDepthStep == 0);
  std::memset(tile, 0, static_cast<size_t>(TileBytes(WeightFormat::kE4m3, depth)));
  auto* tile_scales = reinterpret_cast<uint16_t*>(tile + TileWeightBytes(WeightFormat::kE4m3, depth));
  for (int row = 0; row < rows; ++row) {
    bool broken = false;
    for (int i = 0; i < depth; ++i) {
      const uint8_t code = codes[int64_t{row} * depth + i];
      broken |= (code & 0x7Fu) == 0x7Fu;
      PutByte(tile, row, i, code);
    }
    constexpr uint16_t kNaN = 0x7FC0;  // the kernel reads that code as a number; the row must not pass for one
    tile_scales[row] = broken ? kNaN : FloatToBf16(scales[row]);
  }
}

float QuantizeE4m3Row(const float* values, int64_t count, uint8_t* codes) {
  const float largest = Largest(values, static_cast<int>(count));
  const float quotient = kMaxE4m3 / largest, inverse = std::isfinite(quotient) ? quotient : 0.0f;
  for (int64_t i = 0; i < count; ++i) codes[i] = NearestE4m3(values[i] * inverse);
  return largest / kMaxE4m3;
}

float E4m3Value(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 0x7Fu) == 0x7Fu) return std::nanf("");
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                        : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return (code & 0x80u) != 0 ? -magnitude : magnitude;
}

}  // namespace minitron::engine::cuda
