#include "tests/engine/cuda/fake_cublaslt.h"

#include <algorithm>
#include <cstring>

#include "engine/base/check.h"
#include "engine/cuda/kernels.h"

using minitron::engine::cuda::FakeAlgorithm;
using minitron::engine::cuda::TheLibrary;

// The library's opaque types.
struct EmulatedMatmulDesc {
  int32_t transpose_a = CUBLAS_OP_N;
  int32_t scale_modes[2] = {0, 0};
  const float* scales[2] = {nullptr, nullptr};
};
struct EmulatedMatrixLayout {
  cudaDataType type;
  int rows, cols;
};
struct EmulatedMatmulPreference {
  uint64_t workspace = 0;
  uint32_t mask = 7;
};
struct cublasLtContext {};

namespace minitron::engine::cuda {

FakeLibrary& TheLibrary() {
  static FakeLibrary library;
  return library;
}

namespace {

const FakeAlgorithm* Find(const cublasLtMatmulAlgo_t& algo) {
  for (const FakeAlgorithm& algorithm : TheLibrary().algorithms) {
    if (algorithm.id == algo.data[0]) return &algorithm;
  }
  return nullptr;
}

template <typename T>
cublasStatus_t Make(T** object, T value) {
  *object = new T(value);
  ++TheLibrary().num_live;
  return CUBLAS_STATUS_SUCCESS;
}
template <typename T>
cublasStatus_t Destroy(T* object) {
  delete object;
  --TheLibrary().num_live;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t SetDesc(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, const void* value,
                       size_t num_bytes) {
  const auto set = [&](auto& to) {
    CHECK(num_bytes == sizeof(to));
    std::memcpy(&to, value, num_bytes);
    return CUBLAS_STATUS_SUCCESS;
  };
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return set(desc->transpose_a);
    case CUBLASLT_MATMUL_DESC_A_SCALE_MODE:
      return set(desc->scale_modes[0]);
    case CUBLASLT_MATMUL_DESC_B_SCALE_MODE:
      return set(desc->scale_modes[1]);
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER:
      return set(desc->scales[0]);
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER:
      return set(desc->scales[1]);
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t SetPreference(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
                             const void* value, size_t num_bytes) {
  if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) {
    CHECK(num_bytes == sizeof(preference->workspace));
    std::memcpy(&preference->workspace, value, num_bytes);
  } else {
    CHECK(num_bytes == sizeof(preference->mask));
    std::memcpy(&preference->mask, value, num_bytes);
  }
  return CUBLAS_STATUS_SUCCESS;
}

// Whether there is any product for a description; aborts where it is not one of ours: w transposed, x not, both with
// the depth down, outputs down in the result.
bool IsSupported(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t w, cublasLtMatrixLayout_t x,
                 cublasLtMatrixLayout_t out) {
  CHECK(desc->transpose_a == CUBLAS_OP_T && w->rows == x->rows && out->rows == w->cols && out->cols == x->cols);
  CHECK(w->type == x->type && (out->type == CUDA_R_16BF || out->type == CUDA_R_32F));
  const bool fp8 = w->type == CUDA_R_8F_E4M3, scaled = desc->scales[0] != nullptr;
  CHECK(!scaled || (fp8 && desc->scales[1] != nullptr));
  for (const int32_t mode : desc->scale_modes) {
    CHECK(mode == (scaled ? CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F : 0));
  }
  if (fp8)
    return TheLibrary().has_fp8 && w->rows % 16 == 0 && w->cols % 16 == 0 && (!scaled || TheLibrary().has_row_scales);
  return true;
}

cublasStatus_t Heuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t w,
                         cublasLtMatrixLayout_t x, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t out,
                         cublasLtMatmulPreference_t preference, int most, cublasLtMatmulHeuristicResult_t* results,
                         int* count) {
  *count = 0;
  if (!IsSupported(desc, w, x, out)) return CUBLAS_STATUS_NOT_SUPPORTED;
  TheLibrary().masks.push_back(preference->mask);
  TheLibrary().asked_rows.push_back(x->cols);
  TheLibrary().workspace_bytes = preference->workspace;
  for (const FakeAlgorithm& algorithm : TheLibrary().algorithms) {
    const bool allowed = algorithm.reduction == 0 || (algorithm.reduction & preference->mask) != 0;
    if (*count == most || (!allowed && !algorithm.ignores_the_mask)) continue;
    results[*count] = {};
    results[(*count)++].algo.data[0] = algorithm.id;
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t Check(cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t w, cublasLtMatrixLayout_t x,
                     cublasLtMatrixLayout_t, cublasLtMatrixLayout_t out, const cublasLtMatmulAlgo_t* algo,
                     cublasLtMatmulHeuristicResult_t* result) {
  const FakeAlgorithm* algorithm = Find(*algo);
  if (algorithm == nullptr || algorithm->refused || !IsSupported(desc, w, x, out)) return CUBLAS_STATUS_NOT_SUPPORTED;
  *result = {};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t ConfigGet(const cublasLtMatmulAlgo_t* algo, cublasLtMatmulAlgoConfigAttributes_t attribute, void* value,
                         size_t num_bytes, size_t* num_written) {
  CHECK(attribute == CUBLASLT_ALGO_CONFIG_SPLITK_NUM && num_bytes == sizeof(int32_t));
  std::memcpy(value, &Find(*algo)->num_splits, num_bytes);
  *num_written = num_bytes;
  return CUBLAS_STATUS_SUCCESS;
}

// The product itself, by the reference kernels; `product` is work space.
cudaError_t Multiply(const EmulatedMatmulDesc& desc, const void* w, const void* x, Store store, cudaDataType out_type,
                     int rows, int outs, int depth, bool fp8, float* product, void* out, cudaStream_t stream) {
  if (!fp8) {
    const auto *weights = static_cast<const Bf16*>(w), *inputs = static_cast<const Bf16*>(x);
    if (out_type == CUDA_R_32F) {
      return ReferenceMatMul(inputs, weights, rows, outs, depth, static_cast<float*>(out), stream);
    }
    return ReferenceMatMul(inputs, weights, rows, outs, depth, store, static_cast<Bf16*>(out), stream);
  }
  const auto *codes = static_cast<const uint8_t*>(w), *inputs = static_cast<const uint8_t*>(x);
  if (out_type == CUDA_R_32F) {
    return ReferenceFp8MatMul(inputs, codes, rows, outs, depth, static_cast<float*>(out), stream);
  }
  CHECK(desc.scales[0] != nullptr);
  const cudaError_t error = ReferenceFp8MatMul(inputs, codes, rows, outs, depth, product, stream);
  if (error != cudaSuccess) return error;
  return ScaleProduct(product, desc.scales[1], desc.scales[0], rows, outs, store, static_cast<Bf16*>(out), stream);
}

cublasStatus_t MatMulCall(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha, const void* w,
                          cublasLtMatrixLayout_t w_layout, const void* x, cublasLtMatrixLayout_t x_layout,
                          const void* beta, const void* c, cublasLtMatrixLayout_t, void* out,
                          cublasLtMatrixLayout_t out_layout, const cublasLtMatmulAlgo_t* algo, void* workspace,
                          size_t workspace_bytes, cudaStream_t stream) {
  const FakeAlgorithm* algorithm = Find(*algo);
  CHECK(algorithm != nullptr && IsSupported(desc, w_layout, x_layout, out_layout) && c == out);
  CHECK(workspace != nullptr && workspace_bytes == TheLibrary().workspace_bytes);
  for (const void* operand : {w, x, static_cast<const void*>(out)})
    CHECK(reinterpret_cast<uintptr_t>(operand) % 16 == 0);
  const float scale = *static_cast<const float*>(alpha), add = *static_cast<const float*>(beta);
  CHECK(scale == 1.0f && (add == 0.0f || add == 1.0f));
  if (algorithm->fails) return CUBLAS_STATUS_EXECUTION_FAILED;
  const int rows = x_layout->cols, outs = w_layout->cols, depth = w_layout->rows;
  TheLibrary().products.push_back({algorithm->id, rows, outs, depth});
  const cudaError_t error =
      Multiply(*desc, w, x, add == 1.0f ? Store::kAdd : Store::kReplace, out_layout->type, rows, outs, depth,
               w_layout->type == CUDA_R_8F_E4M3, static_cast<float*>(workspace), out, stream);
  if (error != cudaSuccess) return CUBLAS_STATUS_EXECUTION_FAILED;
  const emulation::GridShape one{{1}, {1}, 0};
  const auto pass_time = [milliseconds = algorithm->milliseconds] { emulation::PassTime(milliseconds); };
  return emulation::EnqueueKernel(stream, one, pass_time) == cudaSuccess ? CUBLAS_STATUS_SUCCESS
                                                                         : CUBLAS_STATUS_EXECUTION_FAILED;
}

}  // namespace

CublasLt FakeFunctions() {
  CublasLt functions = {};
  functions.create = [](cublasLtHandle_t* handle) { return Make(handle, cublasLtContext{}); };
  functions.destroy = [](cublasLtHandle_t handle) { return Destroy(handle); };
  functions.version = [] { return TheLibrary().version; };
  functions.matmul = &MatMulCall;
  functions.desc_create = [](cublasLtMatmulDesc_t* desc, cublasComputeType_t, cudaDataType_t) {
    return Make(desc, EmulatedMatmulDesc{});
  };
  functions.desc_destroy = [](cublasLtMatmulDesc_t desc) { return Destroy(desc); };
  functions.desc_set = &SetDesc;
  functions.layout_create = [](cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows, uint64_t cols,
                               int64_t ld) {
    CHECK(ld == static_cast<int64_t>(rows));
    return Make(layout, EmulatedMatrixLayout{type, static_cast<int>(rows), static_cast<int>(cols)});
  };
  functions.layout_destroy = [](cublasLtMatrixLayout_t layout) { return Destroy(layout); };
  functions.preference_create = [](cublasLtMatmulPreference_t* preference) {
    return Make(preference, EmulatedMatmulPreference{});
  };
  functions.preference_destroy = [](cublasLtMatmulPreference_t preference) { return Destroy(preference); };
  functions.preference_set = &SetPreference;
  functions.heuristic = &Heuristic;
  functions.check = &Check;
  functions.config_get = &ConfigGet;
  return functions;
}

}  // namespace minitron::engine::cuda
