#include "engine/cuda/fp8_scratch.h"

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace minitron::engine::cuda {

absl::StatusOr<Fp8Scratch> Fp8Scratch::Allocate(int max_rows, int max_outs, int max_depth, int64_t product_bytes) {
  Fp8Scratch scratch;
  ASSIGN_OR_RETURN(scratch.codes_, DeviceBuffer<uint8_t>::Allocate(int64_t{max_rows} * max_depth));
  ASSIGN_OR_RETURN(scratch.scales_, DeviceBuffer<float>::Allocate(max_rows));
  if (product_bytes == 0) return scratch;
  const int64_t row_bytes = int64_t{max_outs} * static_cast<int64_t>(sizeof(float));
  const int64_t rows = std::clamp<int64_t>(product_bytes / row_bytes, 1, max_rows);
  ASSIGN_OR_RETURN(scratch.product_, DeviceBuffer<float>::Allocate(rows * max_outs));
  return scratch;
}

absl::StatusOr<Fp8Rows> Fp8Scratch::Rows(int rows, int depth) {
  if (rows > scales_.size() || int64_t{rows} * depth > codes_.size()) {
    return absl::InternalError(
        absl::StrCat("fp8 product: no room for ", rows, " rows of ", depth, " activations; see PrepareFp8"));
  }
  return Fp8Rows{codes_.data(), scales_.data()};
}

}  // namespace minitron::engine::cuda
