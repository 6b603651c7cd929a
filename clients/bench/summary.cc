#include "clients/bench/summary.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>

#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"

namespace minitron::bench {
namespace {

// Above these the figures say something about the client instead of the server.
constexpr double kMaxCpuShare = 0.25;
constexpr double kMaxLateS = 0.1;

double PeakPerSecond(const std::vector<CallRecord>& records) {
  std::map<int64_t, double> tokens;
  for (const CallRecord& record : records) {
    if (!record.ok()) continue;
    // A message may carry several tokens: each gets an equal part.
    const double part = record.output_tokens / static_cast<double>(record.gaps_s.size() + 1);
    double at = record.start_s + record.first_token_s;
    tokens[static_cast<int64_t>(at)] += part;
    for (const double gap : record.gaps_s) {
      at += gap;
      tokens[static_cast<int64_t>(at)] += part;
    }
  }
  double peak = 0;
  for (const auto& [second, count] : tokens) peak = std::max(peak, count);
  return peak;
}

bool Meets(const CallRecord& record, const Targets& targets) {
  return (targets.ttft_ms <= 0 || record.first_token_s * 1e3 <= targets.ttft_ms) &&
         (targets.tpot_ms <= 0 || record.TimePerToken() * 1e3 <= targets.tpot_ms) &&
         (targets.e2el_ms <= 0 || record.total_s * 1e3 <= targets.e2el_ms);
}

}  // namespace

double Percentile(const std::vector<double>& sorted, double percent) {
  if (sorted.empty()) return 0;
  const double position = percent / 100 * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(position);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (sorted[above] - sorted[below]) * (position - static_cast<double>(below));
}

Distribution Describe(std::vector<double> seconds) {
  Distribution result;
  if (seconds.empty()) return result;
  for (double& value : seconds) value *= 1e3;
  std::sort(seconds.begin(), seconds.end());
  const auto count = static_cast<double>(seconds.size());
  result.mean = std::accumulate(seconds.begin(), seconds.end(), 0.0) / count;
  double squares = 0;
  for (const double value : seconds) squares += (value - result.mean) * (value - result.mean);
  result.deviation = std::sqrt(squares / count);
  result.median = Percentile(seconds, 50);
  for (size_t i = 0; i < kPercentiles.size(); ++i) result.percentiles[i] = Percentile(seconds, kPercentiles[i]);
  return result;
}

bool ParseTargets(const std::string& text, Targets* targets) {
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const std::pair<absl::string_view, absl::string_view> pair = absl::StrSplit(part, absl::MaxSplits(':', 1));
    double* const target = pair.first == "ttft"   ? &targets->ttft_ms
                           : pair.first == "tpot" ? &targets->tpot_ms
                           : pair.first == "e2el" ? &targets->e2el_ms
                                                  : nullptr;
    double value = 0;
    if (target == nullptr || !absl::SimpleAtod(pair.second, &value) || !(value > 0) || !std::isfinite(value)) {
      return false;
    }
    *target = value;
  }
  return true;
}

Summary Summarize(const RunResult& run, const Targets& targets, unsigned processors) {
  Summary summary;
  std::vector<double> ttft;
  std::vector<double> tpot;
  std::vector<double> itl;
  std::vector<double> e2el;
  size_t good = 0;
  for (const CallRecord& record : run.records) {
    if (!record.ok()) {
      ++summary.failed;
      ++summary.errors[record.error];
      continue;
    }
    ++summary.completed;
    summary.input_tokens += record.prompt_tokens;
    summary.output_tokens += record.output_tokens;
    ttft.push_back(record.first_token_s);
    if (record.output_tokens > 1) tpot.push_back(record.TimePerToken());
    itl.insert(itl.end(), record.gaps_s.begin(), record.gaps_s.end());
    e2el.push_back(record.total_s);
    good += Meets(record, targets);
  }
  if (run.duration_s > 0) {
    summary.request_throughput = static_cast<double>(summary.completed) / run.duration_s;
    summary.output_throughput = static_cast<double>(summary.output_tokens) / run.duration_s;
    summary.total_throughput = static_cast<double>(summary.input_tokens + summary.output_tokens) / run.duration_s;
    summary.goodput = static_cast<double>(good) / run.duration_s;
    summary.client_cpu_share = run.client_cpu_s / run.duration_s / std::max(processors, 1u);
  }
  summary.peak_output_per_s = PeakPerSecond(run.records);
  summary.ttft = Describe(std::move(ttft));
  summary.tpot = Describe(std::move(tpot));
  summary.itl = Describe(std::move(itl));
  summary.e2el = Describe(std::move(e2el));
  return summary;
}

std::vector<std::string> Warnings(const RunResult& run, const Summary& summary) {
  std::vector<std::string> warnings;
  if (run.interrupted) warnings.push_back("interrupted: not all requests were sent");
  if (summary.client_cpu_share > kMaxCpuShare) {
    warnings.push_back(absl::StrFormat(
        "this program used %.0f %% of the machine's processors: the figures may be its own, use more machines or fewer "
        "requests",
        summary.client_cpu_share * 100));
  }
  if (run.late_s > kMaxLateS) {
    warnings.push_back(absl::StrFormat(
        "a request was sent %.2f s after its time: the load was lower than asked for (concurrency limit, or a busy "
        "machine)",
        run.late_s));
  }
  if (summary.failed > 0) {
    warnings.push_back(absl::StrFormat("%d of %d requests failed and are in no latency", summary.failed,
                                       summary.failed + summary.completed));
  }
  return warnings;
}

}  // namespace minitron::bench
