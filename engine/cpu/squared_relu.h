// The squared ReLU of a range of numbers.
#pragma once

#include <cstdint>

namespace minitron::engine::cpu {

// x[i] = max(x[i], 0)^2 for i < count. NaN stays NaN: a broken row must be reported, not hidden.
void SquaredReluRange(float* x, int64_t count);

}  // namespace minitron::engine::cpu
