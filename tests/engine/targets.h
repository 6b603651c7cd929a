// Runs a test once per instruction set this machine has.
#pragma once

#include <cstdint>

#include "engine/cpu/amx_matmul.h"
#include "gtest/gtest.h"
#include "hwy/targets.h"

namespace minitron::engine {

// Calls test(target) with each Highway target chosen in turn, without AMX, and once more with AMX where there is one.
template <typename Test>
void ForEachTarget(const Test& test) {
  cpu::AllowAmx(false);
  hwy::SetSupportedTargetsForTest(0);
  const int64_t supported = hwy::SupportedTargets() & HWY_TARGETS;
  int num_targets = 0;
  for (int64_t targets = supported; targets != 0; targets &= targets - 1) {
    const int64_t target = targets & -targets;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    SCOPED_TRACE(hwy::TargetName(target));
    test(target);
    ++num_targets;
    if (testing::Test::HasFatalFailure()) break;
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  cpu::AllowAmx(true);
  if (cpu::AmxUsable() && !testing::Test::HasFatalFailure()) {
    SCOPED_TRACE("AMX");
    test(hwy::SupportedTargets() & HWY_AVX3_DL);
  }
  EXPECT_GE(num_targets, 1);
}

}  // namespace minitron::engine
