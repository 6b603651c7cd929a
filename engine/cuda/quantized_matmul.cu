// Products with matrices of 8 or 4 bits per weight. Weights are the M side of the mma and token rows the N side, 8 per
// instruction, so that a decode step of 8 rows wastes nothing; they are widened to bf16, which holds the numbers of
// every format exactly, in the registers they are loaded to. A warp owns 16 outputs over the whole depth and up to 64
// token rows: one order of summation per output, whatever the number of rows.
#include "engine/cuda/attention.cuh"  // SharedIndex, LoadPair
#include "engine/cuda/e4m3.cuh"
#include "engine/cuda/quantized_weights.h"

namespace minitron::engine::cuda {
namespace {

constexpr int kMatMulWarps = 2;  // 32 outputs: 128 blocks for the 8B's smallest matrix
constexpr int kMatMulThreads = 32 * kMatMulWarps;

// One stage is kDepthStep inputs: each warp's weights and scales, then the rows of x. Stages take turns; all but one
// are under way, which is what keeps the memory busy.
template <WeightFormat kFormat, int kColumnTiles>
struct StageLayout {
  static constexpr int kColumns = 8 * kColumnTiles;
  static constexpr int kWeightBytes = kTileRows * kDepthStep / (kFormat == WeightFormat::kInt4 ? 2 : 1);
  static constexpr int kGroups = kFormat == WeightFormat::kInt8 ? 1 : kFormat == WeightFormat::kInt4 ? 2 : 0;
  static constexpr int kScaleBytes = 2 * kTileRows * kGroups;
  static constexpr int kWarpBytes = kWeightBytes + kScaleBytes;
  static constexpr int kRowsAt = (kMatMulWarps * kWarpBytes + 127) / 128 * 128;
  static constexpr int kBytes = kRowsAt + kColumns * kDepthStep * 2;
  static constexpr int kStages = kColumnTiles == 1 ? 6 : 4;
};

DEVICE void StoreOutput(float value, bool, float* out) { *out = value; }
DEVICE void StoreOutput(float value, bool add, Bf16* out) { *out = ToBf16(add ? value + ToFloat(*out) : value); }

template <WeightFormat kFormat, int kColumnTiles>
DEVICE void LoadWeights(const unsigned char* tile, int depth, int step, unsigned char* stage) {
  using Layout = StageLayout<kFormat, kColumnTiles>;
  const int lane = Lane();
  if (tile == nullptr) return;
  unsigned char* own = stage + WarpIndex() * Layout::kWarpBytes;
  const unsigned char* weights = tile + int64_t{step} * Layout::kWeightBytes;
  UNROLL
  for (int i = 0; i < Layout::kWeightBytes; i += 512) CpAsync16(own + i + lane * 16, weights + i + lane * 16, true);
  if (lane < Layout::kScaleBytes / 16) {
    const unsigned char* scales =
        tile + TileWeightBytes(kFormat, depth) + int64_t{step} * Layout::kScaleBytes + lane * 16;
    CpAsync16(own + Layout::kWeightBytes + lane * 16, scales, true);
  }
}

template <WeightFormat kFormat, int kColumnTiles>
DEVICE void LoadRows(const Bf16* x, int first_row, int rows, int depth, int step, unsigned char* stage) {
  using Layout = StageLayout<kFormat, kColumnTiles>;
  Bf16* columns = reinterpret_cast<Bf16*>(stage + Layout::kRowsAt);
  constexpr int kVectors = kDepthStep / 8;
  for (int i = static_cast<int>(ThreadIndex().x); i < Layout::kColumns * kVectors; i += kMatMulThreads) {
    const int column = i / kVectors, input = i % kVectors * 8;
    const bool valid = first_row + column < rows;
    const int64_t source = valid ? int64_t{first_row + column} * depth + step * kDepthStep + input : 0;
    CpAsync16(columns + SharedIndex<kDepthStep>(column, input), x + source, valid);
  }
}

// Operand A of 16 inputs, step `k` of a stage: a lane's own bytes, widened.
template <WeightFormat kFormat>
DEVICE void WidenWeights(const unsigned char* weights, int k, uint32_t (&a)[4]) {
  const int lane = Lane();
  if constexpr (kFormat == WeightFormat::kInt4) {
    const uint32_t word = reinterpret_cast<const uint32_t*>(weights + lane * 16)[k];
    UNROLL
    for (int i = 0; i < 4; ++i) {
      // 128 + n as bf16, then minus 136: n - 8.
      a[i] = FmaBf16Pair((word >> (4 * i) & 0x000F000Fu) | 0x43004300u, 0x3F803F80u, 0xC308C308u);
    }
  } else {
    const auto* words = reinterpret_cast<const uint32_t*>(weights + k / 2 * 512 + lane * 16 + k % 2 * 8);
    UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = words[i];
      if constexpr (kFormat == WeightFormat::kInt8) {
        const auto widen = [word](int byte) { return static_cast<float>(static_cast<int8_t>(word >> (8 * byte))); };
        a[2 * i] = PackBf16(widen(0), widen(1));
        a[2 * i + 1] = PackBf16(widen(2), widen(3));
      } else {
        DecodeE4m3(word, DecodingScale(0), a[2 * i], a[2 * i + 1]);
      }
    }
  }
}

// The stage's share of the sums.
template <WeightFormat kFormat, int kColumnTiles>
DEVICE void MultiplyStage(const unsigned char* stage, float (&total)[kColumnTiles][4]) {
  using Layout = StageLayout<kFormat, kColumnTiles>;
  constexpr int kSteps = kDepthStep / 16;
  constexpr int kStepsPerGroup = kSteps / (Layout::kGroups == 0 ? 1 : Layout::kGroups);
  const int lane = Lane();
  const unsigned char* weights = stage + WarpIndex() * Layout::kWarpBytes;
  const Bf16* scales = reinterpret_cast<const Bf16*>(weights + Layout::kWeightBytes);
  const Bf16* columns = reinterpret_cast<const Bf16*>(stage + Layout::kRowsAt);
  float sums[kColumnTiles][4];
  UNROLL
  for (int k = 0; k < kSteps; ++k) {
    if (Layout::kGroups > 0 && k % kStepsPerGroup == 0) {
      UNROLL
      for (int i = 0; i < 4 * kColumnTiles; ++i) sums[i / 4][i % 4] = 0.0f;
    }
    uint32_t a[4];
    WidenWeights<kFormat>(weights, k, a);
    UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
      const int column = 8 * n + lane / 4, input = 16 * k + lane % 4 * 2;
      MmaBf16(Layout::kGroups > 0 ? sums[n] : total[n], a, LoadPair(columns + SharedIndex<kDepthStep>(column, input)),
              LoadPair(columns + SharedIndex<kDepthStep>(column, input + 8)));
    }
    if (Layout::kGroups > 0 && k % kStepsPerGroup == kStepsPerGroup - 1) {
      const Bf16* group = scales + k / kStepsPerGroup * kTileRows;
      const float scale[2] = {ToFloat(group[lane / 4]), ToFloat(group[lane / 4 + 8])};
      UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        UNROLL
        for (int i = 0; i < 4; ++i) total[n][i] = FusedMultiplyAdd(sums[n][i], scale[i / 2], total[n][i]);
      }
    }
  }
}

