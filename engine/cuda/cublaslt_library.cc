#include "engine/cuda/cublaslt_library.h"

#include <dlfcn.h>

#include <type_traits>

#include "absl/strings/str_cat.h"

namespace minitron::engine::cuda {
namespace {

constexpr const char* kLibraryName = "libcublasLt.so." CUBLASLT_MAJOR;

}  // namespace

absl::Status LtStatus(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  const std::string message = absl::StrCat("cublasLt: ", what, ": status ", static_cast<int>(status));
  return status == CUBLAS_STATUS_NOT_INITIALIZED ? absl::FailedPreconditionError(message)
                                                 : absl::InternalError(message);
}

absl::StatusOr<CublasLt> CublasLt::Load() {
  void* handle = dlopen(kLibraryName, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) handle = dlopen(CUBLASLT_FOLDER "/libcublasLt.so." CUBLASLT_MAJOR, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat("the cuda backend needs ", kLibraryName, ": ", dlerror()));
  }
  CublasLt library = {};
  bool complete = true;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
    complete &= function != nullptr;
  };
  find(library.create, "cublasLtCreate");
  find(library.destroy, "cublasLtDestroy");
  find(library.version, "cublasLtGetVersion");
  find(library.matmul, "cublasLtMatmul");
  find(library.desc_create, "cublasLtMatmulDescCreate");
  find(library.desc_destroy, "cublasLtMatmulDescDestroy");
  find(library.desc_set, "cublasLtMatmulDescSetAttribute");
  find(library.layout_create, "cublasLtMatrixLayoutCreate");
  find(library.layout_destroy, "cublasLtMatrixLayoutDestroy");
  find(library.preference_create, "cublasLtMatmulPreferenceCreate");
  find(library.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  find(library.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  find(library.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  find(library.check, "cublasLtMatmulAlgoCheck");
  if (!complete) return absl::FailedPreconditionError(absl::StrCat(kLibraryName, " lacks a function"));
  return library;
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
