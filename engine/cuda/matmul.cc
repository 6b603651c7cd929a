#include "engine/cuda/matmul.h"

#include "engine/cuda/device_memory.h"
#include "engine/cuda/kernels.h"

namespace minitron::engine::cuda {
namespace {

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
  int64_t workspace_bytes() const override { return 0; }
};

}  // namespace

std::unique_ptr<MatMul> CreateReferenceMatMul() { return std::make_unique<ReferenceMatMulImpl>(); }

}  // namespace minitron::engine::cuda
