// Products with matrices of 8 or 4 bits per weight. Weights are the M side of the mma and token rows the N side, 8 per
// instruction, so that a decode step of 8 rows wastes nothing; they are widened to bf16, which holds the numbers of
// every format exactly, in the registers they are loaded to.
//
// One order of summation per output, whatever the number of rows: the depth is cut into kSlices slices at places fixed
// by the depth, each is one chain, the chains of each half of the depth are added in order, then the halves. For few
// rows a block has a warp for each slice, so that the 8B's narrowest matrix, with one block for each processor, still
// has enough copies under way; for more rows a warp takes the slices of one half one after the other.
#include "engine/cuda/attention.cuh"  // SharedIndex
#include "engine/cuda/e4m3.cuh"
#include "engine/cuda/quantized_weights.h"

namespace minitron::engine::cuda {
namespace {

constexpr int kSlices = 8;
constexpr int kHalf = kSlices / 2;
HOST_DEVICE constexpr int SliceBegin(int num_steps, int slice) { return num_steps * slice / kSlices; }

// What a step of kDepthStep inputs brings: a tile's weights and scales, and rows of x.
template <WeightFormat kFormat>
struct WeightStep {
  static constexpr int kWeightBytes = kTileRows * kDepthStep / (kFormat == WeightFormat::kInt4 ? 2 : 1);
  static constexpr int kGroups = kFormat == WeightFormat::kInt8 ? 1 : kFormat == WeightFormat::kInt4 ? 2 : 0;
  static constexpr int kScaleBytes = 2 * kTileRows * kGroups;
  static constexpr int kBytes = kWeightBytes + kScaleBytes;
};
template <int kColumnTiles>
constexpr int kRowStepBytes = 8 * kColumnTiles* kDepthStep * 2;

DEVICE void StoreOutput(float value, bool, float* out) { *out = value; }
DEVICE void StoreOutput(float value, bool add, Bf16* out) { *out = ToBf16(add ? value + ToFloat(*out) : value); }

// Starts copying one tile's step, by the lanes of a warp. Nothing for no tile.
template <WeightFormat kFormat>
DEVICE void LoadWeights(const unsigned char* tile, int depth, int step, unsigned char* to) {
  using Step = WeightStep<kFormat>;
  const int lane = Lane();
  if (tile == nullptr) return;
  const unsigned char* weights = tile + int64_t{step} * Step::kWeightBytes;
  UNROLL
  for (int i = 0; i < Step::kWeightBytes; i += 512) CpAsync16(to + i + lane * 16, weights + i + lane * 16, true);
  if (lane < Step::kScaleBytes / 16) {
    const unsigned char* scales =
        tile + TileWeightBytes(kFormat, depth) + int64_t{step} * Step::kScaleBytes + lane * 16;
    CpAsync16(to + Step::kWeightBytes + lane * 16, scales, true);
  }
}

// Starts copying the step of rows [first_row, ...) of x, zeros past the last, by kThreads threads.
template <int kColumnTiles, int kThreads>
DEVICE void LoadRows(const Bf16* x, int first_row, int rows, int depth, int step, int thread, unsigned char* to) {
  Bf16* columns = reinterpret_cast<Bf16*>(to);
  constexpr int kVectors = kDepthStep / 8;
  for (int i = thread; i < 8 * kColumnTiles * kVectors; i += kThreads) {
    const int column = i / kVectors, input = i % kVectors * 8;
    const bool valid = first_row + column < rows;
    const int64_t source = valid ? int64_t{first_row + column} * depth + step * kDepthStep + input : 0;
    CpAsync16(columns + SharedIndex<kDepthStep>(column, input), x + source, valid);
  }
}

// Operand A of inputs [32 * pair, + 32): two steps of 16, from a lane's own bytes.
template <WeightFormat kFormat>
DEVICE void WidenWeights(const unsigned char* weights, int pair, uint32_t (&a)[2][4]) {
  if constexpr (kFormat == WeightFormat::kInt4) {
    const Vector16 vector = Load16(weights + Lane() * 16);
    UNROLL
    for (int i = 0; i < 8; ++i) {
      // 128 + n as bf16, then minus 136: n - 8.
      const uint32_t word = vector.words[2 * pair + i / 4];
      a[i / 4][i % 4] = FmaBf16Pair((word >> (4 * (i % 4)) & 0x000F000Fu) | 0x43004300u, 0x3F803F80u, 0xC308C308u);
    }
  } else {
    const Vector16 vector = Load16(weights + pair * 512 + Lane() * 16);
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = vector.words[i];
      uint32_t& low = a[i / 2][i % 2 * 2];
      uint32_t& high = a[i / 2][i % 2 * 2 + 1];
      if constexpr (kFormat == WeightFormat::kInt8) {
        const auto widen = [word](int byte) { return static_cast<float>(static_cast<int8_t>(word >> (8 * byte))); };
        low = PackBf16(widen(0), widen(1));
        high = PackBf16(widen(2), widen(3));
      } else {
        DecodeE4m3(word, DecodingScale(0), low, high);
      }
    }
  }
}

// One tile's step times the rows', added to the slice's sums.
template <WeightFormat kFormat, int kColumnTiles>
DEVICE void MultiplyStep(const unsigned char* weights, const unsigned char* rows, float (&total)[kColumnTiles][4]) {
  using Step = WeightStep<kFormat>;
  constexpr int kPairs = kDepthStep / 32;
  constexpr int kPairsPerGroup = kPairs / (Step::kGroups == 0 ? 1 : Step::kGroups);
  const int lane = Lane();
  const Bf16* scales = reinterpret_cast<const Bf16*>(weights + Step::kWeightBytes);
  const Bf16* columns = reinterpret_cast<const Bf16*>(rows);
  float sums[kColumnTiles][4];
  UNROLL
  for (int pair = 0; pair < kPairs; ++pair) {
    if (Step::kGroups > 0 && pair % kPairsPerGroup == 0) {
      UNROLL
      for (int i = 0; i < 4 * kColumnTiles; ++i) sums[i / 4][i % 4] = 0.0f;
    }
    uint32_t a[2][4];
    WidenWeights<kFormat>(weights, pair, a);
    constexpr int kAtOnce = kColumnTiles < 4 ? kColumnTiles : 4;  // more would not fit the registers
    UNROLL
    for (int first = 0; first < kColumnTiles; first += kAtOnce) {
      uint32_t b[kAtOnce][4];
      UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        LoadMatrix4(b[n], columns + SharedIndex<kDepthStep>(8 * (first + n) + lane % 8, 32 * pair + lane / 8 * 8));
      }
      UNROLL
      for (int k = 0; k < 2; ++k) {
        UNROLL
        for (int n = 0; n < kAtOnce; ++n) {
          MmaBf16(Step::kGroups > 0 ? sums[first + n] : total[first + n], a[k], b[n][2 * k], b[n][2 * k + 1]);
        }
      }
    }
    if (Step::kGroups > 0 && pair % kPairsPerGroup == kPairsPerGroup - 1) {
      const Bf16* group = scales + pair / kPairsPerGroup * kTileRows;
      const float scale[2] = {ToFloat(group[lane / 4]), ToFloat(group[lane / 4 + 8])};
      UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        UNROLL
        for (int i = 0; i < 4; ++i) total[n][i] = FusedMultiplyAdd(sums[n][i], scale[i / 2], total[n][i]);
      }
    }
  }
}

