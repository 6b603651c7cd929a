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

// Left free: the driver's own needs (graphs, lazily loaded kernels) are not known in advance.
constexpr int64_t kReserveBytes = int64_t{1} << 30;

ModelInfo Describe(const NemotronConfig& config, const NemotronWeights& weights, int64_t weight_bytes,
                   const RunnerLimits& limits) {
  ModelInfo info = DescribeModel(config, weights, limits.max_context_tokens);
  info.backend = "cuda";
  info.weight_type = DTypeName(DType::kBf16);
  info.weight_bytes = weight_bytes;
  info.kv_bytes_per_token = KvBytesPerToken(config);
  return info;
}

void LogMemory(const std::vector<MemoryUse>& uses, int64_t weight_bytes, int64_t workspace_bytes,
               const RunnerLimits& limits) {
  constexpr double kMiB = 1 << 20;
  int64_t total = weight_bytes + workspace_bytes;
  std::string line = absl::StrFormat("device memory MiB: weights=%.1f matmul_workspace=%.1f", weight_bytes / kMiB,
                                     workspace_bytes / kMiB);
  for (const MemoryUse& use : uses) {
    std::string name = use.name;
    std::replace(name.begin(), name.end(), ' ', '_');
    absl::StrAppendFormat(&line, " %s=%.1f", name, use.num_bytes / kMiB);
    total += use.num_bytes;
  }
  absl::StrAppendFormat(&line, " total=%.1f kv_blocks=%d kv_block_tokens=%d", total / kMiB, limits.num_kv_blocks,
                        limits.block_size);
  base::LogInfo(line);
}

// What a runner without a KV cache takes is measured by building one: a plan on paper would have to be kept equal to
// the allocations by hand.
absl::StatusOr<int> SizeKvCache(const NemotronConfig& config, const NemotronWeights& weights, RunnerLimits limits,
                                int num_processors) {
  limits.num_kv_blocks = 2;
  size_t free_bytes = 0, total_bytes = 0;
  {
    ASSIGN_OR_RETURN(std::unique_ptr<CudaOps> ops,
                     CudaOps::Create(config, limits, CreateReferenceMatMul(), num_processors));
    CudaOps& borrowed = *ops;
    const Runner runner(std::move(ops), config, weights, nullptr, ModelInfo(), limits);
    RETURN_IF_ERROR(borrowed.status());
    RETURN_IF_ERROR(ToStatus(cudaMemGetInfo(&free_bytes, &total_bytes), "memory info"));
  }
  const int64_t block_bytes = KvBytesPerToken(config) * limits.block_size;
  const int64_t context_blocks = (limits.max_context_tokens + limits.block_size - 1) / limits.block_size;
  const int64_t wanted = context_blocks * limits.max_num_sequences;
  const int64_t fitting = (static_cast<int64_t>(free_bytes) - kReserveBytes) / block_bytes;
  if (fitting < 2) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "KV cache: ", free_bytes, " of ", total_bytes, " bytes of device memory are left, ", kReserveBytes,
        " of them are kept free, and one block takes ", block_bytes, "; lower max_num_sequences or max_num_tokens"));
  }
  return static_cast<int>(std::min({wanted, fitting, int64_t{INT32_MAX}}));
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

int64_t KvBytesPerToken(const NemotronConfig& config) {
  return int64_t{2} * config.num_layers * config.key_value_width() * static_cast<int64_t>(sizeof(Bf16));
}

absl::StatusOr<std::unique_ptr<ModelRunner>> CreateCudaModelRunner(const NemotronConfig& config,
                                                                   const NemotronWeights& weights, RunnerLimits limits,
                                                                   const DeviceInfo& device,
                                                                   std::unique_ptr<MatMul> matmul) {
  ASSIGN_OR_RETURN(DeviceWeights uploaded, DeviceWeights::Upload(weights));
  const auto owner = std::make_shared<const DeviceWeights>(std::move(uploaded));
  if (limits.num_kv_blocks == 0) {
    ASSIGN_OR_RETURN(limits.num_kv_blocks, SizeKvCache(config, owner->weights(), limits, device.num_processors));
  }
  const int64_t workspace_bytes = matmul->workspace_bytes();
  ASSIGN_OR_RETURN(std::unique_ptr<CudaOps> ops,
                   CudaOps::Create(config, limits, std::move(matmul), device.num_processors));
  const CudaOps& borrowed = *ops;
  auto runner = std::make_unique<Runner>(std::move(ops), config, owner->weights(), owner,
                                         Describe(config, weights, owner->num_bytes(), limits), limits);
  RETURN_IF_ERROR(borrowed.status());
  LogMemory(borrowed.memory_use(), owner->num_bytes(), workspace_bytes, limits);
  return runner;
}

}  // namespace minitron::engine::cuda
