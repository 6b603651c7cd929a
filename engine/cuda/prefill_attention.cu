// Attention of many rows of one sequence over the paged cache. A block takes up to 128 columns (rows times heads of one
// group) of one key/value head; each of its eight warps owns 16 columns and walks all keys, tile by tile.
#include "engine/cuda/attention.cuh"

namespace minitron::engine::cuda {
namespace {

constexpr int kPrefillWarps = 8;
constexpr int kPrefillThreads = 32 * kPrefillWarps;
constexpr int kColumnTiles = 2;  // of 8 columns per warp
static_assert(kPrefillWarps * kColumnTiles * 8 == kPrefillColumns);

// Keys and values, then the queries. 96 KiB at D = 128, and 256 bytes more for a cache of E4M3: sm_89 has 99.
template <int kHeadDim, bool kFp8>
constexpr int kPrefillSharedBytes = ReaderLayout<kHeadDim, kFp8>::kBytes + kPrefillColumns* kHeadDim * 2;

// One column tile of a warp: the chunk at hand and the chunks folded so far. Index i as in MmaBf16's c: the column is
// 2 * (lane % 4) + i % 2, the dim lane / 4 + 8 * (i / 2) of each 16.
template <int kHeadDim>
struct ColumnState {
  float maximum[2], folded_maximum[2];
  float total[4], folded_total[2];
  float sums[kHeadDim / 16][4], folded_sums[kHeadDim / 16][4];
  int position[2];  // of the columns' rows; -1 for none
};

template <int kHeadDim>
DEVICE void StartChunk(ColumnState<kHeadDim>& s) {
  s.maximum[0] = s.maximum[1] = NoMaximum();
  UNROLL
  for (int i = 0; i < 4; ++i) {
    s.total[i] = 0.0f;
    UNROLL
    for (int d = 0; d < kHeadDim / 16; ++d) s.sums[d][i] = 0.0f;
  }
}

template <int kHeadDim>
DEVICE void FoldChunk(ColumnState<kHeadDim>& s, bool first) {
  FoldWeights fold[2];
  bool keep[2];
  UNROLL
  for (int j = 0; j < 2; ++j) {
    keep[j] = !first && s.maximum[j] == NoMaximum();  // the chunk lies past the column's row
    fold[j] = MakeFold(s.folded_maximum[j], s.maximum[j]);
    const float total = first ? s.total[j] : Fold(fold[j], s.folded_total[j], s.total[j]);
    if (!keep[j]) {
      s.folded_total[j] = total;
      s.folded_maximum[j] = first ? s.maximum[j] : fold[j].maximum;
    }
  }
  UNROLL
  for (int d = 0; d < kHeadDim / 16; ++d) {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const float sum = first ? s.sums[d][i] : Fold(fold[i % 2], s.folded_sums[d][i], s.sums[d][i]);
      if (!keep[i % 2]) s.folded_sums[d][i] = sum;
    }
  }
}

// Copies the tile's queries to shared memory, zeros for columns there are none for.
template <int kHeadDim>
DEVICE void StageQueries(const AttentionParams& p, const PrefillTile& tile, int kv_head, Bf16* queries) {
  using Layout = TileLayout<kHeadDim>;
  for (int i = static_cast<int>(ThreadIndex().x); i < kPrefillColumns * Layout::kVectorsPerRow; i += kPrefillThreads) {
    const int column = i / Layout::kVectorsPerRow, dim = i % Layout::kVectorsPerRow * 8;
    const int row = column / p.group_size, head = kv_head * p.group_size + column % p.group_size;
    Vector16 vector = {{0, 0, 0, 0}};
    if (row < tile.num_rows) {
      vector = Load16(p.q + int64_t{tile.first_row + row} * p.q_stride + int64_t{head} * kHeadDim + dim);
    }
    Store16(queries + SharedIndex<kHeadDim>(column, dim), vector);
  }
}

// Scores of the tile's 64 keys against the warp's columns, scaled and masked.
template <int kHeadDim>
DEVICE void ScoreTile(const Bf16* keys, const Bf16* queries, int first_column, float scale, int first_key,
                      const ColumnState<kHeadDim> (&states)[kColumnTiles],
                      float (&scores)[kColumnTiles][kTileKeys / 16][4]) {
  const int lane = Lane();
  UNROLL
  for (int i = 0; i < kColumnTiles * kTileKeys / 16 * 4; ++i) scores[i / 16][i / 4 % 4][i % 4] = 0.0f;
  UNROLL_BY(2)
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t b[kColumnTiles][2];
    UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
      const int column = first_column + 8 * n + lane / 4, dim = 16 * k + lane % 4 * 2;
      b[n][0] = LoadPair(queries + SharedIndex<kHeadDim>(column, dim));
      b[n][1] = LoadPair(queries + SharedIndex<kHeadDim>(column, dim + 8));
    }
    UNROLL
    for (int m = 0; m < kTileKeys / 16; ++m) {
      uint32_t a[4];
      LoadKeys<kHeadDim>(a, keys, m, k);
      UNROLL
      for (int n = 0; n < kColumnTiles; ++n) MmaBf16(scores[n][m], a, b[n][0], b[n][1]);
    }
  }
  UNROLL
  for (int n = 0; n < kColumnTiles; ++n) {
    UNROLL
    for (int m = 0; m < kTileKeys / 16; ++m) {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + 16 * m + lane / 4 + 8 * (i / 2);
        scores[n][m][i] = key <= states[n].position[i % 2] ? scores[n][m][i] * scale : NoMaximum();
      }
    }
  }
}

