// Launchers of the CUDA kernels, one op per .cu file. Raw device pointers, no ownership, no absl: what nvcc compiles.
// Each enqueues on `stream` and returns the launch's error. Rows are independent: a row's bits depend on that row
// alone.
//
// Dimensions: T token rows, S sequences, H query heads, G key/value heads, D head_dim (64 or 128), V vocabulary.
#pragma once

#include <cstdint>

#include "engine/cuda/device.h"

namespace minitron::engine::cuda {

// out[r, :] = table[rows[r], :] for num_rows rows of `cols` elements, a multiple of 8. A negative row -1-i means
// previous[i] (a token the step before sampled); `previous` may be null when there is none.
cudaError_t CopyRows(const Bf16* table, const int32_t* rows, const int32_t* previous, int num_rows, int cols, Bf16* out,
                     LaunchStream stream);

// Where rows of activations go in E4M3; null: they do not.
struct Fp8Rows {
  uint8_t* codes = nullptr;  // [rows, cols]
  float* scales = nullptr;   // [rows]
};

// out = (x - mean) / sqrt(var + eps) * (1 + weight) + bias.   weight, bias [cols] fp32; statistics in fp32, two passes
// With `coded`, out is brought to E4M3 as well, as QuantizeRows would.
// Requires: cols a multiple of 8, at most 24576 (the row is kept in registers); weight and bias 16-byte aligned.
inline constexpr int kMaxNormCols = 24576;
cudaError_t LayerNorm1p(const Bf16* x, const float* weight, const float* bias, float eps, int num_rows, int cols,
                        Bf16* out, LaunchStream stream, Fp8Rows coded = {});

// x = max(x, 0)^2 over `count` elements, a multiple of 8; NaN stays NaN.
cudaError_t SquaredRelu(Bf16* x, int64_t count, LaunchStream stream);

// Keys and values in E4M3, each row of D with an exponent of its own: see e4m3.cuh.
struct Fp8Cache {
  uint8_t* keys;            // [block][G][token in block][D]
  uint8_t* values;          // the same
  int8_t* key_exponents;    // [block][G][token in block]
  int8_t* value_exponents;  // the same
};
// The paged KV cache of one layer: keys and values [block][G][token in block][D], in bf16 or in E4M3.
struct KvCacheView {
  Bf16* keys;  // null: the cache is fp8
  Bf16* values;
  int num_kv_heads;
  int block_shift;  // log2 of the tokens per block
  Fp8Cache fp8 = {};
};

// Rotates the first rotary_dim dims of each head of q (in place) and k by the row's position, then stores k and v in
// the cache at slot_mapping[t].   q [T, q_stride], k and v [T, kv_stride], cosines and sines [positions, rotary_dim /
// 2] fp32
struct RopeParams {
  Bf16* q;
  const Bf16* k;
  const Bf16* v;
  const int32_t* positions;
  const int64_t* slot_mapping;
  const float* cosines;
  const float* sines;
  KvCacheView cache;
  int num_query_heads, head_dim, rotary_dim;
  int q_stride, kv_stride;  // elements from one row to the next, of q and of k and v
};
cudaError_t RopeAndStoreKv(const RopeParams& params, int num_rows, LaunchStream stream);

// --- Attention. The arithmetic of a row is the same in both kernels; see attention.cuh. ---

// Keys of one split of a long context. A row's splits are at multiples of it, whatever the batch.
inline constexpr int kChunkKeys = 256;
inline constexpr int kMaxGroupSize = 8;

struct AttentionParams {
  const Bf16* q;  // [T, q_stride], the first H * D of each row
  Bf16* out;      // [T, H * D]
  KvCacheView cache;
  const int32_t* block_ids;    // all sequences' blocks
  const int32_t* block_start;  // [S + 1]
  int group_size;              // H / G, at most kMaxGroupSize
  int head_dim;
  int q_stride;  // elements from one row of q to the next, a multiple of 8
  float scale;   // log2(e) / sqrt(D)
};

// One chunk of keys of one single-row sequence.
struct DecodeItem {
  int32_t token_row;
  int32_t sequence;
  int32_t num_keys;  // of the row: its position + 1
  int32_t chunk;     // keys [chunk * kChunkKeys, ...) of them
};
// A row with more than one chunk: its items are adjacent.
struct MergeRow {
  int32_t token_row;
  int32_t first_item;
  int32_t num_chunks;
  int32_t unused;
};
struct DecodeCounts {
  int32_t num_items;
  int32_t num_merge_rows;
};
// Floats of partial results per item: for each key/value head and head of its group D sums, then maximum and total.
HOST_DEVICE constexpr int64_t PartialFloats(int num_kv_heads, int head_dim) {
  return int64_t{num_kv_heads} * kMaxGroupSize * (head_dim + 2);
}
// Items and merge rows whose blocks a device of so many processors holds at a time.
int ResidentDecodeItems(const AttentionParams& params, int num_processors);
int ResidentMergeRows(const AttentionParams& params, int num_processors);
// Decode rows. The counts are read on the device, so that a captured graph can be replayed with others: at most
// max_blocks items and max_merge_rows rows at a time are worked on, the rest follows in a loop.
cudaError_t DecodeAttention(const AttentionParams& params, const DecodeItem* items, const MergeRow* merge_rows,
                            const DecodeCounts* counts, float* partials, int max_blocks, int max_merge_rows,
                            LaunchStream stream);

// Rows [first_row, first_row + num_rows) of one sequence, at positions first_position ...
struct PrefillTile {
  int32_t first_row;
  int32_t num_rows;  // at most PrefillRows(group_size)
  int32_t sequence;
  int32_t first_position;
};
inline constexpr int kPrefillColumns = 128;  // rows times heads of one group
HOST_DEVICE constexpr int PrefillRows(int group_size) { return kPrefillColumns / group_size; }
// Blocks start in the order of the tiles. Those with the most keys belong first: the last to start are then the
// shortest. At most 65535 tiles.
cudaError_t PrefillAttention(const AttentionParams& params, const PrefillTile* tiles, int num_tiles,
                             cudaStream_t stream);

// What a product does with what `out` holds: replaces it, or adds to it in fp32 and rounds once.
enum class Store { kReplace, kAdd };

// out = x * w^T, sums in fp32 in one order per output.   x [rows, depth], w [outs, depth], out [rows, outs]
// The reference: correct for any shape and never fast.
cudaError_t ReferenceMatMul(const Bf16* x, const Bf16* w, int rows, int outs, int depth, Store store, Bf16* out,
                            cudaStream_t stream);
cudaError_t ReferenceMatMul(const Bf16* x, const Bf16* w, int rows, int outs, int depth, float* out,
                            cudaStream_t stream);

// --- Products in E4M3 (fp8_matmul.cu). ---

// A row-major matrix of E4M3 codes; an element is its code's value times its row's scale.
struct Fp8Matrix {
  const uint8_t* codes;  // [rows, cols]
  const float* scales;   // [rows]
};

enum class Activation { kNone, kSquaredRelu };
// Rows of x, or of what SquaredRelu would make of them, as E4M3: scales[r] = largest magnitude of row r / 448, codes
// the nearest to x / scale. A row that is not finite has zeros and a scale of NaN.   x [rows, cols], cols a multiple of
// 8
cudaError_t QuantizeRows(const Bf16* x, Activation activation, int rows, int cols, Fp8Rows coded, LaunchStream stream);

// product = codes of x * codes of w ^T, without their scales, in one order per output. The reference, never fast.
cudaError_t ReferenceFp8MatMul(const uint8_t* x, const uint8_t* w, int rows, int outs, int depth, float* product,
                               cudaStream_t stream);

// out = product[r, o] * x_scales[r] * w_scales[o], or out += that: what a product without scales lacks.
// outs a multiple of 8
cudaError_t ScaleProduct(const float* product, const float* x_scales, const float* w_scales, int rows, int outs,
                         Store store, Bf16* out, cudaStream_t stream);

}  // namespace minitron::engine::cuda
