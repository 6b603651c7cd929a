// Layer norm of one row.
#pragma once

#include <cstdint>

namespace minitron::engine::cpu {

// out[i] = (x[i] - mean) / sqrt(variance + eps) * gain[i] + bias[i] for i < count, after x[i] += delta[i] if `delta` is
// not null; `out` may be `delta`, not x. Sums are in 16 interleaved parts that are added in order: the bits are the
// same on every instruction set.
void LayerNormRow(float* x, const float* delta, const float* gain, const float* bias, int64_t count, float eps,
                  float* out);

}  // namespace minitron::engine::cpu
