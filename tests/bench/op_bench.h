// The matrix products and the attention of one shape, against the limits measured in the same process.
#pragma once

#include <vector>

#include "engine/cpu/thread_pool.h"
#include "engine/model_config.h"
#include "tests/bench/limits.h"

namespace minitron::bench {

// Prints, for each format and number of rows, GB/s of weights, GFLOP/s and the share of the nearer limit. Weights are
// read from DRAM: copies of the layer's largest matrix are used in turn until they exceed any cache.
void BenchMatMul(engine::cpu::ThreadPool& pool, const Limits& limits, const engine::NemotronConfig& config,
                 const std::vector<int>& rows);

}  // namespace minitron::bench
