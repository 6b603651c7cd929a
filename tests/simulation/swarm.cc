#include "tests/simulation/swarm.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "tests/simulation/world.h"

namespace minitron::simulation {
namespace {

using engine::TokenId;
using scheduler::Request;
using scheduler::RequestId;
using std::chrono::milliseconds;

// How one seed's world looks.
struct Settings {
  WorldOptions world;
  int num_requests = 0;
  int num_tenants = 1;
  int max_prompt = 0;
  int max_output = 0;
  double arrival_rate = 0;  // chance of one more request per step
  double abort_rate = 0;
  double deadline_rate = 0;
  double first_token_rate = 0;
  double repeat_rate = 0;      // chance that a prompt begins as another one
  double meanwhile_rate = 0;   // chance of aborts while a step runs, and of a sink that holds it up
  double clock_jump_rate = 0;  // chance of a minute between two steps
  int drain_at_step = -1;
  int kill_at_step = -1;
};

class Swarm {
 public:
  Swarm(uint64_t seed, Marks* marks)
      : random_(seed), marks_(marks), settings_(DrawSettings()), world_(settings_.world, marks, &violations_) {
    world_.set_meanwhile([this](bool runner_works) { Meanwhile(runner_works); });
  }

  SwarmResult Run();

 private:
  int Draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  bool Chance(double p) { return std::bernoulli_distribution(p)(random_); }

  Settings DrawSettings();
  Request DrawRequest();
  std::vector<TokenId> DrawPrompt();
  void SubmitOne();
  void AbortSome();
  void Meanwhile(bool runner_works);