template <WeightFormat kFormat, int kColumnTiles, typename Output>
KERNEL(kMatMulThreads)
QuantizedMatMulKernel(const Bf16* x, const unsigned char* tiles, int rows, int outs, int depth, bool add, Output* out) {
  using Layout = StageLayout<kFormat, kColumnTiles>;
  unsigned char* shared = SharedMemory();
  const int lane = Lane();
  const int first_out = (static_cast<int>(BlockIndex().x) * kMatMulWarps + WarpIndex()) * kTileRows;
  const int first_row = static_cast<int>(BlockIndex().y) * Layout::kColumns;
  // A warp past the last tile takes part in the copies of x and the barriers, and computes with what lies there.
  const unsigned char* tile =
      first_out < outs ? tiles + int64_t{first_out / kTileRows} * TileBytes(kFormat, depth) : nullptr;
  const int num_steps = depth / kDepthStep;
  float total[kColumnTiles][4] = {};
  // Nobody writes weights: they may be under way before the kernels in front are done.
  for (int step = 0; step < Layout::kStages - 1 && step < num_steps; ++step) {
    LoadWeights<kFormat, kColumnTiles>(tile, depth, step, shared + step * Layout::kBytes);
  }
  BeginKernel();
  for (int step = 0; step < Layout::kStages - 1; ++step) {
    if (step < num_steps) {
      LoadRows<kFormat, kColumnTiles>(x, first_row, rows, depth, step, shared + step * Layout::kBytes);
    }
    CpAsyncCommit();
  }
  for (int step = 0; step < num_steps; ++step) {
    CpAsyncWait<Layout::kStages - 2>();
    SyncThreads();  // the stage is there, and nobody reads the one before any more
    const int next = step + Layout::kStages - 1;
    if (next < num_steps) {
      unsigned char* stage = shared + next % Layout::kStages * Layout::kBytes;
      LoadWeights<kFormat, kColumnTiles>(tile, depth, next, stage);
      LoadRows<kFormat, kColumnTiles>(x, first_row, rows, depth, next, stage);
    }
    CpAsyncCommit();
    if (tile != nullptr) {
      MultiplyStage<kFormat, kColumnTiles>(shared + step % Layout::kStages * Layout::kBytes, total);
    }
  }
  if (tile == nullptr) return;
  const Bf16* row_scales = reinterpret_cast<const Bf16*>(tile + TileWeightBytes(kFormat, depth));
  UNROLL
  for (int n = 0; n < kColumnTiles; ++n) {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + 8 * n + lane % 4 * 2 + i % 2, in_tile = lane / 4 + i / 2 * 8;
      if (row >= rows || first_out + in_tile >= outs) continue;
      const float scale = Layout::kGroups > 0 ? 1.0f : ToFloat(row_scales[in_tile]);
      StoreOutput(total[n][i] * scale, add, out + int64_t{row} * outs + first_out + in_tile);
    }
  }
}

