// Products in E4M3: activations brought to it row by row, the scaling of a product that was computed without scales,
// and the reference product.
#include "engine/cuda/fp8_rows.cuh"
#include "engine/cuda/kernels.h"

namespace minitron::engine::cuda {
namespace {

constexpr int kFp8Threads = 256;
constexpr int kFp8Warps = kFp8Threads / 32;

// What the row is before it is brought to E4M3: itself, or the bf16 its squared ReLU would have been stored as.
template <Activation kActivation>
DEVICE Vector16 Activated(const Bf16* x) {
  const Vector16 vector = Load16(x);
  return kActivation == Activation::kSquaredRelu ? SquaredReluOf(vector) : vector;
}

// One block per row, which is read twice: the second time from the cache.
template <Activation kActivation>
KERNEL(kFp8Threads)
QuantizeRowsKernel(const Bf16* x, int cols, Fp8Rows coded) {
  BeginKernel();
  const int64_t row = BlockIndex().x;
  x += row * cols;
  const int first = static_cast<int>(ThreadIndex().x) * 8;
  RowScale scale;
  UNROLL_BY(4)
  for (int i = first; i < cols; i += kFp8Threads * 8) scale.Add(Activated<kActivation>(x + i));
  const float inverse = scale.Finish<kFp8Warps>(reinterpret_cast<float*>(SharedMemory()), coded.scales + row);
  UNROLL_BY(4)
  for (int i = first; i < cols; i += kFp8Threads * 8) {
    StoreCodes(Activated<kActivation>(x + i), inverse, coded.codes + row * cols + i);
  }
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

cudaError_t QuantizeRows(const Bf16* x, Activation activation, int rows, int cols, Fp8Rows coded, LaunchStream stream) {
  if (cols % 8 != 0) return cudaErrorInvalidValue;
  const auto kernel = activation == Activation::kSquaredRelu ? &QuantizeRowsKernel<Activation::kSquaredRelu>
                                                             : &QuantizeRowsKernel<Activation::kNone>;
  return Launch(kernel, {static_cast<unsigned>(rows)}, {kFp8Threads}, 2 * kFp8Warps * sizeof(float), stream, x, cols,
                coded);
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
