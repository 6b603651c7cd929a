// The arithmetic of attention, once for both kernels. For one row (a token at position p) and one head:
//
//   keys 0 .. p in chunks of kChunkKeys, a chunk in tiles of kTileKeys;
//   over the tiles of a chunk an online softmax: scores by mma over the head's dims in order, the tile's maximum, the
//   sums rescaled by exp2(old - new maximum), then the probabilities (bf16) times values by mma over the keys in order;
//   the denominator is one more row of the values, all ones, so it is summed in the same order by the same instruction;
//   the chunks' partial results folded left to right (Fold).
//
// Keys are the M side of every product and (row, head) columns the N side, 8 per instruction, so that a group of up to
// 8 heads wastes little when decoding. A row's bits are therefore the same whichever kernel computes it, whatever
// shares its tile, and wherever its blocks lie: keys past p score -infinity, weigh 0 and change nothing.
#pragma once

#include "engine/cuda/kernels.h"

namespace minitron::engine::cuda {

inline constexpr int kTileKeys = 64;
inline constexpr int kTilesPerChunk = kChunkKeys / kTileKeys;
// Rows of D elements in shared memory, in 16-byte vectors. Vector v of row r lies at v ^ (r % 8): the 8 rows of one
// ldmatrix then hit all banks, without padding.
template <int kHeadDim>
struct TileLayout {
  static constexpr int kVectorsPerRow = kHeadDim / 8;
  static constexpr int kElements = kTileKeys * kHeadDim;  // of the keys, and of the values
  static constexpr int kStageBytes = 2 * kElements * 2;   // both
};
template <int kHeadDim>
DEVICE int SharedIndex(int row, int column) {
  return row * kHeadDim + (((column / 8) ^ (row % 8)) * 8) + column % 8;
}

// The stage of tile `tile` of two taking turns at the start of shared memory.
template <int kHeadDim>
DEVICE Bf16* Stage(unsigned char* shared, int tile) {
  return reinterpret_cast<Bf16*>(shared + tile % 2 * TileLayout<kHeadDim>::kStageBytes);
}

// Not a number a score can have: the maximum before any key.
DEVICE float NoMaximum() { return -BitsToFloat(0x7F800000u); }
// What scores are subtracted from: 0 while there is no maximum, so that exp2 gives 0 and not NaN.
DEVICE float Base(float maximum) { return maximum == NoMaximum() ? 0.0f : maximum; }

// Starts copying keys [first_key, first_key + kTileKeys) of a sequence's head into a stage. Keys from `limit` on are
// zeros: the memory may hold anything, and 0 * NaN would not be 0.
template <int kHeadDim, int kThreads>
DEVICE void LoadTile(const AttentionParams& p, const int32_t* block_ids, int kv_head, int first_key, int limit,
                     Bf16* stage) {
  using Layout = TileLayout<kHeadDim>;
  const int block_mask = (1 << p.cache.block_shift) - 1;
  for (int i = static_cast<int>(ThreadIndex().x); i < kTileKeys * Layout::kVectorsPerRow; i += kThreads) {
    const int row = i / Layout::kVectorsPerRow, column = i % Layout::kVectorsPerRow * 8;
    const int key = first_key + row;
    const bool valid = key < limit;
    int64_t source = 0;
    if (valid) {
      const int64_t block = block_ids[key >> p.cache.block_shift];
      source = (((block * p.cache.num_kv_heads + kv_head) << p.cache.block_shift) + (key & block_mask)) * kHeadDim;
    }
    CpAsync16(stage + SharedIndex<kHeadDim>(row, column), p.cache.keys + source + column, valid);
    CpAsync16(stage + Layout::kElements + SharedIndex<kHeadDim>(row, column), p.cache.values + source + column, valid);
  }
  CpAsyncCommit();
}

// Operand A of the scores: keys [16 * m, + 16) of the tile, dims [16 * k, + 16).
template <int kHeadDim>
DEVICE void LoadKeys(uint32_t (&a)[4], const Bf16* keys, int m, int k) {
  const int lane = Lane();
  LoadMatrix4(a, keys + SharedIndex<kHeadDim>(16 * m + lane % 16, 16 * k + lane / 16 * 8));
}
// Operand A of the sums: dims [16 * d, + 16), keys [16 * k, + 16), transposed on the way.
template <int kHeadDim>
DEVICE void LoadValues(uint32_t (&a)[4], const Bf16* values, int d, int k) {
  const int lane = Lane();
  LoadMatrix4Transposed(a,
                        values + SharedIndex<kHeadDim>(16 * k + lane / 16 * 8 + lane % 8, 16 * d + lane / 8 % 2 * 8));
}
// Operand A of the denominator: ones.
DEVICE void LoadOnes(uint32_t (&a)[4]) { a[0] = a[1] = a[2] = a[3] = 0x3F803F80u; }

// Two adjacent bf16 in shared memory.
DEVICE uint32_t LoadPair(const Bf16* pair) { return *reinterpret_cast<const uint32_t*>(pair); }

// Weights that fold a later chunk into the result so far.
struct FoldWeights {
  float maximum, before, chunk;
};
DEVICE FoldWeights MakeFold(float maximum_before, float maximum_chunk) {
  const float maximum = maximum_before > maximum_chunk ? maximum_before : maximum_chunk;
  return {maximum, Exp2(maximum_before - Base(maximum)), Exp2(maximum_chunk - Base(maximum))};
}
DEVICE float Fold(const FoldWeights& weights, float before, float chunk) {
  return FusedMultiplyAdd(before, weights.before, chunk * weights.chunk);
}

}  // namespace minitron::engine::cuda
