// VirtualServer: the real EngineCore in virtual time, over a runner that computes nothing and takes the time of a cost
// model. Requests arrive on a schedule; the result says when each got which token. Deterministic: a table of numbers
// made with it is the same on every machine.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "scheduler/engine_core.h"
#include "tests/bench/cost_model.h"

namespace minitron::bench {

struct VirtualServerOptions {
  CostModel cost;
  scheduler::EngineCoreOptions core;
  int num_kv_blocks = 57600;  // 0.92 M tokens of 16: what is left of an H200 beside the weights
  int block_size = 16;
  int max_num_sequences = 64;
  int max_step_tokens = 512;
  int max_context_tokens = 4096;
};

// One request and what became of it. Times in seconds since the start.
struct Job {
  // Asked for.
  double arrival_s = 0;
  std::string tenant;
  int priority = 0;
  int num_prompt_tokens = 512;
  int num_output_tokens = 128;
  double first_token_timeout_s = 0;  // 0: none
  // Happened.
  bool refused = false;
  std::string refusal;  // the reason
  std::vector<double> token_s;
  double end_s = 0;
  scheduler::FinishReason reason = scheduler::FinishReason::kError;

  bool completed() const { return !refused && reason == scheduler::FinishReason::kLength; }
  double time_to_first_token_s() const { return token_s.front() - arrival_s; }
};

class VirtualServer : public scheduler::StepSink {
 public:
  explicit VirtualServer(const VirtualServerOptions& options);

  // Runs the jobs, in order of arrival, and stops at `until_s`, or when all have ended. Call once.
  std::vector<Job> Run(std::vector<Job> jobs, double until_s);

  int64_t num_steps() const { return static_cast<int64_t>(core_.num_steps()); }

  void OnStep(scheduler::StepOutput output) override;

 private:
  // Gives every sampled row the same token, when the clock has come to the end of its batch.
  class Runner : public engine::ModelRunner {
   public:
    Runner(const VirtualServerOptions& options, scheduler::TimePoint* now);
    absl::Status Submit(const engine::Batch& batch) override;
    absl::StatusOr<engine::StepResult> Collect() override;
    const engine::ModelInfo& model_info() const override { return info_; }
    int num_kv_blocks() const override { return options_.num_kv_blocks; }
    int block_size() const override { return options_.block_size; }
    int max_num_tokens() const override { return options_.max_step_tokens; }
    int max_num_sequences() const override { return options_.max_num_sequences; }

   private:
    struct Running {
      engine::StepResult result;
      scheduler::TimePoint done;
    };
    const VirtualServerOptions options_;
    engine::ModelInfo info_;
    scheduler::TimePoint* const now_;  // owned by the server
    scheduler::TimePoint device_free_;
    std::deque<Running> running_;
  };

  void Submit(size_t index);
  double SecondsOf(scheduler::TimePoint time) const;

  scheduler::TimePoint now_ = kStart;
  Runner runner_;
  scheduler::EngineCore core_;
  std::vector<Job> jobs_;

  static constexpr scheduler::TimePoint kStart = scheduler::TimePoint(std::chrono::seconds(1000));
};

// Exact value at `share` of the sorted values (nearest rank); 0 of none.
double Quantile(std::vector<double> values, double share);

// Poisson arrivals of `rate` per second in [0, until_s), lengths uniform in [low, high]; the same for the same seed.
struct Traffic {
  std::string tenant;
  int priority = 0;
  double rate = 1;
  int min_prompt = 256, max_prompt = 768;
  int min_output = 64, max_output = 192;
  double first_token_timeout_s = 0;
  uint64_t seed = 1;
};
std::vector<Job> MakeJobs(const Traffic& traffic, double until_s);
std::vector<Job> Merge(std::vector<Job> a, const std::vector<Job>& b);  // by arrival

}  // namespace minitron::bench
