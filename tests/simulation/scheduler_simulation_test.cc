// The real EngineCore, stepped by hand with a virtual clock over FakeModelRunner. Every seed draws its own pool,
// budgets, requests, aborts and deadlines; invariants are checked after every step and every token against the
// unbatched oracle.
//
// A failure prints its seed. Replay: MINITRON_SIM_SEED=<seed>; more seeds: MINITRON_SIM_SEEDS=<count>.
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>

#include "gtest/gtest.h"
#include "scheduler/engine_core.h"
#include "tests/simulation/unbatched_oracle.h"
#include "tests/testing/fake_model_runner.h"

namespace minitron::simulation {
namespace {

using engine::ResultRowOutput;
using engine::TokenId;
using scheduler::EngineCore;
using scheduler::FinishReason;
using scheduler::Request;
using scheduler::RequestId;
using scheduler::Sequence;
using scheduler::SequenceState;
using scheduler::StepOutput;
using scheduler::TimePoint;
using std::chrono::milliseconds;

// Rare states; each must occur over the whole run, or the simulator proves nothing about it.
struct Marks {
  std::map<std::string, int64_t> counts = {
      {"finished unharmed", 0},
      {"preempted", 0},
      {"preempted twice", 0},
      {"preempted with history", 0},
      {"preempted in prompt", 0},
      {"preempted between prompt logprobs", 0},
      {"follower shared prefix", 0},
      {"leader aborted before sharing", 0},
      {"leader preempted", 0},
      {"cancelled in queue", 0},
      {"cancelled in prefill", 0},
      {"cancelled in decode", 0},
      {"cancelled one of several", 0},
      {"cancelled follower in queue", 0},
      {"deadline in queue", 0},
      {"deadline after tokens", 0},
      {"row not finite", 0},
      {"stopped by token", 0},
      {"scored only", 0},
      {"prompt logprobs in several chunks", 0},
      {"refused: queue full", 0},
      {"step with decode and prefill", 0},
  };
  void Hit(const std::string& name) {
    ASSERT_TRUE(counts.count(name)) << name;
    ++counts[name];
  }
};

struct LiveSequence {
  OracleOutput expected;
  size_t num_tokens = 0;
  bool abort_sent = false;
  bool finished = false;
  int num_preemptions = 0;
};

struct LiveRequest {
  Request request;
  std::vector<LiveSequence> sequences;
  size_t num_prompt_logprobs = 0;
  int num_prompt_logprob_chunks = 0;
  bool prompt_done = false;
};

struct Settings {
  testing::FakeModelRunnerOptions runner;
  scheduler::EngineCoreOptions core;
  int num_requests = 0;
  int max_prompt = 0;
  int max_output = 0;
  double arrival_rate = 0;  // chance of one more request per step
  double abort_rate = 0;
  double deadline_rate = 0;
};

void HashInto(uint64_t value, uint64_t& hash) { hash = (hash ^ value) * 0x100000001B3ull; }

// Checks what only the batch shows, then hands it to the fake.
class BatchChecker : public engine::ModelRunner {
 public:
  BatchChecker(const Settings& settings, Marks* marks) : settings_(settings), marks_(marks), fake_(settings.runner) {}

  void set_core(const EngineCore* core) { core_ = core; }
  testing::FakeModelRunner& fake() { return fake_; }

  absl::Status Submit(const engine::Batch& batch) override {
    const scheduler::Scheduler& scheduler = core_->scheduler();
    EXPECT_LE(batch.num_tokens(), scheduler.max_step_tokens());
    EXPECT_LE(batch.num_sequences(), scheduler.max_running_sequences());
    bool has_decode = false, has_prefill = false;
    for (int s = 0; s < batch.num_sequences(); ++s) {
      const int num_rows = batch.query_start[s + 1] - batch.query_start[s];
      EXPECT_LE(num_rows, settings_.core.scheduler.max_prefill_chunk);
      (num_rows == 1 ? has_decode : has_prefill) = true;
    }
    if (has_decode && has_prefill) marks_->Hit("step with decode and prefill");
    for (const int64_t slot : batch.slot_mapping) {
      EXPECT_EQ(scheduler.kv_cache().allocator().ref_count(slot / block_size()), 1) << "writes to a shared block";
    }
    std::map<int, int> num_targets;
    for (const engine::ResultRow& row : batch.results) num_targets[row.sequence] += row.target != engine::kNone;
    for (const auto& [sequence, count] : num_targets) {
      EXPECT_LE(count, settings_.core.scheduler.max_logprob_rows_per_step);
    }
    return fake_.Submit(batch);
  }
  absl::StatusOr<engine::StepResult> Collect() override { return fake_.Collect(); }
  const engine::ModelInfo& model_info() const override { return fake_.model_info(); }
  int num_kv_blocks() const override { return fake_.num_kv_blocks(); }
  int block_size() const override { return fake_.block_size(); }
  int max_num_tokens() const override { return fake_.max_num_tokens(); }
  int max_num_sequences() const override { return fake_.max_num_sequences(); }

