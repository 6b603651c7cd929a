// What the machine can do, measured here and now: the denominators of every share in the tables.
#pragma once

#include "engine/cpu/thread_pool.h"

namespace minitron::bench {

struct Limits {
  double read_bytes_per_s = 0.0;  // one forward stream per thread through memory far larger than the caches
  double fma_flops_per_s = 0.0;   // fp32 fused multiply-adds on registers, two per FMA
};

// Best of a few short runs each, on all threads of the pool.
Limits MeasureLimits(engine::cpu::ThreadPool& pool);

}  // namespace minitron::bench