// The scale of the whole sum, where there is one for each output.
template <WeightFormat kFormat>
DEVICE float OutputScale(const unsigned char* tile, int depth, int row_in_tile) {
  if (WeightStep<kFormat>::kGroups > 0) return 1.0f;
  return ToFloat(reinterpret_cast<const Bf16*>(tile + TileWeightBytes(kFormat, depth))[row_in_tile]);
}

// --- Up to 8 rows: a warp for each slice. ---

constexpr int kFewRows = 8;
constexpr int kFewTiles = 2;  // of a warp: 32 outputs share the rows that were copied
constexpr int kFewOuts = kFewTiles * kTileRows;
constexpr int kFewThreads = 32 * kSlices;
static_assert(kFewThreads == kFewRows * kFewOuts, "in the end a thread has an output");

// A warp's stages take turns; all but one are under way. 98 KiB at most: sm_89 has 99.
template <WeightFormat kFormat>
struct FewLayout {
  static constexpr int kStages = kFormat == WeightFormat::kInt4 ? 5 : 4;
  static constexpr int kRowsAt = kFewTiles * WeightStep<kFormat>::kBytes;
  static constexpr int kStageBytes = kRowsAt + kRowStepBytes<1>;
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static constexpr int kBytes = kSlices * kWarpBytes;
};
constexpr int kSumStride = kFewOuts + 1;  // of a slice's sums, [row][out]: rows start in different banks

