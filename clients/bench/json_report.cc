#include "clients/bench/json_report.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/cpp/format.h"

namespace minitron::bench {
namespace {

using OrderedJson = nlohmann::ordered_json;

void AddDistribution(const std::string& name, const Distribution& distribution, OrderedJson* json) {
  (*json)["mean_" + name + "_ms"] = distribution.mean;
  (*json)["median_" + name + "_ms"] = distribution.median;
  (*json)["std_" + name + "_ms"] = distribution.deviation;
  for (size_t i = 0; i < kPercentiles.size(); ++i) {
    (*json)[absl::StrCat("p", kPercentiles[i], "_", name, "_ms")] = distribution.percentiles[i];
  }
}

void AddDetails(const RunResult& run, OrderedJson* json) {
  for (const char* const key : {"input_lens", "output_lens", "ttfts", "itls", "start_times", "latencies", "errors"}) {
    (*json)[key] = OrderedJson::array();
  }
  for (const CallRecord& record : run.records) {
    (*json)["input_lens"].push_back(record.prompt_tokens);
    (*json)["output_lens"].push_back(record.output_tokens);
    (*json)["ttfts"].push_back(record.first_token_s);
    (*json)["itls"].push_back(record.gaps_s);
    (*json)["start_times"].push_back(record.start_s);
    (*json)["latencies"].push_back(record.total_s);
    (*json)["errors"].push_back(record.error);
  }
}

std::string Row(const std::string& name, const Distribution& distribution) {
  std::string row = absl::StrFormat("%-6s %10.2f", name, distribution.mean);
  for (const double value : distribution.percentiles) absl::StrAppend(&row, absl::StrFormat(" %10.2f", value));
  return row + "\n";
}

}  // namespace

std::string JsonLine(const ReportContext& context, const RunResult& run, const Summary& summary) {
  OrderedJson json;
  json["date"] = context.date;
  json["endpoint_type"] = json["backend"] = context.protocol;
  json["label"] = run.label;
  json["model_id"] = json["tokenizer_id"] = context.model;
  json["base_url"] = context.target;
  json["dataset"] = context.dataset;
  json["seed"] = context.seed;
  json["num_prompts"] = run.records.size();
  // vLLM writes "inf" when requests are not spaced in time.
  json["request_rate"] = run.request_rate > 0 ? OrderedJson(run.request_rate) : OrderedJson("inf");
  json["burstiness"] = run.burstiness;
  json["max_concurrency"] = run.max_concurrency > 0 ? OrderedJson(run.max_concurrency) : OrderedJson();
  json["duration"] = run.duration_s;
  json["completed"] = summary.completed;
  json["failed"] = summary.failed;
  json["total_input_tokens"] = summary.input_tokens;
  json["total_output_tokens"] = summary.output_tokens;
  json["request_throughput"] = summary.request_throughput;
  json["request_goodput"] = context.targets.any() ? OrderedJson(summary.goodput) : OrderedJson();
  json["output_throughput"] = summary.output_throughput;
  json["total_token_throughput"] = summary.total_throughput;
  json["max_output_tokens_per_s"] = summary.peak_output_per_s;
  json["max_concurrent_requests"] = run.peak_concurrency;
  AddDistribution("ttft", summary.ttft, &json);
  AddDistribution("tpot", summary.tpot, &json);
  AddDistribution("itl", summary.itl, &json);
  AddDistribution("e2el", summary.e2el, &json);
  json["errors_by_code"] = summary.errors;
  json["client_cpu_share"] = summary.client_cpu_share;
  json["warnings"] = Warnings(run, summary);
  if (context.detailed) AddDetails(run, &json);
  // A server's message never gets here, but names of models and labels do, and need not be UTF-8.
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace) + "\n";
}

std::string TextReport(const ReportContext& context, const RunResult& run, const Summary& summary) {
  std::string text = absl::StrFormat("%s, %s, %s: %d completed, %d failed in %.2f s\n", context.protocol,
                                     context.dataset, run.label, summary.completed, summary.failed, run.duration_s);
  absl::StrAppend(&text,
                  absl::StrFormat("%.2f requests/s, %.1f output tokens/s, %.1f tokens/s in all, peak %.0f output "
                                  "tokens/s, at most %d at once\n",
                                  summary.request_throughput, summary.output_throughput, summary.total_throughput,
                                  summary.peak_output_per_s, run.peak_concurrency));
  if (context.targets.any()) {
    absl::StrAppend(&text, absl::StrFormat("goodput %.2f requests/s within the targets\n", summary.goodput));
  }
  absl::StrAppend(&text, absl::StrFormat("%-6s %10s", "ms", "mean"));
  for (const int percentile : kPercentiles)
    absl::StrAppend(&text, absl::StrFormat(" %10s", absl::StrCat("p", percentile)));
  absl::StrAppend(&text, "\n", Row("TTFT", summary.ttft), Row("TPOT", summary.tpot), Row("ITL", summary.itl),
                  Row("E2E", summary.e2el));
  for (const auto& [code, count] : summary.errors) {
    // One example says more than a code.
    std::string example;
    for (const CallRecord& record : run.records) {
      if (record.error == code && example.empty()) example = record.message.substr(0, 200);
    }
    absl::StrAppend(&text, count, " x ", code, example.empty() ? "" : ": ", client::ForTerminal(example), "\n");
  }
  for (const std::string& warning : Warnings(run, summary)) absl::StrAppend(&text, "warning: ", warning, "\n");
  return text;
}

}  // namespace minitron::bench
