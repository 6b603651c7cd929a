// MatMul: the matrix products of the CUDA backend behind an interface, because the library that does them fast cannot
// run without a device.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cuda/device.h"
#include "engine/cuda/kernels.h"

namespace minitron::engine::cuda {

// Engine thread only.
class MatMul {
 public:
  virtual ~MatMul() = default;
  // out = x * w^T, or out += x * w^T, sums in fp32, rounded once; enqueued on `stream`, which may be capturing.
  //   x [rows, depth], w [outs, depth], out [rows, outs]; device memory, 16-byte aligned
  // Once a shape has been seen it allocates nothing. Error: INTERNAL when the device or the library failed.
  virtual absl::Status Run(const Bf16* x, const Bf16* w, int rows, int outs, int depth, Store store, Bf16* out,
                           cudaStream_t stream) = 0;
  virtual absl::Status Run(const Bf16* x, const Bf16* w, int rows, int outs, int depth, float* out,
                           cudaStream_t stream) = 0;

  // The same with both in E4M3, computed in 8 bits. Requires: PrepareFp8, depth and outs multiples of 16.
  virtual absl::Status Run(const Fp8Matrix& x, const Fp8Matrix& w, int rows, int outs, int depth, Store store,
                           Bf16* out, cudaStream_t stream) = 0;
  // Where the next such product's x goes, the same place each time. Error: INTERNAL for more than was prepared.
  virtual absl::StatusOr<Fp8Rows> RowsForFp8(int rows, int depth) = 0;
  // Allocates what products in E4M3 of at most this size need. Errors: FAILED_PRECONDITION when the device or the
  // library has none, RESOURCE_EXHAUSTED, INTERNAL.
  virtual absl::Status PrepareFp8(int max_rows, int max_outs, int max_depth) = 0;

  // Device memory it holds.
  virtual int64_t workspace_bytes() const = 0;
};

// One order of summation per output whatever the shape; slow. For the emulation and as the yardstick on a device.
std::unique_ptr<MatMul> CreateReferenceMatMul();

}  // namespace minitron::engine::cuda
