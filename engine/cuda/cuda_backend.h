// The CUDA backend as the factory sees it: no CUDA types, so that its includes stay in this room.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model_config.h"
#include "engine/model_runner.h"
#include "engine/model_runner_impl.h"
#include "engine/nemotron_weights.h"

namespace minitron::engine::cuda {

// Whether there is a device this build runs on. Error: FAILED_PRECONDITION says what is missing.
absl::Status ProbeDevice();

struct CudaBackendOptions {
  Quantization quantization = Quantization::kOff;
  bool early_launch = false;   // as CudaRunnerOptions
  int64_t kv_cache_bytes = 0;  // 0: sized from the memory left
  std::string tuning_file;     // as CublasLtOptions
};

// The runner over cublasLt on device 0. `weights` are copied and may go afterwards. Errors: INVALID_ARGUMENT,
// RESOURCE_EXHAUSTED, FAILED_PRECONDITION, INTERNAL; see cuda_model_runner.h.
absl::StatusOr<std::unique_ptr<ModelRunner>> CreateCudaBackend(const NemotronConfig& config,
                                                               const NemotronWeights& weights, RunnerLimits limits,
                                                               const CudaBackendOptions& options);

}  // namespace minitron::engine::cuda
