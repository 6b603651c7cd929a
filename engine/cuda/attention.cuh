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

#include "engine/cuda/e4m3.cuh"
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

// What lies at the start of shared memory. A cache of bf16: two stages that take turns. A cache of E4M3: one stage, and
// behind it two places for the bytes and the exponents of a tile.
template <int kHeadDim, bool kFp8>
struct ReaderLayout {
  static constexpr int kStageBytes = TileLayout<kHeadDim>::kStageBytes;
  static constexpr int kCoded = kTileKeys * kHeadDim;             // bytes of the keys, and of the values
  static constexpr int kCodedBytes = 2 * kCoded + 2 * kTileKeys;  // with an exponent for each row
  static constexpr int kBytes = kFp8 ? kStageBytes + 2 * kCodedBytes : 2 * kStageBytes;
};

// Not a number a score can have: the maximum before any key.
DEVICE float NoMaximum() { return -BitsToFloat(0x7F800000u); }
// What scores are subtracted from: 0 while there is no maximum, so that exp2 gives 0 and not NaN.
DEVICE float Base(float maximum) { return maximum == NoMaximum() ? 0.0f : maximum; }

// Brings one sequence's keys and values of one head into shared memory, tile by tile, as bf16. A tile is copied while
// the one before is worked on. All threads of the block call it alike.
template <int kHeadDim, bool kFp8, int kThreads>
struct TileReader {
  using Layout = TileLayout<kHeadDim>;
  using Reader = ReaderLayout<kHeadDim, kFp8>;
  const KvCacheView& cache;
  const int32_t* block_ids;
  int kv_head;
  int limit;  // keys from it on are zeros: the memory may hold anything, and 0 * NaN would not be 0
  unsigned char* shared;
  int exponent = 0;  // of one row of the tile under way, in the first 2 * kTileKeys threads

  // The row of a key in the cache.
  DEVICE int64_t RowOf(int key) const {
    const int64_t block = block_ids[key >> cache.block_shift];
    return ((block * cache.num_kv_heads + kv_head) << cache.block_shift) + (key & ((1 << cache.block_shift) - 1));
  }

  // Starts copying keys [first_key, first_key + kTileKeys) as tile number `tile`.
  DEVICE void Start(int tile, int first_key) {
    const int thread = static_cast<int>(ThreadIndex().x);
    if constexpr (kFp8) {
      constexpr int kVectors = kHeadDim / 16;  // of a row
      unsigned char* coded = shared + Reader::kStageBytes + tile % 2 * Reader::kCodedBytes;
      for (int i = thread; i < kTileKeys * kVectors; i += kThreads) {
        const int row = i / kVectors, key = first_key + row;
        const bool valid = key < limit;
        const int64_t source = valid ? RowOf(key) * kHeadDim + i % kVectors * 16 : 0;
        CpAsync16(coded + i * 16, cache.fp8.keys + source, valid);
        CpAsync16(coded + Reader::kCoded + i * 16, cache.fp8.values + source, valid);
      }
      const int key = first_key + thread % kTileKeys;
      exponent = 0;
      if (thread < 2 * kTileKeys && key < limit) {
        exponent = (thread < kTileKeys ? cache.fp8.key_exponents : cache.fp8.value_exponents)[RowOf(key)];
      }
    } else {
      Bf16* stage = StageOf(tile);
      for (int i = thread; i < kTileKeys * Layout::kVectorsPerRow; i += kThreads) {
        const int row = i / Layout::kVectorsPerRow, column = i % Layout::kVectorsPerRow * 8;
        const int key = first_key + row;
        const bool valid = key < limit;
        const int64_t source = valid ? RowOf(key) * kHeadDim : 0;
        CpAsync16(stage + SharedIndex<kHeadDim>(row, column), cache.keys + source + column, valid);
        CpAsync16(stage + Layout::kElements + SharedIndex<kHeadDim>(row, column), cache.values + source + column,
                  valid);
      }
    }
    CpAsyncCommit();
  }

  // Waits for tile number `tile`, starts the next one if there is one, and returns the tile: keys, then values.
  // Behind it nobody reads the tile before any more.
  DEVICE const Bf16* Await(int tile, bool more, int next_key) {
    CpAsyncWait<0>();
    if constexpr (kFp8) {
      const int thread = static_cast<int>(ThreadIndex().x);
      unsigned char* coded = shared + Reader::kStageBytes + tile % 2 * Reader::kCodedBytes;
      auto* exponents = reinterpret_cast<int8_t*>(coded + 2 * Reader::kCoded);
      if (thread < 2 * kTileKeys) exponents[thread] = static_cast<int8_t>(exponent);
      SyncThreads();
      if (more) Start(tile + 1, next_key);
      Decode(coded, exponents);
      SyncThreads();
    } else {
      SyncThreads();
      if (more) Start(tile + 1, next_key);
    }
    return StageOf(tile);
  }

 private:
  DEVICE Bf16* StageOf(int tile) const {
    return reinterpret_cast<Bf16*>(shared + (kFp8 ? 0 : tile % 2 * Reader::kStageBytes));
  }
  DEVICE void Decode(const unsigned char* coded, const int8_t* exponents) const {
    constexpr int kVectors = kHeadDim / 16;
    for (int i = static_cast<int>(ThreadIndex().x); i < 2 * kTileKeys * kVectors; i += kThreads) {
      const int row = i / kVectors, column = i % kVectors * 16;  // rows from kTileKeys on are the values
      const Vector16 bytes = Load16(coded + i * 16);
      const uint32_t scale = DecodingScale(exponents[row]);
      Vector16 low, high;
      DecodeE4m3(bytes.words[0], scale, low.words[0], low.words[1]);
      DecodeE4m3(bytes.words[1], scale, low.words[2], low.words[3]);
      DecodeE4m3(bytes.words[2], scale, high.words[0], high.words[1]);
      DecodeE4m3(bytes.words[3], scale, high.words[2], high.words[3]);
      Bf16* stage = StageOf(0);
      Store16(stage + SharedIndex<kHeadDim>(row, column), low);
      Store16(stage + SharedIndex<kHeadDim>(row, column + 8), high);
    }
  }
};

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
