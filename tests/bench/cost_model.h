// What a step of Minitron-8B costs on an H200 by arithmetic: memory and compute ceilings, bf16 weights and KV cache.
// Virtual time needs a law that is the same on every machine; this one has the real one's shape.
#pragma once

#include "engine/batch.h"

namespace minitron::bench {

struct CostModel {
  double bytes_per_second = 4.3e12;    // copy rate of the memory
  double flops_per_second = 790e12;    // dense bf16
  double weight_bytes = 14.45e9;       // read once per step
  double flops_per_token = 14.446e9;   // matrix products of one token row
  double kv_bytes_per_token = 131072;  // K and V of 32 layers, 8 heads of 128
  double flops_per_pair = 786432;      // attention of one query to one key, all layers
  double host_seconds = 0.2e-3;        // plan, build, read back

  double Seconds(const engine::Batch& batch) const;
};

}  // namespace minitron::bench
