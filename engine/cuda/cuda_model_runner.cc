#include "engine/cuda/cuda_model_runner.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/log.h"
#include "engine/base/status_macros.h"
#include "engine/cuda/cuda_ops.h"
#include "engine/cuda/device_weights.h"

namespace minitron::engine::cuda {
namespace {

using Runner = ModelRunnerImpl<CudaOps>;

ModelInfo Describe(const NemotronConfig& config, const NemotronWeights& weights, const NemotronWeights& on_device,
                   int64_t weight_bytes, const RunnerLimits& limits) {
  ModelInfo info = DescribeModel(config, weights, limits.max_context_tokens);
  info.backend = "cuda";
  info.weight_type = DTypeName(on_device.layers[0].q_proj.dtype);
  info.weight_bytes = weight_bytes;
  info.kv_bytes_per_token = KvBytesPerToken(config, limits.kv_cache_type);
  return info;
}

absl::Status PrepareFp8(const NemotronConfig& config, const RunnerLimits& limits, const DeviceInfo& device,
                        MatMul& matmul) {
  if (device.compute_capability < kFp8ComputeCapability) {
    return absl::FailedPreconditionError(
        absl::StrFormat("quantization fp8-dynamic needs compute capability 8.9 for products in fp8, device 0 has %.1f; "
                        "quantization fp8 has weights of the same size",
                        device.compute_capability / 10.0));
  }
  const int qkv_width = config.query_width() + 2 * config.key_value_width();
  const int max_outs = std::max({qkv_width, config.intermediate_size, config.hidden_size});
  const int max_depth = std::max({config.hidden_size, config.query_width(), config.intermediate_size});
  return matmul.PrepareFp8(limits.max_num_tokens, max_outs, max_depth);
}

}  // namespace

absl::StatusOr<DeviceInfo> OpenDevice() {
  int count = 0;
  RETURN_IF_ERROR(ToStatus(cudaGetDeviceCount(&count), "look for a device"));
  RETURN_IF_ERROR(ToStatus(cudaSetDevice(0), "take device 0"));
  cudaDeviceProp properties = {};
  RETURN_IF_ERROR(ToStatus(cudaGetDeviceProperties(&properties, 0), "device properties"));
  size_t free_bytes = 0, total_bytes = 0;
  RETURN_IF_ERROR(ToStatus(cudaMemGetInfo(&free_bytes, &total_bytes), "memory info"));
  const DeviceInfo info{.compute_capability = 10 * properties.major + properties.minor,
                        .num_processors = properties.multiProcessorCount,
                        .free_bytes = static_cast<int64_t>(free_bytes),
                        .total_bytes = static_cast<int64_t>(total_bytes)};
  if (info.compute_capability < kMinComputeCapability) {
    return absl::FailedPreconditionError(absl::StrCat("cuda: device 0 (", properties.name, ") has compute capability ",
                                                      properties.major, ".", properties.minor, ", below 8.0"));
  }
  base::LogInfo(absl::StrCat("cuda device=", properties.name, " compute_capability=", properties.major, ".",
                             properties.minor, " processors=", info.num_processors, " free_mib=", free_bytes >> 20,
                             " total_mib=", total_bytes >> 20));
  return info;
}

int64_t KvBytesPerToken(const NemotronConfig& config, KvCacheType type) {
  const int64_t row_bytes = type == KvCacheType::kFp8 ? config.head_dim + 1 : 2 * config.head_dim;
  return int64_t{2} * config.num_layers * config.num_key_value_heads * row_bytes;
}

absl::StatusOr<std::unique_ptr<ModelRunner>> CreateCudaModelRunner(const NemotronConfig& config,
                                                                   const NemotronWeights& weights, RunnerLimits limits,
                                                                   const DeviceInfo& device,
                                                                   std::unique_ptr<MatMul> matmul,
                                                                   const CudaRunnerOptions& options) {
  const Quantization quantization = options.quantization;
  RETURN_IF_ERROR(CudaOps::CheckShapes(config, limits));
  RETURN_IF_ERROR(DeviceWeights::CheckShapes(config, weights, quantization));
  if (quantization == Quantization::kFp8Dynamic) RETURN_IF_ERROR(PrepareFp8(config, limits, device, *matmul));
  size_t free_bytes = 0, total_bytes = 0;
  RETURN_IF_ERROR(ToStatus(cudaMemGetInfo(&free_bytes, &total_bytes), "memory info"));
  const DeviceMemory memory{static_cast<int64_t>(free_bytes), static_cast<int64_t>(total_bytes)};
  const int64_t matmul_bytes = matmul->workspace_bytes();
  ASSIGN_OR_RETURN(const MemoryPlan plan, PlanMemory(config, DeviceWeights::NumBytes(weights, quantization), limits,
                                                     matmul->workspace_bytes(), memory));
  limits.num_kv_blocks = plan.num_kv_blocks;
  LogPlan(plan, limits, memory);
  ASSIGN_OR_RETURN(DeviceWeights uploaded, DeviceWeights::Upload(weights, quantization));
  const auto owner = std::make_shared<const DeviceWeights>(std::move(uploaded));
  ASSIGN_OR_RETURN(std::unique_ptr<CudaOps> ops,
                   CudaOps::Create(config, limits, std::move(matmul),
                                   {.num_processors = device.num_processors,
                                    .early_launch = options.early_launch,
                                    .fp8_products = quantization == Quantization::kFp8Dynamic}));
  const CudaOps& borrowed = *ops;
  auto runner =
      std::make_unique<Runner>(std::move(ops), config, owner->weights(), owner,
                               Describe(config, weights, owner->weights(), owner->num_bytes(), limits), limits);
  RETURN_IF_ERROR(borrowed.status());
  RETURN_IF_ERROR(ToStatus(cudaMemGetInfo(&free_bytes, &total_bytes), "memory info"));
  LogRest(plan, matmul_bytes, memory, static_cast<int64_t>(free_bytes));
  return runner;
}

}  // namespace minitron::engine::cuda