template <WeightFormat kFormat, typename Output>
KERNEL(kFewThreads, 2)
FewRowsMatMulKernel(const Bf16* x, const unsigned char* tiles, int rows, int outs, int depth, bool add, Output* out) {
  using Layout = FewLayout<kFormat>;
  const int lane = Lane(), slice = WarpIndex();
  unsigned char* own = SharedMemory() + slice * Layout::kWarpBytes;
  const int first_out = static_cast<int>(BlockIndex().x) * kFewOuts;
  const auto tile_of = [&](int first) {
    return first < outs ? tiles + int64_t{first / kTileRows} * TileBytes(kFormat, depth) : nullptr;
  };
  const unsigned char* tile[kFewTiles];
  UNROLL
  for (int t = 0; t < kFewTiles; ++t) tile[t] = tile_of(first_out + t * kTileRows);
  const int num_steps = depth / kDepthStep, end = SliceBegin(num_steps, slice + 1);
  int step = SliceBegin(num_steps, slice);
  const auto load_weights = [&](int of, int stage) {
    UNROLL
    for (int t = 0; t < kFewTiles; ++t) {
      unsigned char* to = own + stage * Layout::kStageBytes + t * WeightStep<kFormat>::kBytes;
      LoadWeights<kFormat>(tile[t], depth, of, to);
    }
  };
  const auto load_rows = [&](int of, int stage) {
    LoadRows<1, 32>(x, 0, rows, depth, of, lane, own + stage * Layout::kStageBytes + Layout::kRowsAt);
  };
  // Nobody writes weights: they may be under way before the kernels in front are done.
  for (int i = 0; i < Layout::kStages - 1 && step + i < end; ++i) load_weights(step + i, i);
  BeginKernel();
  for (int i = 0; i < Layout::kStages - 1; ++i) {
    if (step + i < end) load_rows(step + i, i);
    CpAsyncCommit();
  }
  float total[kFewTiles][1][4] = {};
  for (int stage = 0; step < end; ++step, stage = (stage + 1) % Layout::kStages) {
    CpAsyncWait<Layout::kStages - 2>();
    SyncWarp();  // the stage is there, and no lane reads the one before any more
    const int next = step + Layout::kStages - 1, next_stage = (stage + Layout::kStages - 1) % Layout::kStages;
    if (next < end) {
      load_weights(next, next_stage);
      load_rows(next, next_stage);
    }
    CpAsyncCommit();
    const unsigned char* at = own + stage * Layout::kStageBytes;
    UNROLL
    for (int t = 0; t < kFewTiles; ++t) {
      if (tile[t] == nullptr) continue;
      MultiplyStep<kFormat, 1>(at + t * WeightStep<kFormat>::kBytes, at + Layout::kRowsAt, total[t]);
    }
  }
  CpAsyncWait<0>();
  SyncWarp();  // no lane reads the last stage any more
  float* sums = reinterpret_cast<float*>(own);
  UNROLL
  for (int i = 0; i < kFewTiles * 4; ++i) {
    const int row = lane % 4 * 2 + i % 2, in_block = i / 4 * kTileRows + lane / 4 + i % 4 / 2 * 8;
    sums[row * kSumStride + in_block] = total[i / 4][0][i % 4];
  }
  SyncThreads();
  const int in_block = static_cast<int>(ThreadIndex().x) % kFewOuts, output = first_out + in_block;
  const int row = static_cast<int>(ThreadIndex().x) / kFewOuts;
  if (row >= rows || output >= outs) return;
  float halves[2] = {};
  UNROLL
  for (int s = 0; s < kSlices; ++s) {
    halves[s / kHalf] +=
        reinterpret_cast<const float*>(SharedMemory() + s * Layout::kWarpBytes)[row * kSumStride + in_block];
  }
  const float scale = OutputScale<kFormat>(tile_of(output / kTileRows * kTileRows), depth, output % kTileRows);
  StoreOutput((halves[0] + halves[1]) * scale, add, out + int64_t{row} * outs + output);
}