// The online softmax of one column tile: scores become weights, the sums are rescaled.
template <int kHeadDim>
DEVICE void Reweigh(ColumnState<kHeadDim>& s, float (&scores)[kTileKeys / 16][4]) {
  float correction[2];
  UNROLL
  for (int j = 0; j < 2; ++j) {
    float maximum = NoMaximum();
    UNROLL
    for (int m = 0; m < kTileKeys / 16; ++m) {
      maximum = scores[m][j] > maximum ? scores[m][j] : maximum;
      maximum = scores[m][2 + j] > maximum ? scores[m][2 + j] : maximum;
    }
    UNROLL
    for (int mask = 4; mask < 32; mask *= 2) {
      const float other = ShuffleXor(maximum, mask);
      maximum = other > maximum ? other : maximum;
    }
    maximum = s.maximum[j] > maximum ? s.maximum[j] : maximum;
    correction[j] = Exp2(s.maximum[j] - Base(maximum));
    s.maximum[j] = maximum;
  }
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const float base = Base(s.maximum[i % 2]);
    UNROLL
    for (int m = 0; m < kTileKeys / 16; ++m) scores[m][i] = Exp2(scores[m][i] - base);
    s.total[i] *= correction[i % 2];
    UNROLL
    for (int d = 0; d < kHeadDim / 16; ++d) s.sums[d][i] *= correction[i % 2];
  }
}

// sums += values * weights. The weights come as the scores' accumulators, keys down; as operand B they are needed keys
// across: one transposition per 8x8.
template <int kHeadDim>
DEVICE void SumTile(const Bf16* values, const float (&weights)[kColumnTiles][kTileKeys / 16][4],
                    ColumnState<kHeadDim> (&states)[kColumnTiles]) {
  UNROLL
  for (int k = 0; k < kTileKeys / 16; ++k) {
    uint32_t b[kColumnTiles][2];
    uint32_t a[4];
    LoadOnes(a);
    UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
      b[n][0] = TransposeMatrix(PackBf16(weights[n][k][0], weights[n][k][1]));
      b[n][1] = TransposeMatrix(PackBf16(weights[n][k][2], weights[n][k][3]));
      MmaBf16(states[n].total, a, b[n][0], b[n][1]);
    }
    UNROLL
    for (int d = 0; d < kHeadDim / 16; ++d) {
      LoadValues<kHeadDim>(a, values, d, k);
      UNROLL
      for (int n = 0; n < kColumnTiles; ++n) MmaBf16(states[n].sums[d], a, b[n][0], b[n][1]);
    }
  }
}

template <int kHeadDim>
DEVICE void StoreColumns(const AttentionParams& p, const PrefillTile& tile, int kv_head, int first_column,
                         const ColumnState<kHeadDim>& s) {
  const int lane = Lane();
  const int num_heads = p.cache.num_kv_heads * p.group_size;
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const int column = first_column + lane % 4 * 2 + i % 2;
    const int row = column / p.group_size, head = kv_head * p.group_size + column % p.group_size;
    if (row >= tile.num_rows) continue;
    Bf16* out = p.out + (int64_t{tile.first_row + row} * num_heads + head) * kHeadDim + lane / 4 + 8 * (i / 2);
    const float inverse = Reciprocal(s.folded_total[i % 2]);
    UNROLL
    for (int d = 0; d < kHeadDim / 16; ++d) out[16 * d] = ToBf16(s.folded_sums[d][i] * inverse);
  }
}

