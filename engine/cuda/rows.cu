// Ops on rows one by one: copies, LayerNorm, activation, rotary embedding with the cache write.
#include "engine/cuda/e4m3.cuh"
#include "engine/cuda/kernels.h"

namespace minitron::engine::cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / 32;

DEVICE void Unpack(const Vector16& vector, float (&values)[8]) {
  UNROLL
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = LowHalf(vector.words[i]);
    values[2 * i + 1] = HighHalf(vector.words[i]);
  }
}
DEVICE Vector16 Pack(const float (&values)[8]) {
  Vector16 vector;
  UNROLL
  for (int i = 0; i < 4; ++i) vector.words[i] = PackBf16(values[2 * i], values[2 * i + 1]);
  return vector;
}

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

// One block per row; the row stays in shared memory as fp32 between the passes.
KERNEL(kRowThreads)
LayerNormKernel(const Bf16* in, const float* weight, const float* bias, float eps, int cols, Bf16* out) {
  BeginKernel();
  float* scratch = reinterpret_cast<float*>(SharedMemory());
  float* row = scratch + 2 * kRowWarps;
  const int64_t offset = static_cast<int64_t>(BlockIndex().x) * cols;
  const int first = static_cast<int>(ThreadIndex().x) * 8;
  float sum = 0.0f;
  for (int i = first; i < cols; i += kRowThreads * 8) {
    float x[8];
    Unpack(Load16(in + offset + i), x);
    UNROLL
    for (int j = 0; j < 8; ++j) {
      row[i + j] = x[j];
      sum += x[j];
    }
  }
  const float mean = BlockSum(sum, scratch) / static_cast<float>(cols);
  float squares = 0.0f;
  for (int i = first; i < cols; i += kRowThreads * 8) {
    UNROLL
    for (int j = 0; j < 8; ++j) {
      const float centred = row[i + j] - mean;
      squares = FusedMultiplyAdd(centred, centred, squares);
    }
  }
  const float scale = ReciprocalSqrt(BlockSum(squares, scratch) / static_cast<float>(cols) + eps);
  for (int i = first; i < cols; i += kRowThreads * 8) {
    float y[8];
    UNROLL
    for (int j = 0; j < 8; ++j) y[j] = (row[i + j] - mean) * scale * (1.0f + weight[i + j]) + bias[i + j];
    Store16(out + offset + i, Pack(y));
  }
}

KERNEL(kRowThreads) SquaredReluKernel(Bf16* x, int64_t count) {
  BeginKernel();
  const int64_t i = (static_cast<int64_t>(BlockIndex().x) * kRowThreads + ThreadIndex().x) * 8;
  if (i >= count) return;
  float values[8];
  Unpack(Load16(x + i), values);
  UNROLL
  for (int j = 0; j < 8; ++j) {
    const float positive = values[j] < 0.0f ? 0.0f : values[j];  // NaN stays: a broken row must be reported
    values[j] = positive * positive;
  }
  Store16(x + i, Pack(values));
}

// The queries of row t. Rotated pairs are (j, j + half) of each head.
DEVICE void RotateQueries(const RopeParams& p, int64_t t, const float* cosines, const float* sines) {
  const int half = p.rotary_dim / 2;
  Bf16* q = p.q + t * p.q_stride;
  for (int i = static_cast<int>(ThreadIndex().x); i < p.num_query_heads * half; i += kRowThreads) {
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

// One block per row.
KERNEL(kRowThreads) RopeKernel(RopeParams p) {
  BeginKernel();
  const int64_t t = BlockIndex().x;
  const int thread = static_cast<int>(ThreadIndex().x);
  const int half = p.rotary_dim / 2, num_kv_heads = p.cache.num_kv_heads;
  const float* cosines = p.cosines + int64_t{p.positions[t]} * half;
  const float* sines = p.sines + int64_t{p.positions[t]} * half;
  RotateQueries(p, t, cosines, sines);
  const int64_t row = CacheRow(p.cache, p.slot_mapping[t]);
  const Bf16* k = p.k + t * p.kv_stride;
  const Bf16* v = p.v + t * p.kv_stride;
  for (int i = thread; i < num_kv_heads * p.head_dim; i += kRowThreads) {
    const int head = i / p.head_dim, dim = i % p.head_dim;
    const int64_t to = (row + (int64_t{head} << p.cache.block_shift)) * p.head_dim + dim;
    p.cache.keys[to] = ToBf16(RotatedKey(k + head * p.head_dim, dim, p.rotary_dim, cosines, sines));
    p.cache.values[to] = v[i];
  }
}

// The same into a cache of E4M3: one warp per key or value of a head, which shares an exponent.
template <int kHeadDim>
KERNEL(kRowThreads)
RopeFp8Kernel(RopeParams p) {
  BeginKernel();
  constexpr int kDims = kHeadDim / 32;  // of a lane
  const int64_t t = BlockIndex().x;
  const int half = p.rotary_dim / 2, num_kv_heads = p.cache.num_kv_heads;
  const float* cosines = p.cosines + int64_t{p.positions[t]} * half;
  const float* sines = p.sines + int64_t{p.positions[t]} * half;
  RotateQueries(p, t, cosines, sines);
  const int64_t row = CacheRow(p.cache, p.slot_mapping[t]);
  for (int i = WarpIndex(); i < 2 * num_kv_heads; i += kRowWarps) {
    const bool is_value = i >= num_kv_heads;
    const int head = is_value ? i - num_kv_heads : i;
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
    const int64_t to = row + (int64_t{head} << p.cache.block_shift);
    uint8_t* destination = (is_value ? p.cache.fp8.values : p.cache.fp8.keys) + to * kHeadDim + first;
    if (kDims == 4) {
      *reinterpret_cast<uint32_t*>(destination) = bytes;
    } else {
      *reinterpret_cast<uint16_t*>(destination) = static_cast<uint16_t>(bytes);
    }
    if (Lane() == 0)
      (is_value ? p.cache.fp8.value_exponents : p.cache.fp8.key_exponents)[to] = static_cast<int8_t>(exponent);
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
                        Bf16* out, LaunchStream stream) {
  if (cols % 8 != 0 || cols > kMaxNormCols) return cudaErrorInvalidValue;
  const size_t shared_bytes = (static_cast<size_t>(cols) + 2 * kRowWarps) * sizeof(float);
  return Launch(&LayerNormKernel, {static_cast<unsigned>(num_rows)}, {kRowThreads}, shared_bytes, stream, x, weight,
                bias, eps, cols, out);
}

cudaError_t SquaredRelu(Bf16* x, int64_t count, LaunchStream stream) {
  if (count % 8 != 0) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>((count / 8 + kRowThreads - 1) / kRowThreads);
  return Launch(&SquaredReluKernel, {blocks}, {kRowThreads}, 0, stream, x, count);
}

cudaError_t RopeAndStoreKv(const RopeParams& params, int num_rows, LaunchStream stream) {
  const Dim3 grid = {static_cast<unsigned>(num_rows)};
  if (params.cache.keys != nullptr) return Launch(&RopeKernel, grid, {kRowThreads}, 0, stream, params);
  if (params.head_dim == 128) return Launch(&RopeFp8Kernel<128>, grid, {kRowThreads}, 0, stream, params);
  if (params.head_dim == 64) return Launch(&RopeFp8Kernel<64>, grid, {kRowThreads}, 0, stream, params);
  return cudaErrorInvalidValue;
}

}  // namespace minitron::engine::cuda
