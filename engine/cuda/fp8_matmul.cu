// Products in E4M3: activations brought to it row by row, the scaling of a product that was computed without scales,
// and the reference product.
#include "engine/cuda/e4m3.cuh"
#include "engine/cuda/kernels.h"

namespace minitron::engine::cuda {
namespace {

constexpr int kFp8Threads = 256;
constexpr int kFp8Warps = kFp8Threads / 32;

// The largest of the block's values and whether any is broken, the same in every thread.
DEVICE float BlockMax(float value, bool& broken, float* scratch) {
  UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = ShuffleXor(value, mask);
    value = other > value ? other : value;
  }
  broken = Any(broken);
  if (Lane() == 0) {
    scratch[WarpIndex()] = value;
    scratch[kFp8Warps + WarpIndex()] = broken ? 1.0f : 0.0f;
  }
  SyncThreads();
  UNROLL
  for (int w = 0; w < kFp8Warps; ++w) {
    value = scratch[w] > value ? scratch[w] : value;
    broken = broken || scratch[kFp8Warps + w] != 0.0f;
  }
  return value;
}

// One block per row, which is read twice: the second time from the cache.
KERNEL(kFp8Threads) QuantizeRowsKernel(const Bf16* x, int cols, uint8_t* codes, float* scales) {
  const int64_t row = BlockIndex().x;
  x += row * cols;
  codes += row * cols;
  const int first = static_cast<int>(ThreadIndex().x) * 8;
  float largest = 0.0f;
  bool broken = false;
  for (int i = first; i < cols; i += kFp8Threads * 8) {
    const Vector16 vector = Load16(x + i);
    UNROLL
    for (int j = 0; j < 8; ++j) {
      const uint32_t pair = vector.words[j / 2];
      const float value = j % 2 == 0 ? LowHalf(pair) : HighHalf(pair);
      const float magnitude = BitsToFloat(FloatBits(value) & 0x7FFFFFFFu);
      broken = broken || NotFinite(value);
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  largest = BlockMax(largest, broken, reinterpret_cast<float*>(SharedMemory()));
  const float inverse = largest > 0.0f && !broken ? kMaxE4m3 / largest : 0.0f;
  for (int i = first; i < cols; i += kFp8Threads * 8) {
    const Vector16 vector = Load16(x + i);
    uint32_t bytes[2] = {};
    UNROLL
    for (int j = 0; j < 8; ++j) {
      const uint32_t pair = vector.words[j / 2];
      const float value = broken ? 0.0f : (j % 2 == 0 ? LowHalf(pair) : HighHalf(pair));
      bytes[j / 4] |= EncodeE4m3(value * inverse) << (8 * (j % 4));
    }
    uint32_t* destination = reinterpret_cast<uint32_t*>(codes + i);
    destination[0] = bytes[0];
    destination[1] = bytes[1];
  }
  constexpr uint32_t kNaN = 0x7FC00000u;
  if (ThreadIndex().x == 0) scales[row] = broken ? BitsToFloat(kNaN) : largest / kMaxE4m3;
}

KERNEL(kFp8Threads)
ScaleProductKernel(const float* product, const float* x_scales, const float* w_scales, int outs, int64_t count,
                   bool add, Bf16* out) {
  const int64_t i = (static_cast<int64_t>(BlockIndex().x) * kFp8Threads + ThreadIndex().x) * 8;
  if (i >= count) return;
  const float x_scale = x_scales[i / outs];
  w_scales += i % outs;
  const Vector16 before = add ? Load16(out + i) : Vector16{};
  Vector16 result;
  UNROLL
  for (int j = 0; j < 4; ++j) {
    float low = product[i + 2 * j] * (x_scale * w_scales[2 * j]);
    float high = product[i + 2 * j + 1] * (x_scale * w_scales[2 * j + 1]);
    if (add) {
      low += LowHalf(before.words[j]);
      high += HighHalf(before.words[j]);
    }
    result.words[j] = PackBf16(low, high);
  }
  Store16(out + i, result);
}

// The value of a code, 2^-120 times too small: its bits moved into an fp32. NaN where the code is no number.
DEVICE float ShiftedE4m3(uint8_t code) {
  if ((code & 0x7Fu) == 0x7Fu) return BitsToFloat(0x7FC00000u);
  return BitsToFloat((code & 0x80u) << 24 | (code & 0x7Fu) << 20);
}

KERNEL(kFp8Threads)
ReferenceFp8Kernel(const uint8_t* x, const uint8_t* w, int outs, int depth, float* product) {
  constexpr int kLanes = 8;  // interleaved partial sums, then added in order
  const int64_t output = static_cast<int64_t>(BlockIndex().x) * kFp8Threads + ThreadIndex().x;
  const int64_t row = BlockIndex().y;
  if (output >= outs) return;
  x += row * depth;
  w += output * depth;
  float sums[kLanes] = {};
  for (int i = 0; i < depth; i += kLanes) {
    UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] += ShiftedE4m3(x[i + lane]) * 0x1.0p120f * (ShiftedE4m3(w[i + lane]) * 0x1.0p120f);
    }
  }
  float sum = 0.0f;
  UNROLL
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  product[row * outs + output] = sum;
}

}  // namespace

cudaError_t QuantizeRows(const Bf16* x, int rows, int cols, uint8_t* codes, float* scales, cudaStream_t stream) {
  if (cols % 8 != 0) return cudaErrorInvalidValue;
  return Launch(&QuantizeRowsKernel, {static_cast<unsigned>(rows)}, {kFp8Threads}, 2 * kFp8Warps * sizeof(float),
                stream, x, cols, codes, scales);
}

cudaError_t ScaleProduct(const float* product, const float* x_scales, const float* w_scales, int rows, int outs,
                         Store store, Bf16* out, cudaStream_t stream) {
  if (outs % 8 != 0) return cudaErrorInvalidValue;
  const int64_t count = int64_t{rows} * outs;
  const auto blocks = static_cast<unsigned>((count / 8 + kFp8Threads - 1) / kFp8Threads);
  return Launch(&ScaleProductKernel, {blocks}, {kFp8Threads}, 0, stream, product, x_scales, w_scales, outs, count,
                store == Store::kAdd, out);
}

cudaError_t ReferenceFp8MatMul(const uint8_t* x, const uint8_t* w, int rows, int outs, int depth, float* product,
                               cudaStream_t stream) {
  if (depth % 8 != 0 || rows > 65535) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>((outs + kFp8Threads - 1) / kFp8Threads);
  return Launch(&ReferenceFp8Kernel, {blocks, static_cast<unsigned>(rows)}, {kFp8Threads}, 0, stream, x, w, outs, depth,
                product);
}

}  // namespace minitron::engine::cuda
