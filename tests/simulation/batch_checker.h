// BatchChecker: a runner that checks what only the batches show (budgets, no write to a shared block, no block given
// away under a batch in flight, no prefix across salts), then hands them to the fake runner, which checks memory.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "scheduler/engine_core.h"
#include "tests/simulation/marks.h"
#include "tests/testing/fake_model_runner.h"

namespace minitron::simulation {

class BatchChecker : public engine::ModelRunner {
 public:
  // `marks` and `violations` must outlive this object.
  BatchChecker(const testing::FakeModelRunnerOptions& runner, const scheduler::SchedulerOptions& options, Marks* marks,
               Violations* violations);

  // The engine core that submits, and its clock; it is built after its runner. Call before the first Submit.
  void set_core(const scheduler::EngineCore* core, std::function<scheduler::TimePoint()> now) {
    core_ = core;
    now_ = std::move(now);
  }
  testing::FakeModelRunner& fake() { return fake_; }
  // Called when a batch of so many token rows is done.
  void set_on_collect(std::function<void(int)> on_collect) { on_collect_ = std::move(on_collect); }

  // Contents (PrefixChain::content) that a sequence shared instead of computing them.
  const std::set<uint64_t>& hit_contents() const { return hit_contents_; }
  // Whether a row of this sequence failed by accident, or it shared, in a batch that was under way by then, a block
  // that had been broken so. Nobody may find such a block later.
  bool MayHaveFailed(scheduler::RequestId id, int index) const { return may_have_failed_.count({id, index}) > 0; }
  // Whether every block of the batches in flight has an owner: what is given away must not be touched any more.
  void CheckBlocksInFlight() const;

  absl::Status Submit(const engine::Batch& batch) override;
  absl::StatusOr<engine::StepResult> Collect() override;
  const engine::ModelInfo& model_info() const override { return fake_.model_info(); }
  int num_kv_blocks() const override { return fake_.num_kv_blocks(); }
  int block_size() const override { return fake_.block_size(); }
  int max_num_tokens() const override { return fake_.max_num_tokens(); }
  int max_num_sequences() const override { return fake_.max_num_sequences(); }
  bool submits_asynchronously() const override { return fake_.submits_asynchronously(); }

 private:
  using SequenceKey = std::pair<scheduler::RequestId, int>;
  // Who wrote a block last.
  struct Writer {
    std::string salt;
    scheduler::RequestId id = 0;
    std::vector<engine::TokenId> first_tokens;  // of a sequence's first block; else empty
    bool has_output = false;
  };

  // What a batch touches.
  struct InFlight {
    struct Part {
      SequenceKey key;
      std::vector<engine::BlockId> table, written;
    };
    std::vector<Part> parts;     // by sequence of the batch
    std::vector<int> row_parts;  // by result row
    int num_tokens = 0;
  };

  // The salt a request's prefixes may be shared under, from first principles.
  std::string SaltOf(const scheduler::Request& request) const;
  void CheckBudgets(const engine::Batch& batch) const;
  const scheduler::Sequence* FindWriter(engine::BlockId block) const;
  // Null when nobody can be found whose rows these are.
  const scheduler::Sequence* CheckSequence(const engine::Batch& batch, int s);
  // Whether its rows may be run now at all.
  void CheckMayRun(const engine::Batch& batch, int s, const scheduler::Sequence& sequence) const;
  InFlight::Part PartOf(const engine::Batch& batch, int s, const scheduler::Sequence* sequence) const;
  void NoteFailures(const InFlight& done, const engine::StepResult& result);
  void NoteStart(const scheduler::Sequence& sequence, int num_shared_blocks);

  const scheduler::SchedulerOptions options_;
  Marks* const marks_;            // owned by the caller of the constructor
  Violations* const violations_;  // likewise
  testing::FakeModelRunner fake_;
  const scheduler::EngineCore* core_ = nullptr;
  std::vector<Writer> writers_;            // by block
  std::map<SequenceKey, int> num_starts_;  // of a sequence: 1 + preemptions
  std::set<uint64_t> hit_contents_;
  std::deque<InFlight> in_flight_;  // by batch
  std::set<SequenceKey> may_have_failed_;
  std::function<scheduler::TimePoint()> now_;
  std::function<void(int)> on_collect_ = [](int) {};
};

}  // namespace minitron::simulation