template <WeightFormat kFormat, int kColumnTiles, typename Output>
cudaError_t LaunchTiles(const Bf16* x, const unsigned char* tiles, int rows, int outs, int depth, Store store,
                        Output* out, LaunchStream stream) {
  using Layout = StageLayout<kFormat, kColumnTiles>;
  const auto blocks = static_cast<unsigned>((NumTiles(outs) + kMatMulWarps - 1) / kMatMulWarps);
  const auto row_blocks = static_cast<unsigned>((rows + Layout::kColumns - 1) / Layout::kColumns);
  return Launch(&QuantizedMatMulKernel<kFormat, kColumnTiles, Output>, {blocks, row_blocks}, {kMatMulThreads},
                Layout::kStages * Layout::kBytes, stream, x, tiles, rows, outs, depth, store == Store::kAdd, out);
}

template <WeightFormat kFormat, typename Output>
cudaError_t LaunchFormat(const Bf16* x, const unsigned char* tiles, int rows, int outs, int depth, Store store,
                         Output* out, LaunchStream stream) {
  const auto launch = rows <= 8    ? &LaunchTiles<kFormat, 1, Output>
                      : rows <= 32 ? &LaunchTiles<kFormat, 4, Output>
                                   : &LaunchTiles<kFormat, 8, Output>;
  return launch(x, tiles, rows, outs, depth, store, out, stream);
}

template <typename Output>
cudaError_t LaunchMatMul(WeightFormat format, const Bf16* x, const unsigned char* tiles, int rows, int outs, int depth,
                         Store store, Output* out, LaunchStream stream) {
  if (depth % kDepthStep != 0) return cudaErrorInvalidValue;
  switch (format) {
    case WeightFormat::kInt8:
      return LaunchFormat<WeightFormat::kInt8>(x, tiles, rows, outs, depth, store, out, stream);
    case WeightFormat::kInt4:
      return LaunchFormat<WeightFormat::kInt4>(x, tiles, rows, outs, depth, store, out, stream);
    case WeightFormat::kE4m3:
      return LaunchFormat<WeightFormat::kE4m3>(x, tiles, rows, outs, depth, store, out, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t QuantizedMatMul(WeightFormat format, const Bf16* x, const unsigned char* tiles, int rows, int outs,
                            int depth, Store store, Bf16* out, LaunchStream stream) {
  return LaunchMatMul(format, x, tiles, rows, outs, depth, store, out, stream);
}
cudaError_t QuantizedMatMul(WeightFormat format, const Bf16* x, const unsigned char* tiles, int rows, int outs,
                            int depth, float* out, LaunchStream stream) {
  return LaunchMatMul(format, x, tiles, rows, outs, depth, Store::kReplace, out, stream);
}

}  // namespace minitron::engine::cuda
