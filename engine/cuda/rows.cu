// Ops on rows one by one: copies, LayerNorm, activation, rotary embedding with the cache write.
#include "engine/cuda/fp8_rows.cuh"
#include "engine/cuda/kernels.h"

namespace minitron::engine::cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / 32;

KERNEL(kRowThreads)
CopyRowsKernel(const Bf16* table, const int32_t* rows, const int32_t* previous, int cols, Bf16* out) {
  BeginKernel();
  const int64_t r = BlockIndex().x;
  int64_t row = rows[r];
  if (row < 0) row = previous[-1 - row];
  for (int i = static_cast<int>(ThreadIndex().x) * 8; i < cols; i += kRowThreads * 8) {
    Store16(out + r * cols + i, Load16(table + row * cols + i));
  }
}

// The sum over the block, the same in every thread, in an order fixed by the block's size.
DEVICE float BlockSum(float value, float* scratch) {
  UNROLL
  for (int mask = 16; mask > 0; mask /= 2) value += ShuffleXor(value, mask);
  if (Lane() == 0) scratch[WarpIndex()] = value;
  SyncThreads();
  float sum = 0.0f;
  UNROLL
  for (int w = 0; w < kRowWarps; ++w) sum += scratch[w];
  SyncThreads();  // before the scratch is used again
  return sum;
}

// Weight and bias of 8 columns.
struct Affine {
  Vector16 weight[2], bias[2];
};
DEVICE Affine LoadAffine(const float* weight, const float* bias, int column) {
  return {{Load16(weight + column), Load16(weight + column + 4)}, {Load16(bias + column), Load16(bias + column + 4)}};
}
DEVICE float At(const Vector16 (&vectors)[2], int j) { return BitsToFloat(vectors[j / 4].words[j % 4]); }

// One block per row, which stays in registers: at most kVectors times 8 columns a thread.
template <int kVectors>
KERNEL(kRowThreads)
LayerNormKernel(const Bf16* in, const float* weight, const float* bias, float eps, int cols, Bf16* out, Fp8Rows coded) {
  constexpr bool kEarly = kVectors <= 2;  // weights are fetched first; for more there are not the registers
  constexpr int kStep = kRowThreads * 8;
  float* scratch = reinterpret_cast<float*>(SharedMemory());
  const int64_t offset = static_cast<int64_t>(BlockIndex().x) * cols;
  const int first = static_cast<int>(ThreadIndex().x) * 8;
  Affine affine[kEarly ? kVectors : 1];
  UNROLL
  for (int n = 0; kEarly && n < kVectors; ++n) {
    if (first + n * kStep < cols) affine[n] = LoadAffine(weight, bias, first + n * kStep);
  }
  BeginKernel();  // nobody writes weights: they may be under way before the kernels in front are done
  float x[kVectors][8] = {};
  float sum = 0.0f;
  UNROLL
  for (int n = 0; n < kVectors; ++n) {
    if (first + n * kStep < cols) Unpack(Load16(in + offset + first + n * kStep), x[n]);
  }
  UNROLL
  for (int i = 0; i < kVectors * 8; ++i) {
    if (first + i / 8 * kStep < cols) sum += x[i / 8][i % 8];
  }
  const float mean = BlockSum(sum, scratch) / static_cast<float>(cols);
  float squares = 0.0f;
  UNROLL
  for (int i = 0; i < kVectors * 8; ++i) {
    const float centred = x[i / 8][i % 8] - mean;
    if (first + i / 8 * kStep < cols) squares = FusedMultiplyAdd(centred, centred, squares);
  }
  const float scale = ReciprocalSqrt(BlockSum(squares, scratch) / static_cast<float>(cols) + eps);
  Vector16 normed[kVectors];
  UNROLL
  for (int n = 0; n < kVectors; ++n) {
    normed[n] = Vector16{};
    const int column = first + n * kStep;
    if (column >= cols) continue;
    if (!kEarly) affine[0] = LoadAffine(weight, bias, column);
    const Affine& a = affine[kEarly ? n : 0];
    float y[8];
    UNROLL
    for (int j = 0; j < 8; ++j) y[j] = (x[n][j] - mean) * scale * (1.0f + At(a.weight, j)) + At(a.bias, j);
    normed[n] = Pack(y);
    Store16(out + offset + column, normed[n]);
  }
  if (coded.codes == nullptr) return;  // the whole block
  RowScale row;
  UNROLL
  for (int n = 0; n < kVectors; ++n) row.Add(normed[n]);
  const float inverse = row.Finish<kRowWarps>(scratch, coded.scales + BlockIndex().x);
  UNROLL
  for (int n = 0; n < kVectors; ++n) {
    if (first + n * kStep < cols) StoreCodes(normed[n], inverse, coded.codes + offset + first + n * kStep);
  }
}

