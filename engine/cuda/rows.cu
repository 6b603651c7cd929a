// Ops on rows one by one: copies, LayerNorm, activation, rotary embedding with the cache write.
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
LayerNormKernel(Bf16* residual, const Bf16* delta, const float* weight, const float* bias, float eps, int cols,
                Bf16* out) {
  float* scratch = reinterpret_cast<float*>(SharedMemory());
  float* row = scratch + 2 * kRowWarps;
  const int64_t offset = static_cast<int64_t>(BlockIndex().x) * cols;
  const int first = static_cast<int>(ThreadIndex().x) * 8;
  float sum = 0.0f;
  for (int i = first; i < cols; i += kRowThreads * 8) {
    float x[8];
    Unpack(Load16(residual + offset + i), x);
    if (delta != nullptr) {
      float d[8];
      Unpack(Load16(delta + offset + i), d);
      UNROLL
      for (int j = 0; j < 8; ++j) x[j] += d[j];
      const Vector16 rounded = Pack(x);
      Store16(residual + offset + i, rounded);
      Unpack(rounded, x);
    }
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

// One block per row. Rotated pairs are (j, j + half) of each head.
KERNEL(kRowThreads) RopeKernel(RopeParams p) {
  const int64_t t = BlockIndex().x;
  const int thread = static_cast<int>(ThreadIndex().x);
  const int half = p.rotary_dim / 2, num_kv_heads = p.cache.num_kv_heads;
  const float* cosines = p.cosines + int64_t{p.positions[t]} * half;
  const float* sines = p.sines + int64_t{p.positions[t]} * half;
  Bf16* q = p.q + t * p.num_query_heads * p.head_dim;
  for (int i = thread; i < p.num_query_heads * half; i += kRowThreads) {
    const int j = i % half;
    Bf16* head = q + i / half * p.head_dim;
    const float low = ToFloat(head[j]), high = ToFloat(head[j + half]);
    head[j] = ToBf16(low * cosines[j] - high * sines[j]);
    head[j + half] = ToBf16(high * cosines[j] + low * sines[j]);
  }
  const int64_t slot = p.slot_mapping[t];
  const int64_t block = slot >> p.cache.block_shift;
  const int64_t offset = slot & ((1 << p.cache.block_shift) - 1);
  const Bf16* k = p.k + t * num_kv_heads * p.head_dim;
  const Bf16* v = p.v + t * num_kv_heads * p.head_dim;
  for (int i = thread; i < num_kv_heads * p.head_dim; i += kRowThreads) {
    const int head = i / p.head_dim, dim = i % p.head_dim;
    const int64_t to = (((block * num_kv_heads + head) << p.cache.block_shift) + offset) * p.head_dim + dim;
    Bf16 key = k[i];
    if (dim < half) {
      key = ToBf16(ToFloat(k[i]) * cosines[dim] - ToFloat(k[i + half]) * sines[dim]);
    } else if (dim < p.rotary_dim) {
      key = ToBf16(ToFloat(k[i]) * cosines[dim - half] + ToFloat(k[i - half]) * sines[dim - half]);
    }
    p.cache.keys[to] = key;
    p.cache.values[to] = v[i];
  }
}

}  // namespace

cudaError_t CopyRows(const Bf16* table, const int32_t* rows, const int32_t* previous, int num_rows, int cols, Bf16* out,
                     cudaStream_t stream) {
  if (cols % 8 != 0) return cudaErrorInvalidValue;
  return Launch(&CopyRowsKernel, {static_cast<unsigned>(num_rows)}, {kRowThreads}, 0, stream, table, rows, previous,
                cols, out);
}

cudaError_t AddLayerNorm1p(Bf16* residual, const Bf16* delta, const float* weight, const float* bias, float eps,
                           int num_rows, int cols, Bf16* out, cudaStream_t stream) {
  if (cols % 8 != 0 || cols > kMaxNormCols) return cudaErrorInvalidValue;
  const size_t shared_bytes = (static_cast<size_t>(cols) + 2 * kRowWarps) * sizeof(float);
  return Launch(&LayerNormKernel, {static_cast<unsigned>(num_rows)}, {kRowThreads}, shared_bytes, stream, residual,
                delta, weight, bias, eps, cols, out);
}

cudaError_t SquaredRelu(Bf16* x, int64_t count, cudaStream_t stream) {
  if (count % 8 != 0) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>((count / 8 + kRowThreads - 1) / kRowThreads);
  return Launch(&SquaredReluKernel, {blocks}, {kRowThreads}, 0, stream, x, count);
}

cudaError_t RopeAndStoreKv(const RopeParams& params, int num_rows, cudaStream_t stream) {
  return Launch(&RopeKernel, {static_cast<unsigned>(num_rows)}, {kRowThreads}, 0, stream, params);
}

}  // namespace minitron::engine::cuda