template <int kHeadDim, bool kFp8>
KERNEL(kPrefillThreads)
PrefillKernel(AttentionParams p, const PrefillTile* tiles) {
  using Layout = TileLayout<kHeadDim>;
  unsigned char* shared = SharedMemory();
  const int lane = Lane();
  const int kv_head = static_cast<int>(BlockIndex().x);
  const PrefillTile tile = tiles[BlockIndex().y];
  const int32_t* block_ids = p.block_ids + p.block_start[tile.sequence];
  const int first_column = WarpIndex() * kColumnTiles * 8;
  const int limit = tile.first_position + tile.num_rows;  // keys any row of the tile sees
  Bf16* queries = reinterpret_cast<Bf16*>(shared + ReaderLayout<kHeadDim, kFp8>::kBytes);
  StageQueries<kHeadDim>(p, tile, kv_head, queries);
  ColumnState<kHeadDim> states[kColumnTiles];
  int last_position = -1;  // of the warp's columns
  UNROLL
  for (int n = 0; n < kColumnTiles; ++n) {
    UNROLL
    for (int j = 0; j < 2; ++j) {
      const int row = (first_column + 8 * n + lane % 4 * 2 + j) / p.group_size;
      states[n].position[j] = row < tile.num_rows ? tile.first_position + row : -1;
    }
    StartChunk(states[n]);
  }
  const int first_row = first_column / p.group_size;
  const int last_row = (first_column + kColumnTiles * 8 - 1) / p.group_size;
  if (first_row < tile.num_rows) {
    last_position = tile.first_position + (last_row < tile.num_rows ? last_row : tile.num_rows - 1);
  }
  TileReader<kHeadDim, kFp8, kPrefillThreads> reader{p.cache, block_ids, kv_head, limit, shared};
  reader.Start(0, 0);
  const int num_tiles = (limit + kTileKeys - 1) / kTileKeys;
  for (int t = 0; t < num_tiles; ++t) {
    const Bf16* stage = reader.Await(t, t + 1 < num_tiles, (t + 1) * kTileKeys);  // the queries are there too
    if (t * kTileKeys <= last_position) {  // else no column of the warp sees the tile: it would change nothing
      float scores[kColumnTiles][kTileKeys / 16][4];
      ScoreTile<kHeadDim>(stage, queries, first_column, p.scale, t * kTileKeys, states, scores);
      UNROLL
      for (int n = 0; n < kColumnTiles; ++n) Reweigh<kHeadDim>(states[n], scores[n]);
      SumTile<kHeadDim>(stage + Layout::kElements, scores, states);
    }
    if (t % kTilesPerChunk == kTilesPerChunk - 1 || t == num_tiles - 1) {
      UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        FoldChunk<kHeadDim>(states[n], t < kTilesPerChunk);
        StartChunk(states[n]);
      }
    }
  }
  UNROLL
  for (int n = 0; n < kColumnTiles; ++n) {
    StoreColumns<kHeadDim>(p, tile, kv_head, first_column + 8 * n, states[n]);
  }
}

template <int kHeadDim, bool kFp8>
cudaError_t LaunchPrefill(const AttentionParams& p, const PrefillTile* tiles, int num_tiles, cudaStream_t stream) {
  return Launch(&PrefillKernel<kHeadDim, kFp8>,
                {static_cast<unsigned>(p.cache.num_kv_heads), static_cast<unsigned>(num_tiles)}, {kPrefillThreads},
                kPrefillSharedBytes<kHeadDim, kFp8>, stream, p, tiles);
}

}  // namespace

cudaError_t PrefillAttention(const AttentionParams& params, const PrefillTile* tiles, int num_tiles,
                             cudaStream_t stream) {
  if (params.group_size < 1 || params.group_size > kMaxGroupSize) return cudaErrorInvalidValue;
  const bool fp8 = params.cache.keys == nullptr;
  if (params.head_dim == 128) {
    return fp8 ? LaunchPrefill<128, true>(params, tiles, num_tiles, stream)
               : LaunchPrefill<128, false>(params, tiles, num_tiles, stream);
  }
  if (params.head_dim == 64) {
    return fp8 ? LaunchPrefill<64, true>(params, tiles, num_tiles, stream)
               : LaunchPrefill<64, false>(params, tiles, num_tiles, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace minitron::engine::cuda
