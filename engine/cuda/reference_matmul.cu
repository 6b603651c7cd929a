// The reference matrix product: one thread per output, one order of summation for every shape. What the emulation uses,
// and what cublasLt's results are compared with on a device.
#include "engine/cuda/kernels.h"

namespace minitron::engine::cuda {
namespace {

constexpr int kMatMulThreads = 128;
constexpr int kLanes = 8;  // interleaved partial sums, then added in order

DEVICE void StoreOutput(float value, bool, float* out) { *out = value; }
DEVICE void StoreOutput(float value, bool add, Bf16* out) { *out = ToBf16(add ? value + ToFloat(*out) : value); }

template <typename Output>
KERNEL(kMatMulThreads)
ReferenceMatMulKernel(const Bf16* x, const Bf16* w, int outs, int depth, bool add, Output* out) {
  const int64_t output = static_cast<int64_t>(BlockIndex().x) * kMatMulThreads + ThreadIndex().x;
  const int64_t row = BlockIndex().y;
  if (output >= outs) return;
  x += row * depth;
  w += output * depth;
  float sums[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= depth; i += kLanes) {
    UNROLL
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += ToFloat(x[i + lane]) * ToFloat(w[i + lane]);
  }
  for (; i < depth; ++i) sums[i % kLanes] += ToFloat(x[i]) * ToFloat(w[i]);
  float sum = 0.0f;
  UNROLL
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  StoreOutput(sum, add, out + row * outs + output);
}

template <typename Output>
cudaError_t LaunchMatMul(const Bf16* x, const Bf16* w, int rows, int outs, int depth, Store store, Output* out,
                         cudaStream_t stream) {
  constexpr int kMaxRowsPerLaunch = 65535;  // of grid dimension y
  for (int64_t first = 0; first < rows; first += kMaxRowsPerLaunch) {
    const auto count = static_cast<unsigned>(rows - first < kMaxRowsPerLaunch ? rows - first : kMaxRowsPerLaunch);
    const auto blocks = static_cast<unsigned>((outs + kMatMulThreads - 1) / kMatMulThreads);
    const cudaError_t error = Launch(&ReferenceMatMulKernel<Output>, {blocks, count}, {kMatMulThreads}, 0, stream,
                                     x + first * depth, w, outs, depth, store == Store::kAdd, out + first * outs);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t ReferenceMatMul(const Bf16* x, const Bf16* w, int rows, int outs, int depth, Store store, Bf16* out,
                            cudaStream_t stream) {
  return LaunchMatMul(x, w, rows, outs, depth, store, out, stream);
}
cudaError_t ReferenceMatMul(const Bf16* x, const Bf16* w, int rows, int outs, int depth, float* out,
                            cudaStream_t stream) {
  return LaunchMatMul(x, w, rows, outs, depth, Store::kReplace, out, stream);
}

}  // namespace minitron::engine::cuda
