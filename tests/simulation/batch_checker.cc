#include "tests/simulation/batch_checker.h"

#include <map>

namespace minitron::simulation {

BatchChecker::BatchChecker(const testing::FakeModelRunnerOptions& runner, const scheduler::SchedulerOptions& options,
                           Marks* marks, Violations* violations)
    : options_(options), marks_(marks), violations_(violations), fake_(runner) {}

absl::Status BatchChecker::Submit(const engine::Batch& batch) {
  const scheduler::Scheduler& scheduler = core_->scheduler();
  violations_->Expect(batch.num_tokens() <= scheduler.max_step_tokens(), "the token budget is kept");
  violations_->Expect(batch.num_sequences() <= scheduler.max_running_sequences(), "the sequence budget is kept");
  bool has_decode = false, has_prefill = false;
  for (int s = 0; s < batch.num_sequences(); ++s) {
    const int num_rows = batch.query_start[s + 1] - batch.query_start[s];
    violations_->Expect(num_rows <= options_.max_prefill_chunk, "no chunk is longer than the limit");
    (num_rows == 1 ? has_decode : has_prefill) = true;
  }
  if (has_decode && has_prefill) marks_->Hit("step with decode and prefill");
  for (const int64_t slot : batch.slot_mapping) {
    violations_->Expect(scheduler.kv_cache().allocator().ref_count(slot / block_size()) == 1,
                        "only a block with one owner is written, not", slot / block_size());
  }
  std::map<int, int> num_targets;
  for (const engine::ResultRow& row : batch.results) num_targets[row.sequence] += row.target != engine::kNone;
  for (const auto& [sequence, count] : num_targets) {
    violations_->Expect(count <= options_.max_logprob_rows_per_step, "prompt logprobs per step are bounded");
  }
  return fake_.Submit(batch);
}

}  // namespace minitron::simulation
