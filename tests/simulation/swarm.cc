#include "tests/simulation/swarm.h"

#include <random>
#include <string>

#include "tests/simulation/world.h"

namespace minitron::simulation {
namespace {

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
};

class Swarm {
 public:
  Swarm(uint64_t seed, Marks* marks)
      : random_(seed), settings_(DrawSettings()), world_(settings_.world, marks, &violations_) {}

  SwarmResult Run();

 private:
  int Draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  bool Chance(double p) { return std::bernoulli_distribution(p)(random_); }

  Settings DrawSettings();
  Request DrawRequest();
  void AbortSome();

  std::mt19937_64 random_;
  Violations violations_;
  const Settings settings_;
  World world_;
  RequestId next_id_ = 1;
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
  core.scheduler.max_running_sequences = Chance(0.3) ? Draw(1, 8) : 0;
  core.scheduler.max_step_tokens = Chance(0.3) ? Draw(1, 64) : 0;
  core.scheduler.max_prefill_chunk = Draw(1, 48);
  core.scheduler.max_logprob_rows_per_step = Draw(1, 16);
  core.max_queued_requests = Draw(4, 40);
  s.num_requests = Draw(5, 30);
  s.num_tenants = Chance(0.5) ? Draw(2, 4) : 1;
  core.scheduler.fairness.wait_bound = milliseconds(Draw(1, 50));
  s.arrival_rate = Chance(0.3) ? 0.95 : 0.3;
  s.abort_rate = Chance(0.5) ? 0.1 : 0.0;
  s.deadline_rate = Chance(0.5) ? 0.3 : 0.0;
  return s;
}

Request Swarm::DrawRequest() {
  Request request;
  request.id = next_id_++;
  const int num_prompt = Draw(1, settings_.max_prompt);
  const int vocab_size = settings_.world.runner.vocab_size;
  for (int i = 0; i < num_prompt; ++i) request.prompt_token_ids.push_back(Draw(0, vocab_size - 1));
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
  request.arrival = world_.now();
  if (Chance(settings_.deadline_rate)) request.deadline = world_.now() + milliseconds(Draw(1, 60));
  return request;
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

SwarmResult Swarm::Run() {
  SwarmResult result;
  int num_submitted = 0;
  while (num_submitted < settings_.num_requests || !world_.idle()) {
    while (num_submitted < settings_.num_requests && Chance(settings_.arrival_rate)) {
      world_.Submit(DrawRequest());
      ++num_submitted;
    }
    if (Chance(settings_.abort_rate)) AbortSome();
    world_.Step();
    world_.Advance(milliseconds(Draw(0, 2)));
    // Work is finite: every step computes at least one token, and preemption only repeats what is bounded.
    violations_.Expect(++result.num_steps < 200000, "the work ends");
    if (!violations_.empty()) break;
  }
  if (violations_.empty()) world_.CheckNothingIsLeft();
  result.event_hash = world_.event_hash();
  result.violations = violations_.list();
  return result;
}

}  // namespace

SwarmResult RunSeed(uint64_t seed, Marks* marks) { return Swarm(seed, marks).Run(); }

}  // namespace minitron::simulation
