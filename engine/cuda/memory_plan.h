// MemoryPlan: what a runner takes of the device's memory, by purpose, known before anything is allocated.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_config.h"
#include "engine/model_runner_impl.h"

namespace minitron::engine::cuda {

struct MemoryUse {
  const char* name;
  int64_t num_bytes;
};
// Adds to the use of that name, or appends it.
void AddUse(std::vector<MemoryUse>& uses, const char* name, int64_t num_bytes);

// Left free: what the driver needs for graphs and kernels is not known in advance.
inline constexpr int64_t kReserveBytes = int64_t{1} << 30;

struct MemoryPlan {
  std::vector<MemoryUse> uses;  // all of the runner's, the KV cache last
  int num_kv_blocks = 0;

  int64_t total_bytes() const;
};

// Memory of the device when the plan is made.
struct DeviceMemory {
  int64_t free_bytes = 0;
  int64_t total_bytes = 0;
};

// Plans a runner. limits.num_kv_blocks 0: as many blocks as the memory left holds behind the reserve,
// but no more than every sequence's full context. `workspace_bytes` is what the products hold already: it is listed,
// but not asked for again. Error: RESOURCE_EXHAUSTED with the whole sum when it does not fit.
absl::StatusOr<MemoryPlan> PlanMemory(const NemotronConfig& config, int64_t weight_bytes, const RunnerLimits& limits,
                                      int64_t workspace_bytes, const DeviceMemory& memory);

// Prints the plan on the log, a line for each purpose and the sum.
void LogPlan(const MemoryPlan& plan, const RunnerLimits& limits, const DeviceMemory& memory);
// Prints, once the runner is there, what went beyond the plan: recorded steps, kernels, the rounding of allocations.
void LogRest(const MemoryPlan& plan, int64_t workspace_bytes, const DeviceMemory& before, int64_t free_bytes);

}  // namespace minitron::engine::cuda
