// Attention of single rows over the paged cache. A block takes one chunk of one row's keys and one key/value head: its
// four warps each score 16 of a tile's 64 keys against the group's heads, then each sums a quarter of the dims over all
// keys of the tile.
#include "engine/cuda/attention.cuh"

namespace minitron::engine::cuda {
namespace {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr int kDecodeBlocks = 6;  // on a processor, as registers go; shared memory may allow fewer
// Of the largest devices (sm_90, sm_100). On others more blocks are launched than fit, and wait.
constexpr int kMaxSharedBytes = 227 << 10, kMergeThreads = 1024;
constexpr int kColumns = 8;                   // heads of the group, padded
constexpr int kWeightStride = kTileKeys + 8;  // padded: rows start in different banks

template <int kHeadDim, bool kFp8>
struct DecodeShared {
  static constexpr int kQueries = ReaderLayout<kHeadDim, kFp8>::kBytes;  // behind the keys and values
  static constexpr int kWeights = kQueries + kColumns * kHeadDim * 2;
  static constexpr int kMaxima = kWeights + kColumns * kWeightStride * 2;
  static constexpr int kBytes = kMaxima + kDecodeWarps * kColumns * 4;
};

// The running result of a warp: its dims, all columns.
template <int kHeadDim>
struct DecodeState {
  static constexpr int kDimTiles = kHeadDim / 16 / kDecodeWarps;
  float maximum[2];  // of columns 2 * (lane % 4) + {0, 1}
  float total[4];    // the denominator, as one more row of sums
  float sums[kDimTiles][4];
};

// Copies the group's queries to shared memory, zeros for the padded heads.
template <int kHeadDim>
DEVICE void LoadQueries(const AttentionParams& p, int token_row, int kv_head, Bf16* queries) {
  using Layout = TileLayout<kHeadDim>;
  const Bf16* source = p.q + int64_t{token_row} * p.q_stride + int64_t{kv_head} * p.group_size * kHeadDim;
  for (int i = static_cast<int>(ThreadIndex().x); i < kColumns * Layout::kVectorsPerRow; i += kDecodeThreads) {
    const int head = i / Layout::kVectorsPerRow, column = i % Layout::kVectorsPerRow * 8;
    Vector16 vector = {{0, 0, 0, 0}};
    if (head < p.group_size) vector = Load16(source + head * kHeadDim + column);
    Store16(queries + SharedIndex<kHeadDim>(head, column), vector);
  }
}

// Scores this warp's 16 keys of the tile; c as of MmaBf16: keys lane/4 and + 8, columns 2 * (lane % 4) + {0, 1}.
template <int kHeadDim>
DEVICE void ScoreKeys(const Bf16* keys, const Bf16* queries, float scale, int first_key, int num_keys, float (&c)[4]) {
  const int lane = Lane(), warp = WarpIndex();
  c[0] = c[1] = c[2] = c[3] = 0.0f;
  UNROLL
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t a[4];
    LoadKeys<kHeadDim>(a, keys, warp, k);
    const int column = 16 * k + lane % 4 * 2;
    MmaBf16(c, a, LoadPair(queries + SharedIndex<kHeadDim>(lane / 4, column)),
            LoadPair(queries + SharedIndex<kHeadDim>(lane / 4, column + 8)));
  }
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const int key = first_key + 16 * warp + lane / 4 + 8 * (i / 2);
    c[i] = key < num_keys ? c[i] * scale : NoMaximum();
  }
}

// One tile: scores, softmax, sums. Between its barriers the warps exchange maxima and weights.
template <int kHeadDim, bool kFp8>
DEVICE void DecodeTile(const AttentionParams& p, const Bf16* stage, unsigned char* shared, int first_key, int num_keys,
                       DecodeState<kHeadDim>& state) {
  using Shared = DecodeShared<kHeadDim, kFp8>;
  const Bf16* queries = reinterpret_cast<const Bf16*>(shared + Shared::kQueries);
  Bf16* weights = reinterpret_cast<Bf16*>(shared + Shared::kWeights);  // [column][key]
  float* maxima = reinterpret_cast<float*>(shared + Shared::kMaxima);  // [warp][column]
  const int lane = Lane(), warp = WarpIndex();
  float c[4];
  ScoreKeys<kHeadDim>(stage, queries, p.scale, first_key, num_keys, c);
  UNROLL
  for (int j = 0; j < 2; ++j) {
    float maximum = c[j] > c[2 + j] ? c[j] : c[2 + j];
    UNROLL
    for (int mask = 4; mask < 32; mask *= 2) {
      const float other = ShuffleXor(maximum, mask);
      maximum = other > maximum ? other : maximum;
    }
    if (lane < 4) maxima[warp * kColumns + 2 * lane + j] = maximum;
  }
  SyncThreads();
  float correction[2];
  UNROLL
  for (int j = 0; j < 2; ++j) {
    const int column = lane % 4 * 2 + j;
    float maximum = state.maximum[j];
    UNROLL
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float other = maxima[w * kColumns + column];
      maximum = other > maximum ? other : maximum;
    }
    correction[j] = Exp2(state.maximum[j] - Base(maximum));
    state.maximum[j] = maximum;
    UNROLL
    for (int i = 0; i < 2; ++i) {
      weights[column * kWeightStride + 16 * warp + lane / 4 + 8 * i] = ToBf16(Exp2(c[2 * i + j] - Base(maximum)));
    }
  }
  SyncThreads();
  UNROLL
  for (int i = 0; i < 4; ++i) {
    state.total[i] *= correction[i % 2];
    UNROLL
    for (int d = 0; d < DecodeState<kHeadDim>::kDimTiles; ++d) state.sums[d][i] *= correction[i % 2];
  }
  const Bf16* values = stage + TileLayout<kHeadDim>::kElements;
  UNROLL
  for (int k = 0; k < kTileKeys / 16; ++k) {
    const Bf16* weight = weights + lane / 4 * kWeightStride + 16 * k + lane % 4 * 2;
    const uint32_t b0 = LoadPair(weight), b1 = LoadPair(weight + 8);
    uint32_t a[4];
    LoadOnes(a);
    MmaBf16(state.total, a, b0, b1);
    UNROLL
    for (int d = 0; d < DecodeState<kHeadDim>::kDimTiles; ++d) {
      LoadValues<kHeadDim>(a, values, warp * DecodeState<kHeadDim>::kDimTiles + d, k);
      MmaBf16(state.sums[d], a, b0, b1);
    }
  }
}

