// The CUDA backend's runner: ModelRunnerImpl over CudaOps, and what it takes to get there.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cuda/matmul.h"
#include "engine/model_config.h"
#include "engine/model_runner.h"
#include "engine/model_runner_impl.h"
#include "engine/nemotron_weights.h"

namespace minitron::engine::cuda {

inline constexpr int kMinComputeCapability = 80;  // mma on bf16, cp.async
inline constexpr int kFp8ComputeCapability = 89;  // products in E4M3

// Takes the first device. Errors: FAILED_PRECONDITION: no device, no driver, or older than kMinComputeCapability.
struct DeviceInfo {
  int compute_capability = 0;  // 10 * major + minor
  int num_processors = 0;
  int64_t free_bytes = 0;
  int64_t total_bytes = 0;
};
absl::StatusOr<DeviceInfo> OpenDevice();

// Bytes of KV cache one token takes: keys and values of every layer and kv head. kFp8: a byte each, and an exponent for
// each token and head.
int64_t KvBytesPerToken(const NemotronConfig& config, KvCacheType type);

struct CudaRunnerOptions {
  Quantization quantization = Quantization::kOff;
  bool early_launch = false;  // the kernels of recorded steps may start early; see LaunchStream
};

// Copies the weights to the device (`weights` may go afterwards), quantized on the way if asked for, allocates
// everything and records the decode steps. Quantized products are the own kernel's, the rest are `matmul`'s.
// limits.num_kv_blocks 0: as many blocks as the memory left holds, but no more than every sequence's full context.
// Prints the memory it took as a table on the log. After it returns, nothing is allocated on the device but for steps
// with thousands of logit biases. Errors: INVALID_ARGUMENT (a shape without a kernel), FAILED_PRECONDITION (kFp8Dynamic
// where the device or the library has no product in E4M3), RESOURCE_EXHAUSTED (memory), INTERNAL (the device failed).
absl::StatusOr<std::unique_ptr<ModelRunner>> CreateCudaModelRunner(const NemotronConfig& config,
                                                                   const NemotronWeights& weights, RunnerLimits limits,
                                                                   const DeviceInfo& device,
                                                                   std::unique_ptr<MatMul> matmul,
                                                                   const CudaRunnerOptions& options = {});

}  // namespace minitron::engine::cuda