// --- More rows: a warp owns 16 outputs over one half of the depth and up to 64 rows, which its half shares. ---

constexpr int kMatMulWarps = 2;  // of each half. 32 outputs: 128 blocks for the 8B's smallest matrix
constexpr int kHalfThreads = 32 * kMatMulWarps;
constexpr int kMatMulThreads = 2 * kHalfThreads;

// 83 KiB at most for both halves.
template <WeightFormat kFormat, int kColumnTiles>
struct StageLayout {
  static constexpr int kStages = 4;
  static constexpr int kRowsAt = (kMatMulWarps * WeightStep<kFormat>::kBytes + 127) / 128 * 128;
  static constexpr int kBytes = kRowsAt + kRowStepBytes<kColumnTiles>;
  static constexpr int kHalfBytes = kStages * kBytes;
};

// The sums of one warp over its half of the depth. All threads of the block call it alike.
template <WeightFormat kFormat, int kColumnTiles>
DEVICE void SumHalf(const Bf16* x, const unsigned char* tile, int first_row, int rows, int depth, int half,
                    float (&sum)[kColumnTiles][4]) {
  using Layout = StageLayout<kFormat, kColumnTiles>;
  const int num_steps = depth / kDepthStep, thread = static_cast<int>(ThreadIndex().x) % kHalfThreads;
  const int own = WarpIndex() % kMatMulWarps * WeightStep<kFormat>::kBytes;
  unsigned char* ring = SharedMemory() + half * Layout::kHalfBytes;
  int slice = half * kHalf;
  const int begin = SliceBegin(num_steps, slice), end = SliceBegin(num_steps, slice + kHalf);
  const auto stage_of = [&](int step) { return ring + (step - begin) % Layout::kStages * Layout::kBytes; };
  const auto load_rows = [&](int step) {
    unsigned char* to = stage_of(step) + Layout::kRowsAt;
    LoadRows<kColumnTiles, kHalfThreads>(x, first_row, rows, depth, step, thread, to);
  };
  // Nobody writes weights: they may be under way before the kernels in front are done.
  for (int step = begin; step < begin + Layout::kStages - 1 && step < end; ++step) {
    LoadWeights<kFormat>(tile, depth, step, stage_of(step) + own);
  }
  BeginKernel();
  for (int step = begin; step < begin + Layout::kStages - 1; ++step) {
    if (step < end) load_rows(step);
    CpAsyncCommit();
  }
  float total[kColumnTiles][4] = {};
  const int longest = num_steps - SliceBegin(num_steps, kHalf);  // of the halves: the second is never the shorter
  for (int step = begin; step < begin + longest; ++step) {
    CpAsyncWait<Layout::kStages - 2>();
    SyncThreads();  // the stage is there, and nobody reads the one before any more
    const int next = step + Layout::kStages - 1;
    if (next < end) {
      LoadWeights<kFormat>(tile, depth, next, stage_of(next) + own);
      load_rows(next);
    }
    CpAsyncCommit();
    if (tile == nullptr || step >= end) continue;
    MultiplyStep<kFormat, kColumnTiles>(stage_of(step) + own, stage_of(step) + Layout::kRowsAt, total);
    while (SliceBegin(num_steps, slice + 1) <= step) ++slice;  // those without a step
    if (step + 1 != SliceBegin(num_steps, slice + 1)) continue;
    UNROLL
    for (int i = 0; i < 4 * kColumnTiles; ++i) {
      sum[i / 4][i % 4] += total[i / 4][i % 4];
      total[i / 4][i % 4] = 0.0f;
    }
  }
  CpAsyncWait<0>();
  SyncThreads();  // nobody reads a stage any more
}

