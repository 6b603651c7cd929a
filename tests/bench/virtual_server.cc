#include "tests/bench/virtual_server.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "engine/base/check.h"

namespace minitron::bench {

using scheduler::Duration;
using scheduler::Request;
using scheduler::TimePoint;

namespace {

constexpr engine::TokenId kToken = 5;

Duration ToDuration(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

}  // namespace

double CostModel::Seconds(const engine::Batch& batch) const {
  double kv_tokens = 0, pairs = 0;
  for (int s = 0; s < batch.num_sequences(); ++s) {
    const int num_rows = batch.query_start[s + 1] - batch.query_start[s];
    kv_tokens += batch.kv_lens[s];
    if (num_rows > 1) pairs += num_rows * (batch.kv_lens[s] - (num_rows - 1) / 2.0);
  }
  const double products =
      std::max(weight_bytes / bytes_per_second, flops_per_token * batch.num_tokens() / flops_per_second);
  return host_seconds + products + kv_tokens * kv_bytes_per_token / bytes_per_second +
         pairs * flops_per_pair / flops_per_second;
}

VirtualServer::Runner::Runner(const VirtualServerOptions& options, TimePoint* now) : options_(options), now_(now) {
  info_.architecture = info_.backend = "virtual";
  info_.vocab_size = 256000;
  info_.max_context_tokens = options.max_context_tokens;
}

absl::Status VirtualServer::Runner::Submit(const engine::Batch& batch) {
  Running running;
  running.result.rows.resize(batch.results.size());
  for (engine::ResultRowOutput& row : running.result.rows) row.token_id = kToken;
  running.done = std::max(*now_, device_free_) + ToDuration(options_.cost.Seconds(batch));
  device_free_ = running.done;
  running_.push_back(std::move(running));
  return absl::OkStatus();
}

absl::StatusOr<engine::StepResult> VirtualServer::Runner::Collect() {
  CHECK(!running_.empty());
  Running running = std::move(running_.front());
  running_.pop_front();
  *now_ = std::max(*now_, running.done);
  return std::move(running.result);
}

VirtualServer::VirtualServer(const VirtualServerOptions& options)
    : runner_(options, &now_), core_(options.core, &runner_, this, [this] { return now_; }) {}

double VirtualServer::SecondsOf(TimePoint time) const { return std::chrono::duration<double>(time - kStart).count(); }

void VirtualServer::Submit(size_t index) {
  Job& job = jobs_[index];
  Request request;
  request.id = index + 1;
  request.tenant = job.tenant;
  request.priority = job.priority;
  request.prompt_token_ids.assign(job.num_prompt_tokens, kToken);
  // No two prompts share a block: the first token is the job's own.
  request.prompt_token_ids[0] = static_cast<engine::TokenId>(index % 255000) + 6;
  request.max_tokens = job.num_output_tokens;
  request.arrival = kStart + ToDuration(job.arrival_s);
  if (job.first_token_timeout_s > 0) {
    request.first_token_deadline = request.arrival + ToDuration(job.first_token_timeout_s);
  }
  const absl::Status status = core_.Submit(std::move(request));
  if (status.ok()) return;
  job.refused = true;
  job.end_s = job.arrival_s;
  const auto reason = status.GetPayload(scheduler::kReasonTypeUrl);
  job.refusal = reason.has_value() ? std::string(*reason) : status.ToString();
}

std::vector<Job> VirtualServer::Run(std::vector<Job> jobs, double until_s) {
  jobs_ = std::move(jobs);
  CHECK(
      std::is_sorted(jobs_.begin(), jobs_.end(), [](const Job& a, const Job& b) { return a.arrival_s < b.arrival_s; }));
  size_t next = 0;
  while (SecondsOf(now_) < until_s) {
    while (next < jobs_.size() && jobs_[next].arrival_s <= SecondsOf(now_)) Submit(next++);
    if (core_.Step()) continue;
    if (next == jobs_.size()) break;
    now_ = std::max(now_, kStart + ToDuration(jobs_[next].arrival_s) + Duration(1));
  }
  return std::move(jobs_);
}

void VirtualServer::OnStep(scheduler::StepOutput output) {
  CHECK(output.engine_error.empty());
  const double time_s = SecondsOf(output.stats.time);
  for (const auto& event : output.tokens) jobs_[event.id - 1].token_s.push_back(time_s);
  for (const auto& event : output.finished) {
    jobs_[event.id - 1].end_s = time_s;
    jobs_[event.id - 1].reason = event.reason;
  }
}

double Quantile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  const auto rank = static_cast<size_t>(std::ceil(share * static_cast<double>(values.size())));
  const auto place = values.begin() + static_cast<int64_t>(std::clamp<size_t>(rank, 1, values.size()) - 1);
  std::nth_element(values.begin(), place, values.end());
  return *place;
}

std::vector<Job> MakeJobs(const Traffic& traffic, double until_s) {
  std::mt19937_64 random(traffic.seed);
  // Not std's distributions: their results differ between libraries.
  const auto uniform = [&random] { return (static_cast<double>(random() >> 11) + 0.5) * 0x1p-53; };
  const auto between = [&uniform](int low, int high) {
    return low + static_cast<int>(uniform() * static_cast<double>(high - low + 1));
  };
  std::vector<Job> jobs;
  for (double time = -std::log(uniform()) / traffic.rate; time < until_s; time -= std::log(uniform()) / traffic.rate) {
    Job job;
    job.arrival_s = time;
    job.tenant = traffic.tenant;
    job.priority = traffic.priority;
    job.num_prompt_tokens = between(traffic.min_prompt, traffic.max_prompt);
    job.num_output_tokens = between(traffic.min_output, traffic.max_output);
    job.first_token_timeout_s = traffic.first_token_timeout_s;
    jobs.push_back(std::move(job));
  }
  return jobs;
}

std::vector<Job> Merge(std::vector<Job> a, const std::vector<Job>& b) {
  a.insert(a.end(), b.begin(), b.end());
  std::stable_sort(a.begin(), a.end(), [](const Job& x, const Job& y) { return x.arrival_s < y.arrival_s; });
  return a;
}

}  // namespace minitron::bench
