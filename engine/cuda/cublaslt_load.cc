// What needs the library itself: finding it, and the products over it.
#include <dlfcn.h>

#include <type_traits>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/cuda/cublaslt_library.h"

namespace minitron::engine::cuda {
namespace {

constexpr const char* kLibraryName = "libcublasLt.so." CUBLASLT_MAJOR;

}  // namespace

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
  find(library.config_get, "cublasLtMatmulAlgoConfigGetAttribute");
  if (!complete) return absl::FailedPreconditionError(absl::StrCat(kLibraryName, " lacks a function"));
  return library;
}

absl::StatusOr<std::unique_ptr<MatMul>> CreateCublasLtMatMul(const CublasLtOptions& options) {
  ASSIGN_OR_RETURN(const CublasLt library, CublasLt::Load());
  return CreateCublasLtMatMulOver(library, options);
}

}  // namespace minitron::engine::cuda
