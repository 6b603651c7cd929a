// Matrices of 8 or 4 bits per weight as the device reads them: quantized on the host when a model is loaded, multiplied
// by quantized_matmul.cu.
//
// A matrix is cut into tiles of 16 rows (outputs). A tile holds its rows' weights in the order in which the lanes of a
// warp need them as operand A of the mma instruction, then its scales. Rows past the last are zeros.
//   weights  [depth / kChunk][lane][16 bytes], a chunk of 32 inputs (8 bits) or 64 (4 bits)
//   scales   [group][16 rows] bf16; a weight is its number times the scale of its row and group
#pragma once

#include <cstdint>

#include "engine/cuda/device.h"
#include "engine/cuda/kernels.h"

namespace minitron::engine::cuda {

// int8: groups of 64, numbers in [-127, 127]. int4: groups of 32, numbers in [-8, 7]. E4M3: one scale per row.
enum class WeightFormat { kInt8, kInt4, kE4m3 };

inline constexpr int kTileRows = 16;
inline constexpr int kDepthStep = 64;  // depths are multiples of it

HOST_DEVICE constexpr int GroupSize(WeightFormat format, int depth) {
  return format == WeightFormat::kInt8 ? 64 : format == WeightFormat::kInt4 ? 32 : depth;
}
HOST_DEVICE constexpr int64_t TileWeightBytes(WeightFormat format, int depth) {
  return int64_t{kTileRows} * depth / (format == WeightFormat::kInt4 ? 2 : 1);
}
HOST_DEVICE constexpr int64_t TileBytes(WeightFormat format, int depth) {
  return TileWeightBytes(format, depth) + int64_t{2} * kTileRows * (depth / GroupSize(format, depth));
}
HOST_DEVICE constexpr int64_t NumTiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Quantizes one tile of finite weights: `rows` rows (at most 16) of `depth` numbers each, into TileBytes of memory.
// Host only.
void QuantizeTile(WeightFormat format, const float* weights, int rows, int depth, unsigned char* tile);
// A tile of rows that are in E4M3 already: the codes stay as they are, the scales are rounded to bf16. Host only.
void PackE4m3Tile(const uint8_t* codes, const float* scales, int rows, int depth, unsigned char* tile);

// One row for products in E4M3: the nearest codes to values / scale. Returns the scale: the largest magnitude / 448.
// Host only.
float QuantizeE4m3Row(const float* values, int64_t count, uint8_t* codes);
// The value of a code; NaN for the two codes that are no number. Host only.
float E4m3Value(uint8_t code);

// out = x * w^T, or out += x * w^T, sums in fp32 in one order per output whatever the number of rows.
//   x [rows, depth], out [rows, outs]
// `tiles`: NumTiles(outs) tiles. Requires: depth a multiple of kDepthStep.
cudaError_t QuantizedMatMul(WeightFormat format, const Bf16* x, const unsigned char* tiles, int rows, int outs,
                            int depth, Store store, Bf16* out, LaunchStream stream);
cudaError_t QuantizedMatMul(WeightFormat format, const Bf16* x, const unsigned char* tiles, int rows, int outs,
                            int depth, float* out, LaunchStream stream);

}  // namespace minitron::engine::cuda
