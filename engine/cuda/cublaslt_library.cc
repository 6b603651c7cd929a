#include "engine/cuda/cublaslt_library.h"

#include "absl/strings/str_cat.h"

namespace minitron::engine::cuda {

absl::Status LtStatus(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  const std::string message = absl::StrCat("cublasLt: ", what, ": status ", static_cast<int>(status));
  return status == CUBLAS_STATUS_NOT_INITIALIZED ? absl::FailedPreconditionError(message)
                                                 : absl::InternalError(message);
}

LtProblem::LtProblem(const CublasLt& library, const LtShape& shape, const LtScales& scales) : library_(library) {
  const cudaDataType_t in_type = shape.fp8 ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
  const auto layout = [&](cublasLtMatrixLayout_t& to, cudaDataType_t type, int inner, int outer) {
    if (status_ == CUBLAS_STATUS_SUCCESS) status_ = library_.layout_create(&to, type, inner, outer, inner);
  };
  status_ = library_.desc_create(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  Set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  DescribeScales(scales);
  layout(w, in_type, shape.depth, shape.outs);
  layout(x, in_type, shape.depth, shape.rows);
  layout(out, shape.out_type, shape.outs, shape.rows);
}

void LtProblem::DescribeScales([[maybe_unused]] const LtScales& scales) {
#if CUBLAS_VER_MAJOR > 12 || (CUBLAS_VER_MAJOR == 12 && CUBLAS_VER_MINOR >= 9)
  if (scales.x == nullptr) return;
  constexpr int32_t kRows = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
  Set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, kRows);
  Set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, kRows);
  Set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, scales.w);
  Set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, scales.x);
#endif
}

LtProblem::~LtProblem() {
  if (out != nullptr) library_.layout_destroy(out);
  if (x != nullptr) library_.layout_destroy(x);
  if (w != nullptr) library_.layout_destroy(w);
  if (desc != nullptr) library_.desc_destroy(desc);
}

}  // namespace minitron::engine::cuda