template <WeightFormat kFormat, int kColumnTiles, typename Output>
KERNEL(kMatMulThreads, 1)
QuantizedMatMulKernel(const Bf16* x, const unsigned char* tiles, int rows, int outs, int depth, bool add, Output* out) {
  const int lane = Lane(), half = WarpIndex() / kMatMulWarps, in_half = WarpIndex() % kMatMulWarps;
  const int first_out = (static_cast<int>(BlockIndex().x) * kMatMulWarps + in_half) * kTileRows;
  const int first_row = static_cast<int>(BlockIndex().y) * 8 * kColumnTiles;
  // A warp past the last tile takes part in the copies of x and the barriers.
  const unsigned char* tile =
      first_out < outs ? tiles + int64_t{first_out / kTileRows} * TileBytes(kFormat, depth) : nullptr;
  float sum[kColumnTiles][4] = {};
  SumHalf<kFormat, kColumnTiles>(x, tile, first_row, rows, depth, half, sum);
  float* second = reinterpret_cast<float*>(SharedMemory()) + in_half * 4 * kColumnTiles * 32;
  UNROLL
  for (int i = 0; half == 1 && i < 4 * kColumnTiles; ++i) second[i * 32 + lane] = sum[i / 4][i % 4];
  SyncThreads();
  if (half == 0 && tile != nullptr) {
    UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + 8 * n + lane % 4 * 2 + i % 2, in_tile = lane / 4 + i / 2 * 8;
        if (row >= rows || first_out + in_tile >= outs) continue;
        const float whole = sum[n][i] + second[(4 * n + i) * 32 + lane];
        StoreOutput(whole * OutputScale<kFormat>(tile, depth, in_tile), add,
                    out + int64_t{row} * outs + first_out + in_tile);
      }
    }
  }
}

template <WeightFormat kFormat, int kColumnTiles, typename Output>
cudaError_t LaunchTiles(const Bf16* x, const unsigned char* tiles, int rows, int outs, int depth, Store store,
                        Output* out, LaunchStream stream) {
  using Layout = StageLayout<kFormat, kColumnTiles>;
  const auto blocks = static_cast<unsigned>((NumTiles(outs) + kMatMulWarps - 1) / kMatMulWarps);
  const auto row_blocks = static_cast<unsigned>((rows + 8 * kColumnTiles - 1) / (8 * kColumnTiles));
  return Launch(&QuantizedMatMulKernel<kFormat, kColumnTiles, Output>, {blocks, row_blocks}, {kMatMulThreads},
                2 * Layout::kHalfBytes, stream, x, tiles, rows, outs, depth, store == Store::kAdd, out);
}

template <WeightFormat kFormat, typename Output>
cudaError_t LaunchFormat(const Bf16* x, const unsigned char* tiles, int rows, int outs, int depth, Store store,
                         Output* out, LaunchStream stream) {
  if (rows <= kFewRows) {
    const auto blocks = static_cast<unsigned>((outs + kFewOuts - 1) / kFewOuts);
    return Launch(&FewRowsMatMulKernel<kFormat, Output>, {blocks}, {kFewThreads}, FewLayout<kFormat>::kBytes, stream, x,
                  tiles, rows, outs, depth, store == Store::kAdd, out);
  }
  const auto launch = rows <= 32 ? &LaunchTiles<kFormat, 4, Output> : &LaunchTiles<kFormat, 8, Output>;
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
