#include "engine/cuda/cuda_backend.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/cuda/cublaslt_matmul.h"
#include "engine/cuda/cuda_model_runner.h"

namespace minitron::engine::cuda {

absl::Status ProbeDevice() { return OpenDevice().status(); }

absl::StatusOr<std::unique_ptr<ModelRunner>> CreateCudaBackend(const NemotronConfig& config,
                                                               const NemotronWeights& weights, RunnerLimits limits,
                                                               const CudaBackendOptions& options) {
  ASSIGN_OR_RETURN(const DeviceInfo device, OpenDevice());
  const int64_t kv_cache_bytes = options.kv_cache_bytes;
  const int64_t block_bytes = KvBytesPerToken(config, limits.kv_cache_type) * limits.block_size;
  limits.num_kv_blocks = static_cast<int>(std::min<int64_t>(kv_cache_bytes / block_bytes, INT32_MAX));
  if (kv_cache_bytes > 0 && limits.num_kv_blocks < 2) {
    return absl::ResourceExhaustedError(absl::StrCat("KV cache: ", kv_cache_bytes, " bytes hold ", limits.num_kv_blocks,
                                                     " blocks of ", block_bytes, " bytes; at least 2 are needed"));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<MatMul> matmul, CreateCublasLtMatMul({.tuning_file = options.tuning_file}));
  return CreateCudaModelRunner(config, weights, limits, device, std::move(matmul),
                               {.quantization = options.quantization, .early_launch = options.early_launch});
}

}  // namespace minitron::engine::cuda