// The result of a row with one chunk, or a chunk's partial result.
template <int kHeadDim>
DEVICE void StoreResult(const AttentionParams& p, const DecodeItem& item, int item_index, int kv_head, float* partials,
                        const DecodeState<kHeadDim>& state) {
  const int lane = Lane(), warp = WarpIndex();
  const bool whole = item.num_keys <= kChunkKeys;
  const int num_heads = p.cache.num_kv_heads * p.group_size;
  float* partial = partials + item_index * PartialFloats(p.cache.num_kv_heads, kHeadDim) +
                   int64_t{kv_head} * kMaxGroupSize * (kHeadDim + 2);
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const int head = lane % 4 * 2 + i % 2;
    if (head >= p.group_size) continue;
    float* head_partial = partial + head * (kHeadDim + 2);
    Bf16* out = p.out + (int64_t{item.token_row} * num_heads + kv_head * p.group_size + head) * kHeadDim;
    const float inverse = Reciprocal(state.total[i]);
    UNROLL
    for (int d = 0; d < DecodeState<kHeadDim>::kDimTiles; ++d) {
      const int dim = (warp * DecodeState<kHeadDim>::kDimTiles + d) * 16 + lane / 4 + 8 * (i / 2);
      if (whole) {
        out[dim] = ToBf16(state.sums[d][i] * inverse);
      } else {
        head_partial[dim] = state.sums[d][i];
      }
    }
    if (!whole && warp == 0 && lane < 4 && i < 2) {
      head_partial[kHeadDim] = state.maximum[i];
      head_partial[kHeadDim + 1] = state.total[i];
    }
  }
}

template <int kHeadDim, bool kFp8>
KERNEL(kDecodeThreads, kDecodeBlocks)
DecodeKernel(AttentionParams p, const DecodeItem* items, const DecodeCounts* counts, float* partials) {
  BeginKernel();
  using Shared = DecodeShared<kHeadDim, kFp8>;
  unsigned char* shared = SharedMemory();
  const int kv_head = static_cast<int>(BlockIndex().y);
  const int num_items = counts->num_items;
  for (int index = static_cast<int>(BlockIndex().x); index < num_items; index += static_cast<int>(GridDim().x)) {
    const DecodeItem item = items[index];
    const int32_t* block_ids = p.block_ids + p.block_start[item.sequence];
    const int first_key = item.chunk * kChunkKeys;
    const int end_key = item.num_keys < first_key + kChunkKeys ? item.num_keys : first_key + kChunkKeys;
    const int num_tiles = (end_key - first_key + kTileKeys - 1) / kTileKeys;
    DecodeState<kHeadDim> state = {{NoMaximum(), NoMaximum()}, {}, {}};
    TileReader<kHeadDim, kFp8, kDecodeThreads> reader{p.cache, block_ids, kv_head, item.num_keys, shared};
    reader.Start(0, first_key);
    LoadQueries<kHeadDim>(p, item.token_row, kv_head, reinterpret_cast<Bf16*>(shared + Shared::kQueries));
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int tile_key = first_key + tile * kTileKeys;
      const Bf16* stage = reader.Await(tile, tile + 1 < num_tiles, tile_key + kTileKeys);
      DecodeTile<kHeadDim, kFp8>(p, stage, shared, tile_key, item.num_keys, state);
    }
    StoreResult<kHeadDim>(p, item, index, kv_head, partials, state);
    SyncThreads();  // before the next item overwrites the queries
  }
}

