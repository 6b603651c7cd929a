// What a device does, and does not do, in decode steps: an interface without CUDA's types.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace minitron::gpu {

// Microseconds on the device's time line, of one step.
struct StepGap {
  double wait_us = 0.0;      // from the end of the step before until this one is there: the host was late
  double upload_us = 0.0;    // its arrays cross; no kernel runs
  double forward_us = 0.0;   // the recorded part
  double sampling_us = 0.0;  // the head's product, the sampler, the tokens' way back

  double idle_us() const { return wait_us + upload_us; }
};

// Engine thread only.
class StepGaps {
 public:
  virtual ~StepGaps() = default;
  // Watches the next `num_steps` steps of the runner. Error: INTERNAL when the device failed.
  virtual absl::Status Watch(int num_steps) = 0;
  // Of the steps watched but the first. Requires: they have been collected. Error: as Watch.
  virtual absl::StatusOr<std::vector<StepGap>> Gaps() = 0;
};

}  // namespace minitron::gpu
