// BatchChecker: a runner that checks what only the batch shows (budgets, no write to a shared block), then hands it to
// the fake runner, which checks memory.
#pragma once

#include "scheduler/engine_core.h"
#include "tests/simulation/marks.h"
#include "tests/testing/fake_model_runner.h"

namespace minitron::simulation {

class BatchChecker : public engine::ModelRunner {
 public:
  // `options`, `marks` and `violations` must outlive this object.
  BatchChecker(const testing::FakeModelRunnerOptions& runner, const scheduler::SchedulerOptions& options, Marks* marks,
               Violations* violations);

  // The engine core that submits; it is built after its runner. Call before the first Submit.
  void set_core(const scheduler::EngineCore* core) { core_ = core; }
  testing::FakeModelRunner& fake() { return fake_; }

  absl::Status Submit(const engine::Batch& batch) override;
  absl::StatusOr<engine::StepResult> Collect() override { return fake_.Collect(); }
  const engine::ModelInfo& model_info() const override { return fake_.model_info(); }
  int num_kv_blocks() const override { return fake_.num_kv_blocks(); }
  int block_size() const override { return fake_.block_size(); }
  int max_num_tokens() const override { return fake_.max_num_tokens(); }
  int max_num_sequences() const override { return fake_.max_num_sequences(); }

 private:
  const scheduler::SchedulerOptions options_;
  Marks* const marks_;            // owned by the caller of the constructor
  Violations* const violations_;  // likewise
  testing::FakeModelRunner fake_;
  const scheduler::EngineCore* core_ = nullptr;
};

}  // namespace minitron::simulation