// Folds the chunks of one row and head, left to right. One thread per dim. Chunks are read a few at a time, so that a
// long context waits for memory a few times and not once per chunk.
constexpr int kChunksAtOnce = 8;
template <int kHeadDim>
KERNEL(kHeadDim)
MergeKernel(AttentionParams p, const MergeRow* rows, const DecodeCounts* counts, const float* partials) {
  BeginKernel();
  const int dim = static_cast<int>(ThreadIndex().x);
  const int num_heads = p.cache.num_kv_heads * p.group_size;
  const int query_head = static_cast<int>(BlockIndex().y);
  const int64_t stride = PartialFloats(p.cache.num_kv_heads, kHeadDim);
  const int slot = query_head / p.group_size * kMaxGroupSize + query_head % p.group_size;
  for (int r = static_cast<int>(BlockIndex().x); r < counts->num_merge_rows; r += static_cast<int>(GridDim().x)) {
    const MergeRow row = rows[r];
    const float* partial = partials + row.first_item * stride + int64_t{slot} * (kHeadDim + 2);
    float maximum = NoMaximum(), total = 0.0f, sum = 0.0f;
    for (int first = 0; first < row.num_chunks; first += kChunksAtOnce) {
      float maxima[kChunksAtOnce], totals[kChunksAtOnce], sums[kChunksAtOnce];
      UNROLL
      for (int i = 0; i < kChunksAtOnce; ++i) {
        // Past the last, the last again: read and not used.
        const int chunk = first + i < row.num_chunks ? first + i : row.num_chunks - 1;
        maxima[i] = partial[chunk * stride + kHeadDim];
        totals[i] = partial[chunk * stride + kHeadDim + 1];
        sums[i] = partial[chunk * stride + dim];
      }
      UNROLL
      for (int i = 0; i < kChunksAtOnce; ++i) {
        if (first + i >= row.num_chunks) break;
        const FoldWeights fold = MakeFold(maximum, maxima[i]);
        const bool is_first = first + i == 0;
        total = is_first ? totals[i] : Fold(fold, total, totals[i]);
        sum = is_first ? sums[i] : Fold(fold, sum, sums[i]);
        maximum = is_first ? maxima[i] : fold.maximum;
      }
    }
    p.out[(int64_t{row.token_row} * num_heads + query_head) * kHeadDim + dim] = ToBf16(sum * Reciprocal(total));
  }
}

template <int kHeadDim, bool kFp8>
cudaError_t LaunchDecode(const AttentionParams& p, const DecodeItem* items, const MergeRow* merge_rows,
                         const DecodeCounts* counts, float* partials, int max_blocks, int max_merge_rows,
                         LaunchStream stream) {
  const auto kv_heads = static_cast<unsigned>(p.cache.num_kv_heads);
  const cudaError_t error =
      Launch(&DecodeKernel<kHeadDim, kFp8>, {static_cast<unsigned>(max_blocks), kv_heads}, {kDecodeThreads},
             DecodeShared<kHeadDim, kFp8>::kBytes, stream, p, items, counts, partials);
  if (error != cudaSuccess || max_merge_rows == 0) return error;
  return Launch(&MergeKernel<kHeadDim>, {static_cast<unsigned>(max_merge_rows), kv_heads * p.group_size}, {kHeadDim}, 0,
                stream, p, merge_rows, counts, partials);
}

// What fits of something that takes so many blocks, at least one. Rounded down: a block that has to wait for a place
// does its share of the work when the others are done.
int Resident(int per_processor, int num_processors, int num_blocks_each) {
  const int blocks = per_processor * num_processors;
  return blocks < num_blocks_each ? 1 : blocks / num_blocks_each;
}

}  // namespace

int ResidentDecodeItems(const AttentionParams& params, int num_processors) {
  const int per_processor = params.head_dim == 128 ? kMaxSharedBytes / DecodeShared<128, false>::kBytes
                                                   : kMaxSharedBytes / DecodeShared<64, false>::kBytes;
  return Resident(per_processor < kDecodeBlocks ? per_processor : kDecodeBlocks, num_processors,
                  params.cache.num_kv_heads);
}

int ResidentMergeRows(const AttentionParams& params, int num_processors) {
  return Resident(kMergeThreads / params.head_dim, num_processors, params.cache.num_kv_heads * params.group_size);
}

cudaError_t DecodeAttention(const AttentionParams& params, const DecodeItem* items, const MergeRow* merge_rows,
                            const DecodeCounts* counts, float* partials, int max_blocks, int max_merge_rows,
                            LaunchStream stream) {
  if (params.group_size < 1 || params.group_size > kMaxGroupSize) return cudaErrorInvalidValue;
  if (params.head_dim != 128 && params.head_dim != 64) return cudaErrorInvalidValue;
  const bool fp8 = params.cache.keys == nullptr;
  const auto launch = params.head_dim == 128 ? (fp8 ? &LaunchDecode<128, true> : &LaunchDecode<128, false>)
                                             : (fp8 ? &LaunchDecode<64, true> : &LaunchDecode<64, false>);
  return launch(params, items, merge_rows, counts, partials, max_blocks, max_merge_rows, stream);
}

}  // namespace minitron::engine::cuda