  std::mt19937_64 random_;
  Marks* const marks_;  // owned by the test
  Violations violations_;
  const Settings settings_;
  World world_;
  RequestId next_id_ = 1;
  std::vector<std::vector<TokenId>> texts_;  // that new prompts may begin with
};

Settings Swarm::DrawSettings() {
  Settings s;
  testing::FakeModelRunnerOptions& runner = s.world.runner;
  scheduler::EngineCoreOptions& core = s.world.core;
  s.max_prompt = Draw(1, 40);
  s.max_output = Draw(1, 30);
  runner.block_size = 1 << Draw(0, 4);
  const int num_needed = (s.max_prompt + s.max_output + runner.block_size - 1) / runner.block_size;
  runner.num_kv_blocks = num_needed * Draw(1, 4) + Draw(0, 3);
  runner.max_num_tokens = Draw(1, 64);
  runner.max_num_sequences = Draw(1, 8);
  runner.max_context_tokens = s.max_prompt + s.max_output;
  runner.vocab_size = Draw(8, 64);
  runner.nan_one_in = Chance(0.2) ? 100 : 0;
  runner.wild_token_one_in = Chance(0.2) ? 100 : 0;
  runner.compute_late = Chance(0.5);
  if (Chance(0.2)) {
    runner.accident_one_in = Draw(10, 60);
    runner.nan_one_in = runner.wild_token_one_in = 0;
  }
  runner.fail_at_step = Chance(0.05) ? Draw(0, 60) : -1;
  runner.fail_at_submit = Chance(0.03) ? Draw(0, 60) : -1;
  core.scheduler.max_running_sequences = Chance(0.3) ? Draw(1, 8) : 0;
  core.scheduler.max_step_tokens = Chance(0.3) ? Draw(1, 64) : 0;
  core.scheduler.max_prefill_chunk = Draw(1, 48);
  core.scheduler.max_logprob_rows_per_step = Draw(1, 16);
  core.scheduler.prefix_sharing = static_cast<scheduler::PrefixSharing>(Draw(0, 2));
  core.scheduler.prefix_hash_key = {random_(), random_()};
  core.scheduler.prefix_hash_bits = Chance(0.3) ? Draw(0, 4) : 64;
  core.scheduler.admission_mode = static_cast<scheduler::AdmissionMode>(Draw(0, 1));
  core.scheduler.max_preemptions = Draw(0, 4);
  core.overlap = static_cast<scheduler::Overlap>(Draw(0, 2));
  core.queue.max_sequences = Draw(4, 40);
  if (Chance(0.2)) core.queue.max_prompt_tokens = Draw(20, 200);
  if (Chance(0.1)) core.queue.max_bytes = Draw(2000, 20000);
  if (Chance(0.1)) s.world.slow_step_one_in = Draw(10, 60);
  if (Chance(0.5)) s.world.step_time = std::chrono::microseconds(Draw(1, 2000));
  if (Chance(0.5)) s.world.token_time = std::chrono::microseconds(Draw(1, 100));
  if (Chance(0.3)) core.scheduler.itl_target = std::chrono::microseconds(Draw(500, 8000));
  s.first_token_rate = Chance(0.3) ? 0.3 : 0.0;
  s.num_requests = Draw(5, 30);
  s.num_tenants = Chance(0.5) ? Draw(2, 4) : 1;
  core.scheduler.fairness.burst_credit = Chance(0.5) ? Draw(0, 100) : 0;
  core.scheduler.fairness.wait_bound = milliseconds(Draw(1, 50));
  s.arrival_rate = Chance(0.3) ? 0.95 : 0.3;
  s.abort_rate = Chance(0.5) ? 0.1 : 0.0;
  s.deadline_rate = Chance(0.5) ? 0.3 : 0.0;
  s.repeat_rate = Chance(0.7) ? 0.8 : 0.0;
  s.meanwhile_rate = Chance(0.3) ? 0.1 : 0.0;
  s.clock_jump_rate = Chance(0.1) ? 0.02 : 0.0;
  s.drain_at_step = Chance(0.1) ? Draw(0, 100) : -1;
  s.kill_at_step = Chance(0.05) ? Draw(0, 100) : -1;
  return s;
}

std::vector<TokenId> Swarm::DrawPrompt() {
  const int num_tokens = Draw(1, settings_.max_prompt);
  std::vector<TokenId> prompt;
  if (!texts_.empty() && Chance(settings_.repeat_rate)) {
    const std::vector<TokenId>& text = texts_[Draw(0, static_cast<int>(texts_.size()) - 1)];
    prompt.assign(text.begin(), text.begin() + Draw(0, std::min<int>(num_tokens, static_cast<int>(text.size()))));
  }
  while (static_cast<int>(prompt.size()) < num_tokens) prompt.push_back(Draw(0, settings_.world.runner.vocab_size - 1));
  return prompt;
}

Request Swarm::DrawRequest() {
  Request request;
  request.id = next_id_++;
  request.prompt_token_ids = DrawPrompt();
  const int num_prompt = static_cast<int>(request.prompt_token_ids.size());
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
  request.tenant = settings_.num_tenants > 1 ? "t" + std::to_string(Draw(1, settings_.num_tenants)) : "";
  if (Chance(0.2)) request.cache_salt = "salt";
  request.waits_for_each_token = Chance(0.1);
  request.arrival = world_.now();
  if (Chance(settings_.deadline_rate)) request.deadline = world_.now() + milliseconds(Draw(1, 60));
  if (Chance(settings_.first_token_rate)) request.first_token_deadline = world_.now() + milliseconds(Draw(1, 40));
  return request;
}

void Swarm::SubmitOne() {
  const Request request = DrawRequest();
  if (!world_.Submit(request)) return;
  texts_.push_back(request.prompt_token_ids);
  // What the next turn of a conversation begins with.
  for (const auto& row : world_.requests().at(request.id).sequences[0].expected.tokens) {
    texts_.back().push_back(row.token_id);
  }
}

void Swarm::AbortSome() {
  for (const auto& [id, live] : world_.requests()) {
    if (!Chance(settings_.abort_rate / 4)) continue;
    if (Chance(0.5)) {
      world_.Abort(id);
    } else {
      world_.AbortSequence(id, Draw(0, live.request.num_sequences));  // one past the end is among them
    }
  }
  world_.Abort(next_id_ + 1000);  // unknown
}

void Swarm::Meanwhile(bool runner_works) {
  if (!Chance(settings_.meanwhile_rate)) return;
  if (!runner_works && Chance(0.3)) world_.Advance(milliseconds(Draw(0, 20)));
  const RequestId id = Draw(1, static_cast<int>(next_id_) - 1);
  if (world_.requests().count(id) > 0) world_.AbortMeanwhile(id);
}

SwarmResult Swarm::Run() {
  SwarmResult result;
  int num_submitted = 0;
  while (num_submitted < settings_.num_requests || !world_.idle()) {
    while (num_submitted < settings_.num_requests && Chance(settings_.arrival_rate)) {
      SubmitOne();
      ++num_submitted;
    }
    if (Chance(settings_.abort_rate)) AbortSome();
    if (result.num_steps == settings_.drain_at_step) world_.BeginDrain();
    if (result.num_steps == settings_.kill_at_step) {
      marks_->Hit("killed");
      break;
    }
    world_.Step();
    world_.Advance(Chance(settings_.clock_jump_rate) ? std::chrono::minutes(1) : milliseconds(Draw(0, 2)));
    ++result.num_steps;
    if (!violations_.empty() || world_.failed()) break;
  }
  if (violations_.empty() && world_.idle() && !world_.failed()) world_.CheckNothingIsLeft();
  result.event_hash = world_.event_hash();
  result.violations = violations_.list();
  return result;
}

}  // namespace

SwarmResult RunSeed(uint64_t seed, Marks* marks) { return Swarm(seed, marks).Run(); }

}  // namespace minitron::simulation
