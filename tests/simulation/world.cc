#include "tests/simulation/world.h"

#include <algorithm>
#include <memory>
#include <utility>

namespace minitron::simulation {

using scheduler::Duration;
using scheduler::Request;
using scheduler::RequestId;
using scheduler::Sequence;
using scheduler::SequenceState;
using scheduler::TimePoint;

World::World(const WorldOptions& options, Marks* marks, Violations* violations)
    : options_(options),
      marks_(marks),
      violations_(violations),
      runner_(options.runner, options.core.scheduler, marks, violations),
      core_(options.core, &runner_, this, [this] { return now_; }),
      order_(options.core.scheduler.fairness, options.core.queue, marks, violations) {
  runner_.set_core(&core_, [this] { return now_; });
  runner_.set_on_collect([this](int num_tokens) {
    Duration time = options_.step_time + num_tokens * options_.token_time;
    if (options_.slow_step_one_in > 0 && core_.num_steps() % options_.slow_step_one_in == 1) {
      time *= 1000;
      longest_advance_ = std::max(longest_advance_, time);
      marks_->Hit("a step took very long");
    }
    now_ += time;
    meanwhile_(true);
  });
}

bool World::Submit(const Request& request) {
  const absl::Status status = core_.Submit(request);
  if (!status.ok()) {
    CheckRefusal(request, status);
    return false;
  }
  violations_->Expect(!draining_ && !failed_, "nothing is accepted by an engine that drains or has failed");
  order_.OnAccepted(request);
  // A step for each token, after each preemption again, each wait for others' blocks, and the end.
  const auto num_tokens = static_cast<int64_t>(request.prompt_token_ids.size()) + request.max_tokens;
  work_accepted_ += request.num_sequences * (num_tokens + 1) * (2 + options_.core.scheduler.max_preemptions);
  LiveRequest& live = requests_[request.id];
  live.request = request;
  for (int i = 0; i < request.num_sequences; ++i) {
    live.sequences.push_back({.expected = RunUnbatched(request, i, options_.runner)});
  }
  return true;
}

void World::CheckRefusal(const Request& request, const absl::Status& status) {
  if (failed_) {
    return violations_->Expect(status.code() == absl::StatusCode::kInternal, "a failed engine says so");
  }
  violations_->Expect(status.code() == absl::StatusCode::kUnavailable, "a refusal is typed:", status.ToString());
  const auto reason = status.GetPayload(scheduler::kReasonTypeUrl);
  if (draining_) {
    violations_->Expect(reason == absl::Cord(scheduler::kReasonDraining), "a refusal names its reason");
    return marks_->Hit("refused: draining");
  }
  order_.OnRefused(request, status);
}

void World::BeginDrain() {
  core_.BeginDrain();
  draining_ = true;
  marks_->Hit("drained");
}

const Sequence* World::Find(RequestId id, int index) const {
  const Sequence* found = nullptr;
  const auto look = [&](const std::shared_ptr<Sequence>& sequence) {
    if (sequence->id() == id && sequence->index() == index) found = sequence.get();
  };
  for (const auto& sequence : core_.scheduler().running()) look(sequence);
  core_.scheduler().fair_queue().ForEach(look);
  return found;
}

void World::Abort(RequestId id) {
  core_.Abort(id);
  const auto live = requests_.find(id);
  if (live == requests_.end()) return;
  for (size_t i = 0; i < live->second.sequences.size(); ++i) NoteAbort(live->second.sequences[i], i, id);
}

void World::AbortSequence(RequestId id, int index) {
  core_.AbortSequence(id, index);
  const auto live = requests_.find(id);
  if (live == requests_.end() || index < 0 || index >= live->second.request.num_sequences) return;
  NoteAbort(live->second.sequences[index], index, id);
  if (live->second.request.num_sequences > 1) marks_->Hit("cancelled one of several");
}

void World::AbortMeanwhile(RequestId id) {
  core_.Abort(id);
  aborted_meanwhile_.push_back(id);
}

void World::NoteAbort(LiveSequence& live, int index, RequestId id) {
  if (live.finished) return;
  live.abort_sent = true;
  const Sequence* sequence = Find(id, index);
  if (sequence == nullptr || sequence->state() == SequenceState::kWaiting) {
    marks_->Hit("cancelled in queue");
    if (sequence != nullptr && index > 0) marks_->Hit("cancelled follower in queue");
    return;
  }
  if (sequence->num_output_tokens() > 0) return marks_->Hit("cancelled in decode");
  marks_->Hit("cancelled in prefill");
  const int num_shareable = core_.scheduler().kv_cache().NumShareableTokens(*sequence);
  if (index == 0 && sequence->request().num_sequences > 1 && sequence->num_computed_tokens() < num_shareable) {
    marks_->Hit("leader aborted before sharing");
  }
}

bool World::Step() {
  // Who was decoding gets a token, unless it has to wait for one that is not read yet.
  const bool ahead = options_.core.overlap == scheduler::Overlap::kOn ||
                     (options_.core.overlap == scheduler::Overlap::kAuto && options_.runner.compute_late);
  std::vector<std::pair<std::shared_ptr<Sequence>, int>> decoding;
  for (const auto& sequence : core_.scheduler().running()) {
    if (!ahead && sequence->is_decoding()) decoding.emplace_back(sequence, sequence->num_output_tokens());
  }
  const std::vector<CachedBlock> cached = CachedBlocks();
  step_start_ = now_;
  order_.BeforeStep(core_.scheduler());
  const bool worked = core_.Step();
  if (failed_) return worked;
  const absl::Status consistent = core_.scheduler().CheckConsistent();
  violations_->Expect(consistent.ok(), "the scheduler is consistent:", consistent.ToString());
  for (const auto& [sequence, num_tokens] : decoding) {
    if (sequence->state() != SequenceState::kRunning) continue;  // finished or preempted
    violations_->Expect(sequence->num_output_tokens() == num_tokens + 1,
                        "a decoding sequence gets a token each step:", sequence->id());
  }
  order_.AfterStep(core_.scheduler(), step_start_, now_);
  CheckProgress(worked);
  CheckEnded();
  CheckRetiring();
  CheckPreemptions();
  NoteEvictions(cached);
  NoteWaits();
  NoteLackOfBlocks();
  runner_.CheckBlocksInFlight();
  // Whoever still reads a block that is free reads poison.
  for (const int block : core_.scheduler().kv_cache().allocator().free_blocks()) runner_.fake().Poison(block);
  for (const RequestId id : std::exchange(aborted_meanwhile_, {})) {
    LiveRequest& live = requests_.at(id);
    for (size_t i = 0; i < live.sequences.size(); ++i) {
      if (!live.sequences[i].finished) marks_->Hit("cancelled while a step ran");
      NoteAbort(live.sequences[i], static_cast<int>(i), id);
    }
  }
  return worked;
}

void World::CheckProgress(bool worked) {
  violations_->Expect(worked || core_.idle(), "while a sequence lives there is work");
  num_working_steps_ += worked ? 1 : 0;
  // So nobody waits longer than all the work takes that was ever accepted, and it all ends.
  violations_->Expect(num_working_steps_ <= work_accepted_, "each step does some of the work:", num_working_steps_);
}

void World::NoteLackOfBlocks() {
  const scheduler::Scheduler& scheduler = core_.scheduler();
  if (static_cast<int>(scheduler.running().size()) >= scheduler.max_running_sequences()) return;
  scheduler.fair_queue().ForEach([&](const std::shared_ptr<Sequence>& sequence) {
    const scheduler::KvCacheManager& kv = scheduler.kv_cache();
    if (kv.NumBlocksFor(sequence->num_tokens()) > kv.num_unreserved_blocks()) marks_->Hit("waited for blocks");
  });
}

std::vector<World::CachedBlock> World::CachedBlocks() const {
  const scheduler::KvCacheManager& kv = core_.scheduler().kv_cache();
  std::vector<CachedBlock> cached;
  for (const engine::BlockId block : kv.allocator().cached_blocks()) {
    cached.push_back({block, kv.prefix_cache().ChainTo(block), kv.prefix_cache().parent_content(block)});
  }
  return cached;
}

void World::NoteEvictions(const std::vector<CachedBlock>& before) {
  const scheduler::KvCacheManager& kv = core_.scheduler().kv_cache();
  for (const CachedBlock& cached : before) {
    if (kv.prefix_cache().ChainTo(cached.block) == cached.chain) continue;
    if (runner_.hit_contents().count(cached.chain.content) > 0) marks_->Hit("hit, then evicted");
    for (const auto& sequence : core_.scheduler().running()) {
      const scheduler::BlockTable& table = sequence->block_table();
      const bool shares = std::any_of(table.begin(), table.end(), [&](engine::BlockId block) {
        return cached.parent_content != 0 && kv.prefix_cache().ChainTo(block).content == cached.parent_content;
      });
      if (shares) marks_->Hit("evicted behind a block in use");
    }
  }
}

void World::NoteWaits() {
  core_.scheduler().fair_queue().ForEach([this](const std::shared_ptr<Sequence>& sequence) {
    LiveSequence& live = requests_.at(sequence->id()).sequences[sequence->index()];
    if (sequence->num_block_waits() == live.num_block_waits) return;
    live.num_block_waits = sequence->num_block_waits();
    marks_->Hit("waited for a block being computed");
    const int bound = sequence->num_tokens() / options_.core.scheduler.max_prefill_chunk + 1;
    violations_->Expect(live.num_block_waits <= bound, "waiting for others' blocks is bounded:", sequence->id());
    if (live.num_block_waits == bound) marks_->Hit("waited long enough for a block");
  });
}

void World::CheckRetiring() {
  std::set<const Sequence*> retiring;
  for (const auto& sequence : core_.scheduler().retiring()) {
    marks_->Hit("blocks held for a row in flight");
    violations_->Expect(retiring_.count(sequence.get()) == 0,
                        "an ended sequence gives its blocks back in one step:", sequence->id());
    retiring.insert(sequence.get());
  }
  retiring_ = std::move(retiring);
}

void World::CheckEnded() {
  for (const auto& [id, live] : requests_) {
    const bool expired =
        live.request.deadline <= step_start_ || (live.request.first_token_deadline <= step_start_ && !live.prompt_done);
    for (size_t i = 0; i < live.sequences.size(); ++i) {
      if (!live.sequences[i].abort_sent && !expired) continue;
      violations_->Expect(live.sequences[i].finished && Find(id, i) == nullptr,
                          "a cancelled or expired sequence is gone after one step:", id, i);
    }
  }
}

void World::CheckPreemptions() {
  for (const auto& sequence : core_.scheduler().waiting()) {
    LiveSequence& live = requests_.at(sequence->id()).sequences[sequence->index()];
    if (sequence->num_preemptions() == live.num_preemptions) continue;
    live.num_preemptions = sequence->num_preemptions();
    marks_->Hit("preempted");
    const int bound = options_.core.scheduler.max_preemptions;
    violations_->Expect(options_.core.scheduler.admission_mode == scheduler::AdmissionMode::kOptimistic &&
                            live.num_preemptions <= bound,
                        "nobody is preempted more often than allowed:", sequence->id());
    if (live.num_preemptions == bound) marks_->Hit("preempted as often as allowed");
    if (live.num_preemptions == 2) marks_->Hit("preempted twice");
    if (sequence->params().NeedsHistory() && live.num_tokens > 0) marks_->Hit("preempted with history");
    if (sequence->num_output_tokens() == 0) marks_->Hit("preempted in prompt");
    if (sequence->is_leader() && sequence->request().num_sequences > 1) marks_->Hit("leader preempted");
    if (sequence->prompt_logprobs_pending() && requests_.at(sequence->id()).num_prompt_logprobs > 0) {
      marks_->Hit("preempted between prompt logprobs");
    }
  }
}

void World::CheckNothingIsLeft() {
  for (const auto& [id, live] : requests_) {
    for (const LiveSequence& sequence : live.sequences) {
      violations_->Expect(sequence.finished, "every accepted sequence ends:", id);
    }
  }
  violations_->Expect(core_.scheduler().kv_cache().num_used_blocks() == 0, "all blocks come back");
  violations_->Expect(core_.queue_depth() == 0, "the queue is empty");
  violations_->Expect(core_.scheduler().num_live_sequences() == 0, "nothing lives");
  violations_->Expect(core_.scheduler().fair_queue().num_accounts() == 0, "no account outlives its class");
  violations_->Expect(runner_.fake().num_outstanding() == 0, "every batch is collected");
}

}  // namespace minitron::simulation
