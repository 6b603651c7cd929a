#include "engine/cpu/layer_norm.h"

#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/cpu/layer_norm.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace minitron::engine::cpu {
namespace HWY_NAMESPACE {

// Plain loops, which the compiler makes vectors of for each target.
constexpr int kSumLanes = 16;

// One order of summation per length, whatever the width of the vectors.
template <typename Term>
HWY_INLINE float FixedOrderSum(int64_t count, const Term& term) {
  float lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (int lane = 0; lane < kSumLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += term(i);
  float sum = 0.0f;
  for (const float lane : lanes) sum += lane;
  return sum;
}

HWY_INLINE void AddRow(float* HWY_RESTRICT x, const float* HWY_RESTRICT delta, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] += delta[i];
}

HWY_INLINE void NormRow(const float* HWY_RESTRICT x, const float* HWY_RESTRICT gain, const float* HWY_RESTRICT bias,
                        int64_t count, float eps, float* HWY_RESTRICT out) {
  const float mean = FixedOrderSum(count, [x](int64_t i) HWY_ATTR { return x[i]; }) / static_cast<float>(count);
  const float squares = FixedOrderSum(count, [x, mean](int64_t i) HWY_ATTR { return (x[i] - mean) * (x[i] - mean); });
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(count) + eps);
  for (int64_t i = 0; i < count; ++i) out[i] = (x[i] - mean) * scale * gain[i] + bias[i];
}

// `out` may be `delta`, so they do not meet in one function.
void LayerNormRowForTarget(float* x, const float* delta, const float* gain, const float* bias, int64_t count, float eps,
                           float* out) {
  if (delta != nullptr) AddRow(x, delta, count);
  NormRow(x, gain, bias, count, eps, out);
}

}  // namespace HWY_NAMESPACE
}  // namespace minitron::engine::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace minitron::engine::cpu {

HWY_EXPORT(LayerNormRowForTarget);

void LayerNormRow(float* x, const float* delta, const float* gain, const float* bias, int64_t count, float eps,
                  float* out) {
  HWY_DYNAMIC_DISPATCH(LayerNormRowForTarget)(x, delta, gain, bias, count, eps, out);
}

}  // namespace minitron::engine::cpu
#endif  // HWY_ONCE