 private:
  const Settings& settings_;
  Marks* const marks_;  // owned by the test
  testing::FakeModelRunner fake_;
  const EngineCore* core_ = nullptr;
};

class Simulation : public scheduler::StepSink {
 public:
  Simulation(uint64_t seed, Marks* marks)
      : random_(seed),
        marks_(marks),
        settings_(DrawSettings()),
        runner_(settings_, marks),
        core_(settings_.core, &runner_, this, [this] { return now_; }) {
    runner_.set_core(&core_);
  }

  // Returns a hash of all events.
  uint64_t Run();
  void OnStep(StepOutput output) override;

 private:
  int Draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  bool Chance(double p) { return std::bernoulli_distribution(p)(random_); }

  Settings DrawSettings();
  Request DrawRequest();
  void SubmitOne();
  void AbortSome();
  void NoteAbort(LiveSequence& live, int index, RequestId id);
  const Sequence* Find(RequestId id, int index) const;

  void StepAndCheck();
  void CheckPreemptions();
  void OnPromptLogprobs(const scheduler::PromptLogprobsEvent& event);
  void OnToken(const scheduler::TokenEvent& event);
  void OnFinish(const scheduler::FinishEvent& event);
  void CheckOutcome(const LiveRequest& live, const LiveSequence& sequence, const scheduler::FinishEvent& event);

