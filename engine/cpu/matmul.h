// Matrix products with weights as they lie in the checkpoint.
#pragma once

#include "engine/cpu/thread_pool.h"
#include "engine/tensor.h"

namespace minitron::engine::cpu {

// out[t, o] = sum_i x[t, i] * w[o, i].   x [T, in] fp32, w [out, in] bf16, f16 or f32, out [T, out] fp32
// Products and sums in fp32. Each (t, o) is summed in one order whatever T, the tile or the thread: lane l of a vector
// of N lanes takes i = l, l + N, l + 2N, ... with fused multiply-adds where the target has them (inputs past the end
// count as zero), then the lanes are added. N belongs to the Highway target, which is chosen once per process.
void MatMul(ThreadPool& pool, MatrixView<const float> x, const WeightView& w, MatrixView<float> out);

}  // namespace minitron::engine::cpu
