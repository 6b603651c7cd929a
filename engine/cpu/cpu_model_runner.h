// The CPU backend's runner: ModelRunnerImpl over CpuOps.
#pragma once

#include <cstdint>
#include <memory>

#include "engine/model_config.h"
#include "engine/model_runner.h"
#include "engine/model_runner_impl.h"
#include "engine/nemotron_weights.h"

namespace minitron::engine::cpu {

// Bytes of KV cache one token takes: keys and values of every layer and kv head.
int64_t KvBytesPerToken(const NemotronConfig& config, KvCacheType type);

// kAuto becomes what suits this processor.
ActivationType ChooseActivationType(ActivationType asked);

// `weights_owner` keeps alive what `weights` points to. Computes in Submit; Collect only hands the result over.
// Requires: limits and num_threads (>= 1) in range; the factory has checked them.
std::unique_ptr<ModelRunner> CreateCpuModelRunner(const NemotronConfig& config, const NemotronWeights& weights,
                                                  std::shared_ptr<const void> weights_owner, const RunnerLimits& limits,
                                                  int num_threads);

}  // namespace minitron::engine::cpu
