// Fp8Scratch: device memory for products in E4M3: the activations' codes and scales and, where the library cannot
// scale, the product before it is scaled.
#pragma once

#include <algorithm>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/kernels.h"

namespace minitron::engine::cuda {

// Engine thread only. Empty when default-constructed.
class Fp8Scratch {
 public:
  // `product_bytes` bounds what is computed at a time when it is to be scaled afterwards (one row at least); 0: never.
  static absl::StatusOr<Fp8Scratch> Allocate(int max_rows, int max_outs, int max_depth, int64_t product_bytes);

  // Where activations [rows, depth] go. Error: INTERNAL for more than was allocated for.
  absl::StatusOr<Fp8Rows> Rows(int rows, int depth);

  // Calls multiply(first_row, num_rows, product) for a few rows at a time, then enqueues their scaling into `out`.
  template <typename Multiply>
  absl::Status MultiplyThenScale(const Fp8Matrix& x, const Fp8Matrix& w, int rows, int outs, Store store, Bf16* out,
                                 cudaStream_t stream, const Multiply& multiply) {
    const int most = static_cast<int>(std::min<int64_t>(rows, product_.size() / outs));
    if (most == 0) return absl::InternalError("fp8 product: more outputs than there is room for");
    for (int first = 0; first < rows; first += most) {
      const int count = std::min(most, rows - first);
      absl::Status status = multiply(first, count, product_.data());
      if (!status.ok()) return status;
      status = ToStatus(ScaleProduct(product_.data(), x.scales + first, w.scales, count, outs, store,
                                     out + int64_t{first} * outs, stream),
                        "scale product");
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  int64_t num_bytes() const {
    return codes_.size() + static_cast<int64_t>(sizeof(float)) * (scales_.size() + product_.size());
  }

 private:
  DeviceBuffer<uint8_t> codes_;
  DeviceBuffer<float> scales_, product_;
};

}  // namespace minitron::engine::cuda