KERNEL(kRowThreads) SquaredReluKernel(Bf16* x, int64_t count) {
  BeginKernel();
  const int64_t i = (static_cast<int64_t>(BlockIndex().x) * kRowThreads + ThreadIndex().x) * 8;
  if (i >= count) return;
  Store16(x + i, SquaredReluOf(Load16(x + i)));
}

// The queries of row t that belong to one key/value head. Rotated pairs are (j, j + half) of each head.
DEVICE void RotateQueries(const RopeParams& p, int64_t t, int kv_head, const float* cosines, const float* sines) {
  const int half = p.rotary_dim / 2, group_size = p.num_query_heads / p.cache.num_kv_heads;
  Bf16* q = p.q + t * p.q_stride + int64_t{kv_head} * group_size * p.head_dim;
  for (int i = static_cast<int>(ThreadIndex().x); i < group_size * half; i += kRowThreads) {
    const int j = i % half;
    Bf16* head = q + i / half * p.head_dim;
    const float low = ToFloat(head[j]), high = ToFloat(head[j + half]);
    head[j] = ToBf16(low * cosines[j] - high * sines[j]);
    head[j + half] = ToBf16(high * cosines[j] + low * sines[j]);
  }
}

// Dim `dim` of a head's key, rotated.
DEVICE float RotatedKey(const Bf16* key, int dim, int rotary_dim, const float* cosines, const float* sines) {
  const int half = rotary_dim / 2;
  if (dim >= rotary_dim) return ToFloat(key[dim]);
  if (dim < half) return ToFloat(key[dim]) * cosines[dim] - ToFloat(key[dim + half]) * sines[dim];
  return ToFloat(key[dim]) * cosines[dim - half] + ToFloat(key[dim - half]) * sines[dim - half];
}

// Where the row of head 0 lies in the cache, in rows; the next head's is a block's tokens further.
DEVICE int64_t CacheRow(const KvCacheView& cache, int64_t slot) {
  const int64_t block = slot >> cache.block_shift;
  return ((block * cache.num_kv_heads) << cache.block_shift) + (slot & ((1 << cache.block_shift) - 1));
}

// Grid (rows, key/value heads): each step is one load deep whatever the number of heads.
KERNEL(kRowThreads) RopeKernel(RopeParams p) {
  BeginKernel();
  const int64_t t = BlockIndex().x;
  const int head = static_cast<int>(BlockIndex().y);
  const int half = p.rotary_dim / 2;
  const float* cosines = p.cosines + int64_t{p.positions[t]} * half;
  const float* sines = p.sines + int64_t{p.positions[t]} * half;
  RotateQueries(p, t, head, cosines, sines);
  const int64_t row = CacheRow(p.cache, p.slot_mapping[t]) + (int64_t{head} << p.cache.block_shift);
  const int64_t from = t * p.kv_stride + int64_t{head} * p.head_dim;
  for (int dim = static_cast<int>(ThreadIndex().x); dim < p.head_dim; dim += kRowThreads) {
    p.cache.keys[row * p.head_dim + dim] = ToBf16(RotatedKey(p.k + from, dim, p.rotary_dim, cosines, sines));
    p.cache.values[row * p.head_dim + dim] = p.v[from + dim];
  }
}

