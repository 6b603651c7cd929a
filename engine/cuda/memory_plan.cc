#include "engine/cuda/memory_plan.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/log.h"
#include "engine/cuda/cuda_model_runner.h"
#include "engine/cuda/cuda_ops.h"

namespace minitron::engine::cuda {
namespace {

constexpr const char* kCacheName = "KV cache";
constexpr double kMiB = 1 << 20;

std::string Mebibytes(int64_t num_bytes) { return absl::StrFormat("%.1f", static_cast<double>(num_bytes) / kMiB); }

// "weights 15771.3 + matmul workspace 32.0 + ..."
std::string Sum(const std::vector<MemoryUse>& uses) {
  std::string sum;
  for (const MemoryUse& use : uses) {
    absl::StrAppend(&sum, sum.empty() ? "" : " + ", use.name, " ", Mebibytes(use.num_bytes));
  }
  return sum;
}

void LogUse(const char* purpose, int64_t num_bytes, base::LogFields more) {
  base::LogFields fields = {{"mib", absl::StrFormat("%10.1f", static_cast<double>(num_bytes) / kMiB)},
                            {"purpose", purpose}};
  for (auto& field : more) fields.push_back(std::move(field));
  base::LogEvent(base::LogLevel::kInfo, "device_memory", fields);
}

}  // namespace

void AddUse(std::vector<MemoryUse>& uses, const char* name, int64_t num_bytes) {
  const auto found =
      std::find_if(uses.begin(), uses.end(), [name](const MemoryUse& use) { return std::strcmp(use.name, name) == 0; });
  if (found != uses.end()) {
    found->num_bytes += num_bytes;
  } else {
    uses.push_back({name, num_bytes});
  }
}

int64_t MemoryPlan::total_bytes() const {
  int64_t total = 0;
  for (const MemoryUse& use : uses) total += use.num_bytes;
  return total;
}

absl::StatusOr<MemoryPlan> PlanMemory(const NemotronConfig& config, int64_t weight_bytes, const RunnerLimits& limits,
                                      int64_t workspace_bytes, const DeviceMemory& memory) {
  RunnerLimits without_cache = limits;
  without_cache.num_kv_blocks = 0;  // the scratch block of padded rows stays
  const int64_t logits_rows = LogitsRows(config, limits);
  MemoryPlan plan;
  AddUse(plan.uses, "weights", weight_bytes);
  AddUse(plan.uses, "matmul workspace", workspace_bytes);
  AddUse(plan.uses, "activations",
         (ForwardBuffers<CudaOps>::NumElements(config, limits.max_num_tokens) + logits_rows * config.hidden_size) *
             static_cast<int64_t>(sizeof(Bf16)));
  AddUse(plan.uses, "logits", logits_rows * config.vocab_size * static_cast<int64_t>(sizeof(float)));
  int64_t cache_bytes = 0;
  for (const MemoryUse& use : CudaOps::Requirements(config, without_cache)) {
    if (std::strcmp(use.name, kCacheName) == 0) {
      cache_bytes = use.num_bytes;
    } else {
      AddUse(plan.uses, use.name, use.num_bytes);
    }
  }
  const int64_t block_bytes = KvBytesPerToken(config, limits.kv_cache_type) * limits.block_size;
  const int64_t context_blocks = (limits.max_context_tokens + limits.block_size - 1) / limits.block_size;
  // The workspace is taken already.
  const int64_t left = memory.free_bytes - (plan.total_bytes() - workspace_bytes) - cache_bytes - kReserveBytes;
  const int64_t fitting = std::max<int64_t>(0, left) / block_bytes;
  const bool given = limits.num_kv_blocks > 0;
  const int64_t blocks =
      given ? limits.num_kv_blocks : std::min({context_blocks * limits.max_num_sequences, fitting, int64_t{INT32_MAX}});
  AddUse(plan.uses, kCacheName, cache_bytes + std::max<int64_t>(blocks, 2) * block_bytes);
  if (blocks < 2 || blocks > fitting) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "device memory, MiB: ", Sum(plan.uses), " (", std::max<int64_t>(blocks, 2), " blocks of ", limits.block_size,
        " tokens) + kept free ", Mebibytes(kReserveBytes), " = ", Mebibytes(plan.total_bytes() + kReserveBytes),
        ", but ", Mebibytes(memory.free_bytes + workspace_bytes), " of ", Mebibytes(memory.total_bytes),
        " are free; lower ", given ? "kv_cache_bytes, " : "",
        "max_num_sequences, max_num_tokens or max_context_tokens"));
  }
  plan.num_kv_blocks = static_cast<int>(blocks);
  return plan;
}

void LogPlan(const MemoryPlan& plan, const RunnerLimits& limits, const DeviceMemory& memory) {
  for (const MemoryUse& use : plan.uses) {
    base::LogFields blocks;
    if (std::strcmp(use.name, kCacheName) == 0) {
      blocks = {{"blocks", absl::StrCat(plan.num_kv_blocks)}, {"block_tokens", absl::StrCat(limits.block_size)}};
    }
    LogUse(use.name, use.num_bytes, std::move(blocks));
  }
  LogUse("sum", plan.total_bytes(), {{"free_before_mib", Mebibytes(memory.free_bytes)}});
}

void LogRest(const MemoryPlan& plan, int64_t workspace_bytes, const DeviceMemory& before, int64_t free_bytes) {
  const int64_t rest = before.free_bytes - free_bytes - (plan.total_bytes() - workspace_bytes);
  LogUse("recorded steps, kernels", rest, {{"free_after_mib", Mebibytes(free_bytes)}});
}

}  // namespace minitron::engine::cuda
