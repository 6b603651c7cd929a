#include "tests/bench/scenarios.h"

#include <algorithm>

namespace minitron::bench {
namespace {

constexpr double kFirstTokenTimeout = 2;  // seconds

VirtualServerOptions ServerOptions() {
  VirtualServerOptions options;
  options.core.scheduler.itl_target = std::chrono::milliseconds(15);
  options.core.scheduler.max_prefill_chunk = 512;
  options.max_num_sequences = 256;
  options.max_step_tokens = 768;
  return options;
}

// Requests completed in [from_s, until_s) with their first token in time, per second.
double Goodput(const std::vector<Job>& jobs, double from_s, double until_s) {
  int count = 0;
  for (const Job& job : jobs) {
    if (!job.completed() || job.end_s < from_s || job.end_s >= until_s) continue;
    count += job.time_to_first_token_s() <= kFirstTokenTimeout ? 1 : 0;
  }
  return count / (until_s - from_s);
}

std::vector<double> FirstTokenTimes(const std::vector<Job>& jobs, const std::string& tenant, double from_s) {
  std::vector<double> times;
  for (const Job& job : jobs) {
    if (job.tenant == tenant && job.arrival_s >= from_s && !job.token_s.empty()) {
      times.push_back(job.time_to_first_token_s());
    }
  }
  return times;
}

OverloadPoint MeasureLoad(double load, double capacity) {
  constexpr double kWarmUp = 15, kEnd = 75;
  Traffic traffic;
  traffic.rate = load * capacity;
  traffic.first_token_timeout_s = kFirstTokenTimeout;
  const std::vector<Job> jobs = VirtualServer(ServerOptions()).Run(MakeJobs(traffic, kEnd), kEnd);
  OverloadPoint point{.load = load, .offered = traffic.rate};
  point.goodput = Goodput(jobs, kWarmUp, kEnd);
  point.p99_ttft_s = Quantile(FirstTokenTimes(jobs, "", kWarmUp), 0.99);
  int num_offered = 0, num_refused = 0, num_expired = 0;
  for (const Job& job : jobs) {
    if (job.arrival_s < kWarmUp || job.arrival_s > kEnd - 10) continue;
    ++num_offered;
    num_refused += job.refused ? 1 : 0;
    num_expired += !job.refused && job.end_s > 0 && job.reason == scheduler::FinishReason::kDeadline ? 1 : 0;
  }
  point.refused_share = static_cast<double>(num_refused) / num_offered;
  point.expired_share = static_cast<double>(num_expired) / num_offered;
  return point;
}

}  // namespace

double MeasureCapacity() {
  // As many as are needed to keep the server busy, all there at once.
  Traffic traffic;
  traffic.rate = 1e6;
  std::vector<Job> jobs = MakeJobs(traffic, 4000 / traffic.rate);
  VirtualServerOptions options = ServerOptions();
  options.core.queue = {.max_sequences = 1 << 20, .max_prompt_tokens = 1 << 30, .max_bytes = int64_t{1} << 40};
  jobs = VirtualServer(options).Run(std::move(jobs), 40);
  int count = 0;
  for (const Job& job : jobs) count += job.completed() && job.end_s >= 10 ? 1 : 0;
  return count / 30.0;
}

OverloadResult MeasureOverload(const std::vector<double>& loads) {
  OverloadResult result;
  result.capacity = MeasureCapacity();
  for (const double load : {0.5, 0.75, 1.0, 1.25, 1.5}) {
    result.peak = std::max(result.peak, MeasureLoad(load, result.capacity).goodput);
  }
  for (const double load : loads) {
    result.points.push_back(MeasureLoad(load, result.capacity));
    result.peak = std::max(result.peak, result.points.back().goodput);
  }
  for (OverloadPoint& point : result.points) point.share_of_peak = point.goodput / result.peak;
  return result;
}

FairnessResult MeasureFlood() {
  constexpr double kWarmUp = 10, kEnd = 100;
  Traffic polite{.tenant = "polite", .rate = 15, .first_token_timeout_s = kFirstTokenTimeout, .seed = 2};
  Traffic flood{.tenant = "flood", .rate = 1500, .first_token_timeout_s = kFirstTokenTimeout, .seed = 3};
  const std::vector<Job> alone = VirtualServer(ServerOptions()).Run(MakeJobs(polite, kEnd), kEnd);
  const std::vector<Job> both =
      VirtualServer(ServerOptions()).Run(Merge(MakeJobs(polite, kEnd), MakeJobs(flood, kEnd)), kEnd);
  FairnessResult result;
  const std::vector<double> alone_s = FirstTokenTimes(alone, "polite", kWarmUp);
  const std::vector<double> both_s = FirstTokenTimes(both, "polite", kWarmUp);
  result.alone_p50_s = Quantile(alone_s, 0.5);
  result.alone_p99_s = Quantile(alone_s, 0.99);
  result.flood_p50_s = Quantile(both_s, 0.5);
  result.flood_p99_s = Quantile(both_s, 0.99);
  result.completed_per_s = Goodput(both, kWarmUp, kEnd);
  int num_sent = 0, num_completed = 0;
  for (const Job& job : both) {
    if (job.tenant != "polite" || job.arrival_s < kWarmUp || job.arrival_s > kEnd - 10) continue;
    ++num_sent;
    num_completed += job.completed() ? 1 : 0;
  }
  result.served_share = static_cast<double>(num_completed) / num_sent;
  return result;
}

double MeasureJain() {
  constexpr double kWarmUp = 10, kEnd = 70;
  Traffic less{.tenant = "less", .rate = 100, .first_token_timeout_s = kFirstTokenTimeout, .seed = 4};
  Traffic more{.tenant = "more", .rate = 1000, .first_token_timeout_s = kFirstTokenTimeout, .seed = 5};
  const std::vector<Job> jobs =
      VirtualServer(ServerOptions()).Run(Merge(MakeJobs(less, kEnd), MakeJobs(more, kEnd)), kEnd);
  double sum = 0, squares = 0;
  for (const char* tenant : {"less", "more"}) {
    double service = 0;
    for (const Job& job : jobs) {
      if (job.tenant != tenant || job.token_s.empty() || job.token_s.front() < kWarmUp) continue;
      service += job.num_prompt_tokens + 2.0 * static_cast<double>(job.token_s.size());
    }
    sum += service;
    squares += service * service;
  }
  return sum * sum / (2 * squares);
}

LatencyResult MeasureLatency(double itl_target_ms, int max_step_tokens, int max_prefill_chunk) {
  constexpr double kWarmUp = 5, kEnd = 25;
  VirtualServerOptions options;
  options.max_step_tokens = max_step_tokens;
  options.core.scheduler.max_prefill_chunk = max_prefill_chunk;
  options.core.scheduler.itl_target = std::chrono::microseconds(static_cast<int64_t>(itl_target_ms * 1000));
  options.max_context_tokens = 8192;
  std::vector<Job> jobs;
  for (int stream = 0; stream < 32; ++stream) {
    Job job;
    job.num_prompt_tokens = 512;
    job.num_output_tokens = 7000;
    jobs.push_back(job);
  }
  for (double time = 1; time < kEnd; time += 0.5) {
    Job job;
    job.arrival_s = time;
    job.num_prompt_tokens = 4000;
    job.num_output_tokens = 1;
    job.tenant = "prompt";
    jobs.push_back(job);
  }
  jobs = VirtualServer(options).Run(std::move(jobs), kEnd);
  std::vector<double> gaps;
  for (int stream = 0; stream < 32; ++stream) {
    const std::vector<double>& times = jobs[stream].token_s;
    for (size_t i = 1; i < times.size(); ++i) {
      if (times[i - 1] >= kWarmUp) gaps.push_back(times[i] - times[i - 1]);
    }
  }
  LatencyResult result;
  result.median_s = Quantile(gaps, 0.5);
  result.p99_s = Quantile(gaps, 0.99);
  result.worst_s = Quantile(gaps, 1);
  result.prompt_ttft_s = Quantile(FirstTokenTimes(jobs, "prompt", kWarmUp), 0.5);
  return result;
}

}  // namespace minitron::bench
