#include "engine/cuda/matmul.h"

#include "engine/base/status_macros.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/fp8_scratch.h"
#include "engine/cuda/kernels.h"

namespace minitron::engine::cuda {
namespace {

constexpr int64_t kReferenceBytes = 1 << 20;

class ReferenceMatMulImpl final : public MatMul {
 public:
  absl::Status Run(const Bf16* x, const Bf16* w, int rows, int outs, int depth, Store store, Bf16* out,
                   cudaStream_t stream) override {
    return ToStatus(ReferenceMatMul(x, w, rows, outs, depth, store, out, stream), "matmul");
  }
  absl::Status Run(const Bf16* x, const Bf16* w, int rows, int outs, int depth, float* out,
                   cudaStream_t stream) override {
    return ToStatus(ReferenceMatMul(x, w, rows, outs, depth, out, stream), "matmul");
  }
  absl::Status Run(const Fp8Matrix& x, const Fp8Matrix& w, int rows, int outs, int depth, Store store, Bf16* out,
                   cudaStream_t stream) override {
    return fp8_.MultiplyThenScale(x, w, rows, outs, store, out, stream, [&](int first, int count, float* product) {
      return ToStatus(
          ReferenceFp8MatMul(x.codes + int64_t{first} * depth, w.codes, count, outs, depth, product, stream),
          "fp8 matmul");
    });
  }
  absl::StatusOr<Fp8Rows> RowsForFp8(int rows, int depth) override { return fp8_.Rows(rows, depth); }
  absl::Status PrepareFp8(int max_rows, int max_outs, int max_depth) override {
    ASSIGN_OR_RETURN(fp8_, Fp8Scratch::Allocate(max_rows, max_outs, max_depth, kReferenceBytes));
    return absl::OkStatus();
  }
  int64_t workspace_bytes() const override { return fp8_.num_bytes(); }

 private:
  Fp8Scratch fp8_;
};

}  // namespace

std::unique_ptr<MatMul> CreateReferenceMatMul() { return std::make_unique<ReferenceMatMulImpl>(); }

}  // namespace minitron::engine::cuda
