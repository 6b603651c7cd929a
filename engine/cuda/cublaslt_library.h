// cublasLt's functions, loaded when they are asked for, and one product as the library describes it. For
// cublaslt_matmul.cc and its tests, which bring functions of their own.
#pragma once

#if defined(MINITRON_CUDA_EMULATION)
#include "engine/cuda/emulation/cublaslt_api.h"
#else
#include <cublasLt.h>
#endif

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cuda/cublaslt_matmul.h"
#include "engine/cuda/kernels.h"

namespace minitron::engine::cuda {

// FAILED_PRECONDITION: no device; INTERNAL: anything else that is not success.
absl::Status LtStatus(cublasStatus_t status, const char* what);

// The library's functions. Never unloaded: its kernels may be part of recorded steps.
struct CublasLt {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtDestroy) destroy;
  decltype(&cublasLtGetVersion) version;
  decltype(&cublasLtMatmul) matmul;
  decltype(&cublasLtMatmulDescCreate) desc_create;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmulAlgoCheck) check;
  decltype(&cublasLtMatmulAlgoConfigGetAttribute) config_get;

  // Error: FAILED_PRECONDITION when the library is not there or lacks a function.
  static absl::StatusOr<CublasLt> Load();
};

// As CreateCublasLtMatMul, with a library that is loaded already.
absl::StatusOr<std::unique_ptr<MatMul>> CreateCublasLtMatMulOver(const CublasLt& library,
                                                                 const CublasLtOptions& options);

// out = x * w^T of these sizes, row-major; operands in bf16, or both in E4M3.
struct LtShape {
  int rows, outs, depth;
  cudaDataType_t out_type;
  Store store = Store::kReplace;
  bool fp8 = false;
};

// Scales of E4M3 operands: one for each row of x and of w, null: none. They belong to the description.
struct LtScales {
  const float* x = nullptr;
  const float* w = nullptr;
};

// Descriptors of out = x * w^T. To the library matrices are column-major: out^T [outs, rows] =
// (w^T)^T [depth, outs] * x^T [depth, rows], "TN", the only form its FP8 kernels take as well.
class LtProblem {
 public:
  LtProblem(const CublasLt& library, const LtShape& shape, const LtScales& scales);
  LtProblem(const LtProblem&) = delete;
  LtProblem& operator=(const LtProblem&) = delete;
  ~LtProblem();
  // Error: the library takes no such description.
  absl::Status status() const { return LtStatus(status_, "descriptors"); }

  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, out = nullptr;

 private:
  void DescribeScales(const LtScales& scales);
  template <typename T>
  void Set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    if (status_ == CUBLAS_STATUS_SUCCESS) status_ = library_.desc_set(desc, attribute, &value, sizeof(value));
  }

  const CublasLt& library_;
  cublasStatus_t status_ = CUBLAS_STATUS_SUCCESS;
};

// Whether this header knows scales for each row of both operands (12.9 and later).
#if CUBLAS_VER_MAJOR > 12 || (CUBLAS_VER_MAJOR == 12 && CUBLAS_VER_MINOR >= 9)
inline constexpr bool kHasRowScales = true;
#else
inline constexpr bool kHasRowScales = false;
#endif

}  // namespace minitron::engine::cuda