  std::mt19937_64 random_;
  Marks* const marks_;  // owned by the test
  Settings settings_;
  TimePoint now_ = TimePoint(milliseconds(1000));
  TimePoint step_start_;
  BatchChecker runner_;
  EngineCore core_;
  std::map<RequestId, LiveRequest> requests_;
  RequestId next_id_ = 1;
  uint64_t hash_ = 0xCBF29CE484222325ull;
};

Settings Simulation::DrawSettings() {
  Settings s;
  s.max_prompt = Draw(1, 40);
  s.max_output = Draw(1, 30);
  s.runner.block_size = 1 << Draw(0, 4);
  const int num_needed = (s.max_prompt + s.max_output + s.runner.block_size - 1) / s.runner.block_size;
  s.runner.num_kv_blocks = num_needed * Draw(1, 4) + Draw(0, 3);
  s.runner.max_num_tokens = Draw(1, 64);
  s.runner.max_num_sequences = Draw(1, 8);
  s.runner.max_context_tokens = s.max_prompt + s.max_output;
  s.runner.vocab_size = Draw(8, 64);
  s.runner.nan_one_in = Chance(0.2) ? 100 : 0;
  s.core.scheduler.max_running_sequences = Chance(0.3) ? Draw(1, 8) : 0;
  s.core.scheduler.max_step_tokens = Chance(0.3) ? Draw(1, 64) : 0;
  s.core.scheduler.max_prefill_chunk = Draw(1, 48);
  s.core.scheduler.max_logprob_rows_per_step = Draw(1, 16);
  s.core.max_queued_requests = Draw(4, 40);
  s.num_requests = Draw(5, 30);
  s.arrival_rate = Chance(0.3) ? 0.95 : 0.3;
  s.abort_rate = Chance(0.5) ? 0.1 : 0.0;
  s.deadline_rate = Chance(0.5) ? 0.3 : 0.0;
  return s;
}

Request Simulation::DrawRequest() {
  Request request;
  request.id = next_id_++;
  const int num_prompt = Draw(1, settings_.max_prompt);
  for (int i = 0; i < num_prompt; ++i) request.prompt_token_ids.push_back(Draw(0, settings_.runner.vocab_size - 1));
  request.max_tokens = Draw(1, settings_.max_output);
  request.min_tokens = Chance(0.3) ? Draw(0, request.max_tokens) : 0;
  request.num_sequences = Chance(0.4) ? Draw(2, 4) : 1;
  if (Chance(0.7)) request.eos_token_ids = {1};
  if (Chance(0.3)) request.stop_token_ids = {2, 3};
  request.num_top_logprobs = Draw(-1, 2);
  if (Chance(0.4)) {
    request.num_prompt_top_logprobs = Draw(0, 2);
    request.prompt_logprobs_start = Draw(0, num_prompt + 1);
    if (Chance(0.3)) request.max_tokens = request.min_tokens = 0;
  }
  request.params.seed = random_();
  if (Chance(0.3)) request.params.repetition_penalty = 1.5f;
  if (Chance(0.2)) request.params.frequency_penalty = 0.5f;
  request.priority = Chance(0.3) ? Draw(-1, 1) : 0;
  request.arrival = now_;
  if (Chance(settings_.deadline_rate)) request.deadline = now_ + milliseconds(Draw(1, 60));
  return request;
}

void Simulation::SubmitOne() {
  Request request = DrawRequest();
  const int depth = core_.queue_depth();
  const absl::Status status = core_.Submit(request);
  if (!status.ok()) {
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status.ToString();
    EXPECT_EQ(status.GetPayload(scheduler::kReasonTypeUrl), absl::Cord(scheduler::kReasonQueueFull));
    EXPECT_GT(depth + request.num_sequences, settings_.core.max_queued_requests);
    return marks_->Hit("refused: queue full");
  }
  EXPECT_LE(core_.queue_depth(), settings_.core.max_queued_requests);
  LiveRequest& live = requests_[request.id];
  live.request = request;
  for (int i = 0; i < request.num_sequences; ++i) {
    live.sequences.push_back({.expected = RunUnbatched(request, i, settings_.runner)});
  }
}

const Sequence* Simulation::Find(RequestId id, int index) const {
  for (const auto* queue : {&core_.scheduler().running(), &core_.scheduler().waiting()}) {
    for (const auto& sequence : *queue) {
      if (sequence->id() == id && sequence->index() == index) return sequence.get();
    }
  }
  return nullptr;
}

void Simulation::NoteAbort(LiveSequence& live, int index, RequestId id) {
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
  const int num_shareable = core_.scheduler().kv_cache().NumShareableTokens(sequence->request());
  if (index == 0 && sequence->request().num_sequences > 1 && sequence->num_computed_tokens() < num_shareable) {
    marks_->Hit("leader aborted before sharing");
  }
}

void Simulation::AbortSome() {
  for (auto& [id, live] : requests_) {
    if (!Chance(settings_.abort_rate / 4)) continue;
    if (Chance(0.5)) {
      core_.Abort(id);
      for (size_t i = 0; i < live.sequences.size(); ++i) NoteAbort(live.sequences[i], i, id);
      continue;
    }
    const int index = Draw(0, live.request.num_sequences);  // one past the end: must be ignored
    core_.AbortSequence(id, index);
    if (index == live.request.num_sequences) continue;
    NoteAbort(live.sequences[index], index, id);
    if (live.request.num_sequences > 1) marks_->Hit("cancelled one of several");
  }
  core_.Abort(next_id_ + 1000);  // unknown: must be ignored
}

uint64_t Simulation::Run() {
  int num_submitted = 0;
  int64_t num_idle = 0;
  while (num_submitted < settings_.num_requests || !core_.idle()) {
    while (num_submitted < settings_.num_requests && Chance(settings_.arrival_rate)) {
      SubmitOne();
      ++num_submitted;
    }
    if (Chance(settings_.abort_rate)) AbortSome();
    StepAndCheck();
    // Work is finite: every step computes at least one token, and preemption only repeats what is bounded.
    EXPECT_LT(++num_idle, 200000) << "no end";
    if (::testing::Test::HasFailure()) return hash_;
  }
  for (const auto& [id, live] : requests_) {
    for (const LiveSequence& sequence : live.sequences) EXPECT_TRUE(sequence.finished) << "request " << id;
  }
  EXPECT_EQ(core_.scheduler().kv_cache().num_used_blocks(), 0);
  EXPECT_EQ(core_.queue_depth(), 0);
  EXPECT_EQ(core_.scheduler().num_live_sequences(), 0);
  return hash_;
}

void Simulation::StepAndCheck() {
  std::vector<std::pair<std::shared_ptr<Sequence>, int>> decoding;
  for (const auto& sequence : core_.scheduler().running()) {
    if (sequence->is_decoding()) decoding.emplace_back(sequence, sequence->num_output_tokens());
  }
  step_start_ = now_;
  core_.Step();
  now_ += milliseconds(Draw(0, 2));
  const absl::Status consistent = core_.scheduler().CheckConsistent();
  EXPECT_TRUE(consistent.ok()) << consistent.ToString();
  for (const auto& [sequence, num_tokens] : decoding) {
    if (sequence->state() != SequenceState::kRunning) continue;  // finished or preempted
    EXPECT_EQ(sequence->num_output_tokens(), num_tokens + 1) << "a decoding sequence got no token";
  }
  for (const auto& [id, live] : requests_) {
    for (size_t i = 0; i < live.sequences.size(); ++i) {
      const bool expired = live.request.deadline <= step_start_;
      if (live.sequences[i].abort_sent || expired) {
        EXPECT_TRUE(live.sequences[i].finished) << "ended request " << id << " lives on";
        EXPECT_EQ(Find(id, i), nullptr);
      }
    }
  }
  CheckPreemptions();
  // Whoever still reads a block that is free reads poison.
  for (const int block : core_.scheduler().kv_cache().allocator().free_blocks()) runner_.fake().Poison(block);
}

void Simulation::CheckPreemptions() {
  for (const auto& sequence : core_.scheduler().waiting()) {
    LiveSequence& live = requests_.at(sequence->id()).sequences[sequence->index()];
    if (sequence->num_preemptions() == live.num_preemptions) continue;
    live.num_preemptions = sequence->num_preemptions();
    marks_->Hit("preempted");
    if (live.num_preemptions == 2) marks_->Hit("preempted twice");
    if (sequence->params().NeedsHistory() && live.num_tokens > 0) marks_->Hit("preempted with history");
    if (sequence->num_output_tokens() == 0) marks_->Hit("preempted in prompt");
    if (sequence->is_leader() && sequence->request().num_sequences > 1) marks_->Hit("leader preempted");
    if (sequence->prompt_logprobs_pending() && requests_.at(sequence->id()).num_prompt_logprobs > 0) {
      marks_->Hit("preempted between prompt logprobs");
    }
  }
}

void ExpectSame(const ResultRowOutput& actual, const ResultRowOutput& expected, uint64_t& hash) {
  EXPECT_EQ(actual.token_id, expected.token_id);
  EXPECT_EQ(actual.failed, expected.failed);
  EXPECT_TRUE(actual.chosen == expected.chosen);
  EXPECT_TRUE(actual.top == expected.top);
  HashInto(actual.token_id, hash);
}

void Simulation::OnStep(StepOutput output) {
  EXPECT_EQ(output.engine_error, "");
  for (const auto& event : output.prompt_logprobs) OnPromptLogprobs(event);
  for (const auto& event : output.prompts_done) {
    LiveRequest& live = requests_.at(event.id);
    EXPECT_FALSE(live.prompt_done);
    EXPECT_EQ(event.num_prompt_tokens, static_cast<int>(live.request.prompt_token_ids.size()));
    live.prompt_done = true;
  }
  for (const auto& event : output.tokens) OnToken(event);
  for (const auto& event : output.finished) OnFinish(event);
}

void Simulation::OnPromptLogprobs(const scheduler::PromptLogprobsEvent& event) {
  LiveRequest& live = requests_.at(event.id);
  EXPECT_FALSE(live.prompt_done);
  EXPECT_FALSE(live.sequences[0].finished);
  EXPECT_EQ(event.first_position,
            std::max(1, live.request.prompt_logprobs_start) + static_cast<int>(live.num_prompt_logprobs));
  if (++live.num_prompt_logprob_chunks == 2) marks_->Hit("prompt logprobs in several chunks");
  for (const ResultRowOutput& row : event.positions) {
    const std::vector<ResultRowOutput>& expected = live.sequences[0].expected.prompt_logprobs;
    ASSERT_LT(live.num_prompt_logprobs, expected.size());
    ExpectSame(row, expected[live.num_prompt_logprobs++], hash_);
  }
}

void Simulation::OnToken(const scheduler::TokenEvent& event) {
  LiveRequest& live = requests_.at(event.id);
  LiveSequence& sequence = live.sequences.at(event.index);
  EXPECT_TRUE(live.prompt_done);
  EXPECT_FALSE(sequence.finished);
  EXPECT_FALSE(sequence.abort_sent) << "a token after the abort";
  EXPECT_GT(live.request.deadline, step_start_) << "a token after the deadline";
  ASSERT_EQ(event.output_position, static_cast<int>(sequence.num_tokens));
  ASSERT_LT(sequence.num_tokens, sequence.expected.tokens.size());
  ExpectSame(event.output, sequence.expected.tokens[sequence.num_tokens++], hash_);
}

void Simulation::OnFinish(const scheduler::FinishEvent& event) {
  LiveRequest& live = requests_.at(event.id);
  LiveSequence& sequence = live.sequences.at(event.index);
  EXPECT_FALSE(sequence.finished);
  sequence.finished = true;
  HashInto(event.id * 64 + event.index * 8 + static_cast<int>(event.reason), hash_);
  EXPECT_EQ(event.num_output_tokens, static_cast<int>(sequence.num_tokens));
  EXPECT_EQ(event.num_prompt_tokens, static_cast<int>(live.request.prompt_token_ids.size()));
  if (event.index > 0 && event.num_cached_tokens > 0) marks_->Hit("follower shared prefix");
  const bool never_ran = event.first_scheduled == TimePoint{};
  switch (event.reason) {
    case FinishReason::kCancelled:
      EXPECT_TRUE(sequence.abort_sent);
      return;
    case FinishReason::kDeadline:
      EXPECT_LE(live.request.deadline, step_start_);
      if (never_ran) marks_->Hit("deadline in queue");
      if (sequence.num_tokens > 0) marks_->Hit("deadline after tokens");
      return;
    default:
      CheckOutcome(live, sequence, event);
  }
}

void Simulation::CheckOutcome(const LiveRequest& live, const LiveSequence& sequence,
                              const scheduler::FinishEvent& event) {
  EXPECT_EQ(event.reason, sequence.expected.reason);
  if (event.reason == FinishReason::kError) return marks_->Hit("row not finite");
  EXPECT_TRUE(live.prompt_done);
  EXPECT_EQ(sequence.num_tokens, sequence.expected.tokens.size());
  if (event.index == 0) {
    EXPECT_EQ(live.num_prompt_logprobs, sequence.expected.prompt_logprobs.size());
  }
  if (live.request.max_tokens == 0) marks_->Hit("scored only");
  if (event.reason != FinishReason::kLength) {
    marks_->Hit("stopped by token");
    EXPECT_EQ(event.stop_token, sequence.expected.tokens.back().token_id);
  }
  marks_->Hit("finished unharmed");
}

uint64_t current_seed = 0;  // for the signal handler

void PrintSeedOnAbort(int) {
  char text[96];
  const int length = std::snprintf(text, sizeof(text), "aborted at MINITRON_SIM_SEED=%llu\n",
                                   static_cast<unsigned long long>(current_seed));
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, text, length);
}

uint64_t RunSeed(uint64_t seed, Marks* marks) {
  current_seed = seed;
  SCOPED_TRACE("replay with MINITRON_SIM_SEED=" + std::to_string(seed));
  Simulation simulation(seed, marks);
  return simulation.Run();
}

TEST(SchedulerSimulation, EverySeedKeepsTheInvariants) {
  std::signal(SIGABRT, PrintSeedOnAbort);
  Marks marks;
  if (const char* seed = std::getenv("MINITRON_SIM_SEED")) {
    RunSeed(std::strtoull(seed, nullptr, 10), &marks);
    return;
  }
  const char* count = std::getenv("MINITRON_SIM_SEEDS");
  const uint64_t num_seeds = count == nullptr ? 6000 : std::strtoull(count, nullptr, 10);
  for (uint64_t seed = 1; seed <= num_seeds && !HasFailure(); ++seed) RunSeed(seed, &marks);
  if (HasFailure()) return;
  for (const auto& [name, hits] : marks.counts) {
    EXPECT_GT(hits, 0) << name << " never happened";
    RecordProperty(name, std::to_string(hits));
    std::printf("%-36s %lld\n", name.c_str(), static_cast<long long>(hits));
  }
}

TEST(SchedulerSimulation, ASeedReplaysTheSameEvents) {
  Marks marks;
  for (uint64_t seed = 1; seed <= 20; ++seed) EXPECT_EQ(RunSeed(seed, &marks), RunSeed(seed, &marks)) << seed;
}

}  // namespace
}  // namespace minitron::simulation
