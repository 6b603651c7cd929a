#include "clients/bench/html_report.h"

#include <algorithm>
#include <functional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/bench/chart.h"

namespace minitron::bench {
namespace {

// More points than this are not seen in a curve of 500 pixels.
constexpr size_t kMaxCurvePoints = 200;
// More runs than this cannot be told apart in one chart; the tables have all of them.
constexpr size_t kMaxCurves = 6;

const char kHead[] = R"(<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>minitron-bench</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em; color: #1b1f24; }
h1 { font-size: 1.4em; margin-bottom: 0; } h2 { font-size: 1.1em; margin-top: 2em; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1em; }
figure { margin: 0; border: 1px solid #d5d9de; border-radius: 6px; padding: 8px; }
figure > svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: #444b54; }
svg text.title { font-size: 14px; font-weight: 600; fill: #1b1f24; }
.grid { stroke: #e4e7eb; } figcaption { font-size: 13px; display: flex; flex-wrap: wrap; gap: 2px 16px; padding-left: 60px; }
.key { width: 26px; height: 8px; vertical-align: middle; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.warning { background: #fff4d6; border-left: 4px solid #e69f00; padding: 6px 10px; margin: 6px 0; }
</style></head><body>
)";

using Samples = std::function<void(const CallRecord&, std::vector<double>*)>;

Series Cdf(const ReportedRun& reported, const Samples& take) {
  std::vector<double> values;
  for (const CallRecord& record : reported.run.records) {
    if (record.ok()) take(record, &values);
  }
  std::sort(values.begin(), values.end());
  Series series{reported.run.label, {}};
  const size_t points = std::min(values.size(), kMaxCurvePoints);
  for (size_t i = 0; i < points; ++i) {
    // The last point is the largest value, at 1.
    const size_t rank = (i + 1) * values.size() / points;
    series.points.emplace_back(values[rank - 1] * 1e3, static_cast<double>(rank) / static_cast<double>(values.size()));
  }
  return series;
}

std::string CdfChart(const std::string& title, const std::vector<ReportedRun>& runs, const Samples& take) {
  Chart chart{title, "ms", "share of samples", true, false, 1, {}};
  for (size_t i = 0; i < std::min(runs.size(), kMaxCurves); ++i) chart.series.push_back(Cdf(runs[i], take));
  return ToSvg(chart);
}

std::string Curve(const std::string& title, const std::vector<ReportedRun>& runs, Distribution Summary::*distribution) {
  Chart chart{title, "output tokens/s", "ms", false, true, 0, {{"median", {}}, {"p99", {}}}};
  for (const ReportedRun& reported : runs) {
    const Distribution& of_run = reported.summary.*distribution;
    chart.series[0].points.emplace_back(reported.summary.output_throughput, of_run.median);
    chart.series[1].points.emplace_back(reported.summary.output_throughput, of_run.percentiles.back());
  }
  return ToSvg(chart);
}

// Requests open at once over time, each point the mean of a hundredth of the run.
std::string Timeline(const ReportedRun& reported) {
  constexpr size_t kSlices = 100;
  const double slice_s = reported.run.duration_s / kSlices;
  std::vector<double> open(kSlices);
  for (const CallRecord& record : reported.run.records) {
    const double end_s = record.start_s + record.total_s;
    for (auto i = static_cast<size_t>(record.start_s / slice_s); i < kSlices && slice_s > 0; ++i) {
      const double begin = static_cast<double>(i) * slice_s;
      if (begin >= end_s) break;
      open[i] += (std::min(end_s, begin + slice_s) - std::max(record.start_s, begin)) / slice_s;
    }
  }
  Series series{reported.run.label, {}};
  for (size_t i = 0; i < kSlices; ++i) series.points.emplace_back((static_cast<double>(i) + 0.5) * slice_s, open[i]);
  return ToSvg({"Open requests: " + reported.run.label, "s", "requests", false, false, 0, {series}});
}

std::string OverviewTable(const ReportContext& context, const std::vector<ReportedRun>& runs) {
  std::string html =
      "<div class=\"table\"><table><tr><th>run</th><th>completed</th><th>failed</th><th>requests/s</th><th>output "
      "tokens/s</th><th>tokens/s in all</th>";
  if (context.targets.any()) html += "<th>goodput /s</th>";
  html += "<th>at once</th><th>client CPU</th></tr>\n";
  for (const auto& [run, summary] : runs) {
    absl::StrAppend(
        &html, absl::StrFormat("<tr><td>%s</td><td>%d</td><td>%d</td><td>%.2f</td><td>%.1f</td><td>%.1f</td>",
                               EscapeHtml(run.label), summary.completed, summary.failed, summary.request_throughput,
                               summary.output_throughput, summary.total_throughput));
    if (context.targets.any()) absl::StrAppend(&html, absl::StrFormat("<td>%.2f</td>", summary.goodput));
    absl::StrAppend(&html, absl::StrFormat("<td>%d</td><td>%.1f %%</td></tr>\n", run.peak_concurrency,
                                           summary.client_cpu_share * 100));
  }
  return html + "</table></div>\n";
}

std::string LatencyTable(const std::vector<ReportedRun>& runs) {
  std::string html = "<div class=\"table\"><table><tr><th>run</th><th>ms</th><th>mean</th>";
  for (const int percentile : kPercentiles) absl::StrAppend(&html, "<th>p", percentile, "</th>");
  html += "</tr>\n";
  for (const auto& [run, summary] : runs) {
    const std::pair<const char*, const Distribution*> rows[] = {
        {"TTFT", &summary.ttft}, {"TPOT", &summary.tpot}, {"ITL", &summary.itl}, {"E2E", &summary.e2el}};
    for (const auto& [name, distribution] : rows) {
      absl::StrAppend(&html, "<tr><td>", EscapeHtml(run.label), "</td><td>", name,
                      absl::StrFormat("</td><td>%.2f</td>", distribution->mean));
      for (const double value : distribution->percentiles)
        absl::StrAppend(&html, absl::StrFormat("<td>%.2f</td>", value));
      html += "</tr>\n";
    }
  }
  return html + "</table></div>\n";
}

std::string Notes(const std::vector<ReportedRun>& runs) {
  std::string html;
  for (const auto& [run, summary] : runs) {
    for (const std::string& warning : Warnings(run, summary)) {
      absl::StrAppend(&html, "<p class=\"warning\">", EscapeHtml(run.label + ": " + warning), "</p>\n");
    }
    for (const auto& [code, count] : summary.errors) {
      absl::StrAppend(&html, "<p class=\"warning\">", EscapeHtml(absl::StrCat(run.label, ": ", count, " x ", code)),
                      "</p>\n");
    }
  }
  return html;
}

}  // namespace

std::string EscapeHtml(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out.push_back(c);
    }
  }
  return out;
}

std::string HtmlReport(const ReportContext& context, const std::vector<ReportedRun>& runs) {
  std::string html = kHead;
  absl::StrAppend(&html, "<h1>minitron-bench</h1>\n<p>", EscapeHtml(context.model), " at ", EscapeHtml(context.target),
                  ", protocol ", EscapeHtml(context.protocol), ", data set ", EscapeHtml(context.dataset), ", seed ",
                  context.seed, ", ", EscapeHtml(context.date), " UTC</p>\n");
  html += Notes(runs) + OverviewTable(context, runs);
  if (runs.size() > 1) {
    absl::StrAppend(
        &html, "<h2>Latency against throughput</h2>\n<div class=\"charts\">\n",
        Curve("Time to first token", runs, &Summary::ttft), Curve("Time per output token", runs, &Summary::tpot),
        Curve("Inter-token latency", runs, &Summary::itl), Curve("End to end", runs, &Summary::e2el), "</div>\n");
  }
  const Samples first = [](const CallRecord& record, std::vector<double>* out) {
    out->push_back(record.first_token_s);
  };
  const Samples gaps = [](const CallRecord& record, std::vector<double>* out) {
    out->insert(out->end(), record.gaps_s.begin(), record.gaps_s.end());
  };
  const Samples per_token = [](const CallRecord& record, std::vector<double>* out) {
    if (record.output_tokens > 1) out->push_back(record.TimePerToken());
  };
  const Samples total = [](const CallRecord& record, std::vector<double>* out) { out->push_back(record.total_s); };
  absl::StrAppend(&html, "<h2>Distributions</h2>\n<div class=\"charts\">\n",
                  CdfChart("Time to first token", runs, first), CdfChart("Inter-token latency", runs, gaps),
                  CdfChart("Time per output token", runs, per_token), CdfChart("End to end", runs, total), "</div>\n");
  absl::StrAppend(&html, "<h2>Load over time</h2>\n<div class=\"charts\">\n");
  for (size_t i = 0; i < std::min(runs.size(), kMaxCurves); ++i) html += Timeline(runs[i]);
  return html + "</div>\n<h2>Percentiles</h2>\n" + LatencyTable(runs) + "</body></html>\n";
}

}  // namespace minitron::bench
