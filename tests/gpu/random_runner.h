// A CUDA runner over weights that are made on the device: those of `minitron-make-checkpoint SHAPE`, bit for bit,
// without a file. In bf16.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/model_runner.h"
#include "tests/gpu/step_gaps.h"

namespace minitron::gpu {

struct RandomRunner {
  std::unique_ptr<engine::ModelRunner> runner;
  std::shared_ptr<StepGaps> gaps;  // of this runner
};

// `options.model_dir` is not looked at. Products are as CublasLtOptions: one algorithm for any number of rows, or,
// which no server does, the fastest for each. Errors: INVALID_ARGUMENT (no such shape), as CreateCudaModelRunner.
absl::StatusOr<RandomRunner> MakeRandomRunner(const std::string& shape, const engine::EngineOptions& options,
                                              bool batch_invariant);

}  // namespace minitron::gpu
