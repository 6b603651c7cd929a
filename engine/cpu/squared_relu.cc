#include "engine/cpu/squared_relu.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/cpu/squared_relu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace minitron::engine::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Half of the numbers are negative, in no order: a branch on each is mispredicted every other time.
void SquaredReluForTarget(float* x, int64_t count) {
  const hn::CappedTag<float, 16> tag;
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto value = hn::LoadU(tag, x + i);
    const auto positive = hn::IfThenZeroElse(hn::Lt(value, hn::Zero(tag)), value);
    hn::StoreU(hn::Mul(positive, positive), tag, x + i);
  }
  for (; i < count; ++i) {
    const float positive = x[i] < 0.0f ? 0.0f : x[i];
    x[i] = positive * positive;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace minitron::engine::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace minitron::engine::cpu {

HWY_EXPORT(SquaredReluForTarget);

void SquaredReluRange(float* x, int64_t count) { HWY_DYNAMIC_DISPATCH(SquaredReluForTarget)(x, count); }

}  // namespace minitron::engine::cpu
#endif  // HWY_ONCE
