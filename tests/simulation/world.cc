#include "tests/simulation/world.h"

#include <algorithm>
#include <memory>
#include <utility>

namespace minitron::simulation {

using engine::ResultRowOutput;
using scheduler::FinishReason;
using scheduler::Request;
using scheduler::RequestId;
using scheduler::Sequence;
using scheduler::SequenceState;
using scheduler::StepOutput;
using scheduler::TimePoint;

World::World(const WorldOptions& options, Marks* marks, Violations* violations)
    : options_(options),
      marks_(marks),
      violations_(violations),
      runner_(options.runner, options.core.scheduler, marks, violations),
      core_(options.core, &runner_, this, [this] { return now_; }),
      order_(options.core.scheduler.fairness, options.core.queue, marks, violations) {
  runner_.set_core(&core_);
  runner_.set_on_collect([this](int num_tokens) { now_ += options_.step_time + num_tokens * options_.token_time; });
}

bool World::Submit(const Request& request) {
  const absl::Status status = core_.Submit(request);
  if (!status.ok()) {
    CheckRefusal(request, status);
    return false;
  }
  violations_->Expect(!draining_ && !failed_, "nothing is accepted by an engine that drains or has failed");
  order_.OnAccepted(request);
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
  CheckEnded();
  CheckRetiring();
  CheckPreemptions();
  NoteEvictions(cached);
  NoteWaits();
  runner_.CheckBlocksInFlight();
  // Whoever still reads a block that is free reads poison.
  for (const int block : core_.scheduler().kv_cache().allocator().free_blocks()) runner_.fake().Poison(block);
  return worked;
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
}

void World::ExpectSame(const ResultRowOutput& actual, const ResultRowOutput& expected) {
  const bool same = actual.token_id == expected.token_id && actual.failed == expected.failed &&
                    actual.chosen == expected.chosen && actual.top == expected.top;
  violations_->Expect(same, "tokens and logprobs equal the unbatched run:", actual.token_id, expected.token_id);
  Hash(actual.token_id);
}

void World::OnStep(StepOutput output) {
  violations_->Expect(!failed_, "nothing comes after the engine's failure");
  if (!output.engine_error.empty()) {
    violations_->Expect(options_.runner.fail_at_step >= 0, "the engine runs on:", output.engine_error);
    failed_ = true;
    marks_->Hit("engine failed");
  }
  violations_->Expect(output.stats.num_prefix_hit_tokens <= output.stats.num_prefix_query_tokens,
                      "no more tokens are found than looked up");
  for (const auto& event : output.prompt_logprobs) OnPromptLogprobs(event);
  for (const auto& event : output.prompts_done) {
    LiveRequest& live = requests_.at(event.id);
    violations_->Expect(!live.prompt_done, "PromptDone comes once:", event.id);
    violations_->Expect(event.num_prompt_tokens == static_cast<int>(live.request.prompt_token_ids.size()),
                        "PromptDone counts the prompt:", event.id);
    live.prompt_done = true;
  }
  for (const auto& event : output.tokens) {
    order_.OnToken(event);
    OnToken(event);
  }
  for (const auto& event : output.finished) {
    order_.OnFinish(event);
    OnFinish(event);
  }
}

void World::OnPromptLogprobs(const scheduler::PromptLogprobsEvent& event) {
  LiveRequest& live = requests_.at(event.id);
  violations_->Expect(!live.prompt_done && !live.sequences[0].finished,
                      "prompt logprobs come before PromptDone:", event.id);
  violations_->Expect(event.first_position ==
                          std::max(1, live.request.prompt_logprobs_start) + static_cast<int>(live.num_prompt_logprobs),
                      "prompt logprobs have no gaps:", event.id, event.first_position);
  if (++live.num_prompt_logprob_chunks == 2) marks_->Hit("prompt logprobs in several chunks");
  const std::vector<ResultRowOutput>& expected = live.sequences[0].expected.prompt_logprobs;
  for (const ResultRowOutput& row : event.positions) {
    if (live.num_prompt_logprobs >= expected.size()) {
      return violations_->Expect(false, "no more prompt logprobs than asked for:", event.id);
    }
    ExpectSame(row, expected[live.num_prompt_logprobs++]);
  }
}

void World::OnToken(const scheduler::TokenEvent& event) {
  LiveRequest& live = requests_.at(event.id);
  LiveSequence& sequence = live.sequences.at(event.index);
  violations_->Expect(live.prompt_done, "no token before PromptDone:", event.id);
  violations_->Expect(!sequence.finished, "no token after the end:", event.id, event.index);
  violations_->Expect(!sequence.abort_sent, "no token after the abort:", event.id, event.index);
  violations_->Expect(live.request.deadline > now_, "no token after the deadline:", event.id, event.index);
  violations_->Expect(sequence.num_tokens > 0 || event.index > 0 || live.request.first_token_deadline > now_,
                      "no first token after its timeout:", event.id);
  const bool in_order = event.output_position == static_cast<int>(sequence.num_tokens) &&
                        sequence.num_tokens < sequence.expected.tokens.size();
  violations_->Expect(in_order, "tokens come in order, once, and not too many:", event.id, event.output_position);
  if (in_order) ExpectSame(event.output, sequence.expected.tokens[sequence.num_tokens++]);
}

void World::OnFinish(const scheduler::FinishEvent& event) {
  LiveRequest& live = requests_.at(event.id);
  LiveSequence& sequence = live.sequences.at(event.index);
  violations_->Expect(!sequence.finished, "a sequence ends once:", event.id, event.index);
  sequence.finished = true;
  Hash(event.id * 64 + event.index * 8 + static_cast<int>(event.reason));
  violations_->Expect(event.num_output_tokens == static_cast<int>(sequence.num_tokens) &&
                          event.num_prompt_tokens == static_cast<int>(live.request.prompt_token_ids.size()),
                      "usage counts what was sent:", event.id, event.num_output_tokens, sequence.num_tokens);
  violations_->Expect(
      event.num_cached_tokens % options_.runner.block_size == 0 && event.num_cached_tokens < event.num_prompt_tokens,
      "cached are whole blocks, and never all of the prompt:", event.id, event.num_cached_tokens);
  if (event.index > 0 && event.num_cached_tokens > 0) marks_->Hit("follower shared prefix");
  const bool never_ran = event.first_scheduled == TimePoint{};
  switch (event.reason) {
    case FinishReason::kCancelled:
      return violations_->Expect(sequence.abort_sent, "only the cancelled end as cancelled:", event.id);
    case FinishReason::kDeadline:
      return CheckDeadline(live, sequence, never_ran);
    default:
      CheckOutcome(live, sequence, event);
  }
}

void World::CheckDeadline(const LiveRequest& live, const LiveSequence& sequence, bool never_ran) {
  const Request& request = live.request;
  if (request.deadline <= now_) {
    if (never_ran) marks_->Hit("deadline in queue");
    if (sequence.num_tokens > 0) marks_->Hit("deadline after tokens");
    return;
  }
  violations_->Expect(!live.prompt_done, "only the expired end by deadline:", request.id);
  if (request.first_token_deadline <= now_) return marks_->Hit("first token too late");
  // Given up before it started: even with a step for each of its tokens it must have been close.
  // (what passes between two calls counts as well when steps overlap).
  const auto longest_step =
      options_.step_time + core_.scheduler().max_step_tokens() * options_.token_time + longest_advance_;
  const auto left = std::min(request.deadline, request.first_token_deadline) - now_;
  violations_->Expect(never_ran && left < (request.prompt_token_ids.size() + 2) * longest_step,
                      "only who cannot make it is given up before it starts:", request.id);
  marks_->Hit("given up before it started");
}

void World::CheckOutcome(const LiveRequest& live, const LiveSequence& sequence, const scheduler::FinishEvent& event) {
  violations_->Expect(event.reason == sequence.expected.reason, "the finish reason is the oracle's:", event.id);
  if (event.reason == FinishReason::kError) return marks_->Hit("row broken");
  violations_->Expect(live.prompt_done, "PromptDone comes before the end:", event.id);
  violations_->Expect(sequence.num_tokens == sequence.expected.tokens.size(), "all tokens are sent:", event.id);
  if (event.index == 0) {
    violations_->Expect(live.num_prompt_logprobs == sequence.expected.prompt_logprobs.size(),
                        "all prompt logprobs are sent:", event.id);
  }
  if (live.request.max_tokens == 0) marks_->Hit("scored only");
  if (event.reason != FinishReason::kLength && !sequence.expected.tokens.empty()) {
    marks_->Hit("stopped by token");
    violations_->Expect(event.stop_token == sequence.expected.tokens.back().token_id,
                        "the stop token is named:", event.id);
  }
  marks_->Hit("finished unharmed");
}

}  // namespace minitron::simulation