// The same into a cache of E4M3: one warp per key or value of a head, which shares an exponent.
template <int kHeadDim>
KERNEL(kRowThreads)
RopeFp8Kernel(RopeParams p) {
  BeginKernel();
  constexpr int kDims = kHeadDim / 32;  // of a lane
  const int64_t t = BlockIndex().x;
  const int head = static_cast<int>(BlockIndex().y);
  const int half = p.rotary_dim / 2;
  const float* cosines = p.cosines + int64_t{p.positions[t]} * half;
  const float* sines = p.sines + int64_t{p.positions[t]} * half;
  RotateQueries(p, t, head, cosines, sines);
  const int64_t to = CacheRow(p.cache, p.slot_mapping[t]) + (int64_t{head} << p.cache.block_shift);
  if (WarpIndex() < 2) {
    const bool is_value = WarpIndex() == 1;
    const Bf16* source = (is_value ? p.v : p.k) + t * p.kv_stride + int64_t{head} * kHeadDim;
    const int first = Lane() * kDims;
    float x[kDims];
    float largest = 0.0f;
    bool broken = false;
    UNROLL
    for (int d = 0; d < kDims; ++d) {
      x[d] = is_value ? ToFloat(source[first + d]) : RotatedKey(source, first + d, p.rotary_dim, cosines, sines);
      broken = broken || NotFinite(x[d]);
      const float magnitude = BitsToFloat(FloatBits(x[d]) & 0x7FFFFFFFu);
      largest = magnitude > largest ? magnitude : largest;
    }
    UNROLL
    for (int mask = 16; mask > 0; mask /= 2) {
      const float other = ShuffleXor(largest, mask);
      largest = other > largest ? other : largest;
    }
    broken = Any(broken);
    const int exponent = broken ? kBrokenRow : RowExponent(largest);
    const float inverse = InverseOfExponent(exponent);
    uint32_t bytes = 0;
    UNROLL
    for (int d = 0; d < kDims; ++d) bytes |= (broken ? 0u : EncodeE4m3(x[d] * inverse)) << (8 * d);
    uint8_t* destination = (is_value ? p.cache.fp8.values : p.cache.fp8.keys) + to * kHeadDim + first;
    if (kDims == 4) {
      *reinterpret_cast<uint32_t*>(destination) = bytes;
    } else {
      *reinterpret_cast<uint16_t*>(destination) = static_cast<uint16_t>(bytes);
    }
    if (Lane() == 0) {
      (is_value ? p.cache.fp8.value_exponents : p.cache.fp8.key_exponents)[to] = static_cast<int8_t>(exponent);
    }
  }
}

}  // namespace

cudaError_t CopyRows(const Bf16* table, const int32_t* rows, const int32_t* previous, int num_rows, int cols, Bf16* out,
                     LaunchStream stream) {
  if (cols % 8 != 0) return cudaErrorInvalidValue;
  return Launch(&CopyRowsKernel, {static_cast<unsigned>(num_rows)}, {kRowThreads}, 0, stream, table, rows, previous,
                cols, out);
}

cudaError_t LayerNorm1p(const Bf16* x, const float* weight, const float* bias, float eps, int num_rows, int cols,
                        Bf16* out, LaunchStream stream, Fp8Rows coded) {
  if (cols % 8 != 0 || cols > kMaxNormCols) return cudaErrorInvalidValue;
  constexpr int kStep = kRowThreads * 8;
  static_assert(kMaxNormCols == 12 * kStep);
  const auto kernel = cols <= 2 * kStep   ? &LayerNormKernel<2>
                      : cols <= 4 * kStep ? &LayerNormKernel<4>
                                          : &LayerNormKernel<12>;
  return Launch(kernel, {static_cast<unsigned>(num_rows)}, {kRowThreads}, 2 * kRowWarps * sizeof(float), stream, x,
                weight, bias, eps, cols, out, coded);
}

cudaError_t SquaredRelu(Bf16* x, int64_t count, LaunchStream stream) {
  if (count % 8 != 0) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>((count / 8 + kRowThreads - 1) / kRowThreads);
  return Launch(&SquaredReluKernel, {blocks}, {kRowThreads}, 0, stream, x, count);
}

cudaError_t RopeAndStoreKv(const RopeParams& params, int num_rows, LaunchStream stream) {
  const Dim3 grid = {static_cast<unsigned>(num_rows), static_cast<unsigned>(params.cache.num_kv_heads)};
  if (params.cache.keys != nullptr) return Launch(&RopeKernel, grid, {kRowThreads}, 0, stream, params);
  if (params.head_dim == 128) return Launch(&RopeFp8Kernel<128>, grid, {kRowThreads}, 0, stream, params);
  if (params.head_dim == 64) return Launch(&RopeFp8Kernel<64>, grid, {kRowThreads}, 0, stream, params);
  return cudaErrorInvalidValue;
}

}  // namespace minitron::engine::cuda
