// World: the real EngineCore in one thread, with a virtual clock, over a fake runner that notices wrong memory. Whoever
// drives it (a seed, an enumeration, a script) submits, aborts, steps and lets time pass; the world checks every event
// against the unbatched oracle and the invariants after every step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "scheduler/engine_core.h"
#include "tests/simulation/batch_checker.h"
#include "tests/simulation/marks.h"
#include "tests/simulation/order_checker.h"
#include "tests/simulation/unbatched_oracle.h"

namespace minitron::simulation {

struct WorldOptions {
  testing::FakeModelRunnerOptions runner;
  scheduler::EngineCoreOptions core;
  // What a step takes of the virtual clock.
  scheduler::Duration step_time{};
  scheduler::Duration token_time{};  // on top, per token row
  int slow_step_one_in = 0;          // n: about one in n takes a thousand times as long; 0: none
};

struct LiveSequence {
  OracleOutput expected;
  size_t num_tokens = 0;
  bool abort_sent = false;
  bool finished = false;
  int num_preemptions = 0;
  int num_block_waits = 0;
};

struct LiveRequest {
  scheduler::Request request;
  std::vector<LiveSequence> sequences;
  size_t num_prompt_logprobs = 0;
  int num_prompt_logprob_chunks = 0;
  bool prompt_done = false;
};

class World : public scheduler::StepSink {
 public:
  // `marks` and `violations` must outlive this object.
  World(const WorldOptions& options, Marks* marks, Violations* violations);

  World(const World&) = delete;
  World& operator=(const World&) = delete;

  // Ids must be new. A refusal must be typed and deserved; returns whether the request was accepted.
  bool Submit(const scheduler::Request& request);
  // Ids and indices that do not exist must be ignored.
  void Abort(scheduler::RequestId id);
  void AbortSequence(scheduler::RequestId id, int index);
  // The same for all sequences, while Step() runs: it counts from the next step on.
  void AbortMeanwhile(scheduler::RequestId id);

  // Called twice in each Step(): while the runner works, and when the sink has been told of the results.
  void set_meanwhile(std::function<void(bool runner_works)> meanwhile) { meanwhile_ = std::move(meanwhile); }

  // One step of the engine, then the invariants. Returns whether there was work.
  bool Step();
  void Advance(scheduler::Duration duration) {
    now_ += duration;
    longest_advance_ = std::max(longest_advance_, duration);
  }

  // No new requests from now on.
  void BeginDrain();

  // Whether everything accepted has ended and everything is given back. Call when idle() is true.
  void CheckNothingIsLeft();

  void OnStep(scheduler::StepOutput output) override;

  // Every sequence has ended, and its last row in flight was read.
  bool idle() const { return core_.idle() && core_.scheduler().retiring().empty(); }
  bool failed() const { return failed_; }  // the runner did, as it was told to; nothing is left to check
  scheduler::TimePoint now() const { return now_; }
  const scheduler::EngineCore& core() const { return core_; }
  const std::map<scheduler::RequestId, LiveRequest>& requests() const { return requests_; }
  uint64_t event_hash() const { return event_hash_; }  // of all events so far: equal for equal runs

 private:
  const scheduler::Sequence* Find(scheduler::RequestId id, int index) const;
  void NoteAbort(LiveSequence& live, int index, scheduler::RequestId id);

  // Blocks that keep a prefix without an owner, and which.
  struct CachedBlock {
    engine::BlockId block;
    scheduler::PrefixChain chain;
    uint64_t parent_content;
  };
  std::vector<CachedBlock> CachedBlocks() const;

  void CheckRefusal(const scheduler::Request& request, const absl::Status& status);
  void CheckDeadline(const LiveRequest& live, const LiveSequence& sequence, bool never_ran);
  void CheckEnded();
  void CheckProgress(bool worked);
  void NoteLackOfBlocks();
  void CheckRetiring();
  void NoteEvictions(const std::vector<CachedBlock>& before);
  void NoteWaits();
  void CheckPreemptions();
  void OnPromptLogprobs(const scheduler::PromptLogprobsEvent& event);
  void OnToken(const scheduler::TokenEvent& event);
  void OnFinish(const scheduler::FinishEvent& event);
  void CheckOutcome(const LiveRequest& live, const LiveSequence& sequence, const scheduler::FinishEvent& event);
  void ExpectSame(const engine::ResultRowOutput& actual, const engine::ResultRowOutput& expected);
  void Hash(uint64_t value) { event_hash_ = (event_hash_ ^ value) * 0x100000001B3ull; }

  const WorldOptions options_;
  Marks* const marks_;            // owned by the caller of the constructor
  Violations* const violations_;  // likewise
  scheduler::TimePoint now_ = scheduler::TimePoint(std::chrono::seconds(1));
  scheduler::TimePoint step_start_;
  scheduler::Duration longest_advance_{};
  BatchChecker runner_;
  scheduler::EngineCore core_;
  OrderChecker order_;
  std::map<scheduler::RequestId, LiveRequest> requests_;
  std::set<const scheduler::Sequence*> retiring_;  // since the step before
  std::vector<scheduler::RequestId> aborted_meanwhile_;
  std::function<void(bool)> meanwhile_ = [](bool) {};
  int64_t num_working_steps_ = 0;
  int64_t work_accepted_ = 0;  // steps that it may take, were each of them to do the least
  bool draining_ = false;
  bool failed_ = false;
  uint64_t event_hash_ = 0xCBF29CE484222325ull;
};

}  // namespace minitron::simulation
