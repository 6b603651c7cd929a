#include "engine/cpu/cpu_model_runner.h"

#include <utility>

#include "engine/base/check.h"
#include "engine/cpu/amx_matmul.h"
#include "engine/cpu/cpu_ops.h"
#include "engine/cpu/panel_matmul.h"

namespace minitron::engine::cpu {

int64_t KvBytesPerToken(const NemotronConfig& config, KvCacheType type) {
  return int64_t{2} * config.num_layers * config.key_value_width() * (type == KvCacheType::kBf16 ? 2 : 4);
}

ActivationType ChooseActivationType(ActivationType asked) {
  if (asked != ActivationType::kAuto) return asked;
  return AmxUsable() || Bf16ProductsUsable() ? ActivationType::kBf16 : ActivationType::kF32;
}

std::unique_ptr<ModelRunner> CreateCpuModelRunner(const NemotronConfig& config, const NemotronWeights& weights,
                                                  std::shared_ptr<const void> weights_owner, const RunnerLimits& limits,
                                                  int num_threads) {
  CHECK(num_threads >= 1);
  CHECK(limits.block_size >= 8 && limits.num_kv_blocks >= 1);
  CHECK(limits.activation_type != ActivationType::kAuto);
  ModelInfo info = DescribeModel(config, weights, limits.max_context_tokens);
  info.backend = "cpu";
  info.weight_type = DTypeName(weights.matrix_dtype);
  info.weight_bytes = weights.num_bytes;
  info.kv_bytes_per_token = KvBytesPerToken(config, limits.kv_cache_type);
  return std::make_unique<ModelRunnerImpl<CpuOps>>(std::make_unique<CpuOps>(config, limits, num_threads), config,
                                                   weights, std::move(weights_owner), std::move(info), limits);
}

}  // namespace minitron::engine::cpu
