// Figures and how they are written down.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "clients/bench/chart.h"
#include "clients/bench/html_report.h"
#include "clients/bench/json_report.h"

namespace minitron::bench {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

CallRecord Record(double ttft_s, std::vector<double> gaps_s) {
  CallRecord record;
  record.first_token_s = ttft_s;
  record.total_s = ttft_s;
  for (const double gap : gaps_s) record.total_s += gap;
  record.output_tokens = static_cast<uint32_t>(gaps_s.size()) + 1;
  record.gaps_s = std::move(gaps_s);
  record.prompt_tokens = 10;
  return record;
}

CallRecord Failed(const std::string& code, const std::string& message) {
  CallRecord record;
  record.error = code;
  record.message = message;
  return record;
}

RunResult TwoGoodOneBad() {
  RunResult run;
  run.label = "concurrency <2>";
  run.max_concurrency = 2;
  run.duration_s = 2;
  run.client_cpu_s = 0.2;
  run.peak_concurrency = 2;
  run.records = {Record(0.1, {0.02, 0.04}), Record(0.3, {0.06}), Failed("UNAVAILABLE", "full \x1b[31m")};
  return run;
}

TEST(SummaryTest, PercentilesAreLinearBetweenNeighbours) {
  const std::vector<double> values = {1, 2, 3, 4, 10};
  EXPECT_DOUBLE_EQ(Percentile(values, 0), 1);
  EXPECT_DOUBLE_EQ(Percentile(values, 50), 3);
  EXPECT_DOUBLE_EQ(Percentile(values, 90), 7.6);  // numpy.percentile([1, 2, 3, 4, 10], 90)
  EXPECT_DOUBLE_EQ(Percentile(values, 99), 9.76);
  EXPECT_DOUBLE_EQ(Percentile(values, 100), 10);
  EXPECT_DOUBLE_EQ(Percentile({7}, 99), 7);
  EXPECT_DOUBLE_EQ(Percentile({}, 50), 0);
}

TEST(SummaryTest, DistributionsAreInMilliseconds) {
  const Distribution distribution = Describe({0.004, 0.001, 0.003, 0.002, 0.010});
  EXPECT_DOUBLE_EQ(distribution.mean, 4);
  EXPECT_DOUBLE_EQ(distribution.median, 3);
  EXPECT_NEAR(distribution.deviation, 3.1622776601683795, 1e-9);  // numpy.std
  EXPECT_NEAR(distribution.percentiles[2], 7.6, 1e-9);
}

TEST(SummaryTest, FailedRequestsAreInNoLatency) {
  const Summary summary = Summarize(TwoGoodOneBad(), {}, 4);
  EXPECT_EQ(summary.completed, 2u);
  EXPECT_EQ(summary.failed, 1u);
  EXPECT_EQ(summary.errors.at("UNAVAILABLE"), 1u);
  EXPECT_EQ(summary.output_tokens, 5u);
  EXPECT_DOUBLE_EQ(summary.request_throughput, 1);
  EXPECT_DOUBLE_EQ(summary.output_throughput, 2.5);
  EXPECT_DOUBLE_EQ(summary.total_throughput, 12.5);
  EXPECT_DOUBLE_EQ(summary.ttft.mean, 200);
  EXPECT_NEAR(summary.tpot.mean, (30 + 60) / 2.0, 1e-9);
  EXPECT_NEAR(summary.itl.mean, 40, 1e-9);
  EXPECT_DOUBLE_EQ(summary.peak_output_per_s, 5);
  EXPECT_DOUBLE_EQ(summary.client_cpu_share, 0.025);
}

TEST(SummaryTest, GoodputCountsRequestsWithinEveryTarget) {
  const auto goodput = [](const std::string& text) {
    Targets targets;
    EXPECT_TRUE(ParseTargets(text, &targets)) << text;
    return Summarize(TwoGoodOneBad(), targets, 4).goodput;
  };
  EXPECT_DOUBLE_EQ(goodput("ttft:1000"), 1);
  EXPECT_DOUBLE_EQ(goodput("ttft:200"), 0.5);
  EXPECT_DOUBLE_EQ(goodput("tpot:50,e2el:500"), 0.5);
  EXPECT_DOUBLE_EQ(goodput("ttft:200,tpot:10"), 0);
}

TEST(SummaryTest, TargetsThatAreNoneAreRefused) {
  for (const char* text : {"", "ttft", "ttft:", "ttft:-1", "ttft:0", "ttft:inf", "ttft:nan", "itl:5", "ttft:5,"}) {
    Targets targets;
    EXPECT_FALSE(ParseTargets(text, &targets)) << text;
  }
}

TEST(SummaryTest, WarningsNameWhatMakesFiguresDoubtful) {
  RunResult run = TwoGoodOneBad();
  EXPECT_THAT(Warnings(run, Summarize(run, {}, 4)), ElementsAre(HasSubstr("1 of 3 requests failed")));
  run.records.pop_back();
  EXPECT_THAT(Warnings(run, Summarize(run, {}, 4)), ElementsAre());
  run.client_cpu_s = 3;
  run.late_s = 0.5;
  run.interrupted = true;
  EXPECT_THAT(Warnings(run, Summarize(run, {}, 4)),
              ElementsAre(HasSubstr("interrupted"), HasSubstr("38 %"), HasSubstr("0.50 s after its time")));
}

TEST(TokenClockTest, ASuccessWithoutTokensIsAnError) {
  TokenClock clock;
  clock.Start();
  EXPECT_EQ(clock.Finish("", "").error, "EMPTY");
  TokenClock other;
  other.Start();
  other.OnTokens(2);
  other.OnTokens(1);
  const CallRecord record = other.Finish("", "");
  EXPECT_TRUE(record.ok());
  EXPECT_EQ(record.output_tokens, 3u);
  EXPECT_EQ(record.gaps_s.size(), 1u);
}

const ReportContext kContext = {"20260101-000000", "native", "127.0.0.1:1",    "tiny",
                                "random",          3,        {.ttft_ms = 200}, false};

TEST(JsonReportTest, KeysAreThoseOfVllmsBenchmark) {
  const RunResult run = TwoGoodOneBad();
  const std::string line = JsonLine(kContext, run, Summarize(run, kContext.targets, 4));
  EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1);
  const auto json = nlohmann::json::parse(line);
  for (const char* key : {"date",
                          "endpoint_type",
                          "backend",
                          "label",
                          "model_id",
                          "tokenizer_id",
                          "num_prompts",
                          "request_rate",
                          "burstiness",
                          "max_concurrency",
                          "duration",
                          "completed",
                          "failed",
                          "total_input_tokens",
                          "total_output_tokens",
                          "request_throughput",
                          "request_goodput",
                          "output_throughput",
                          "total_token_throughput",
                          "max_output_tokens_per_s",
                          "max_concurrent_requests"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
  for (const char* metric : {"ttft", "tpot", "itl", "e2el"}) {
    for (const char* statistic : {"mean", "median", "std", "p50", "p75", "p90", "p95", "p99"}) {
      const std::string key = std::string(statistic) + "_" + metric + "_ms";
      EXPECT_TRUE(json.contains(key) && json[key].is_number()) << key;
    }
  }
  EXPECT_EQ(json["completed"], 2);
  EXPECT_EQ(json["mean_ttft_ms"], 200.0);
  EXPECT_EQ(json["request_rate"], "inf");
  EXPECT_EQ(json["request_goodput"], 0.5);
  EXPECT_EQ(json["errors_by_code"]["UNAVAILABLE"], 1);
  EXPECT_FALSE(json.contains("ttfts"));
}

TEST(JsonReportTest, DetailsHaveOneEntryPerRequest) {
  ReportContext context = kContext;
  context.detailed = true;
  const RunResult run = TwoGoodOneBad();
  const auto json = nlohmann::json::parse(JsonLine(context, run, Summarize(run, {}, 4)));
  for (const char* key : {"input_lens", "output_lens", "ttfts", "itls", "start_times", "latencies", "errors"}) {
    EXPECT_EQ(json[key].size(), 3u) << key;
  }
  EXPECT_EQ(json["itls"][0], (std::vector<double>{0.02, 0.04}));
  EXPECT_FALSE(json.contains("generated_texts"));
}

TEST(TextReportTest, ShowsAnExampleOfEveryError) {
  const RunResult run = TwoGoodOneBad();
  const std::string text = TextReport(kContext, run, Summarize(run, kContext.targets, 4));
  EXPECT_THAT(text, HasSubstr("2 completed, 1 failed in 2.00 s"));
  EXPECT_THAT(text, HasSubstr("TTFT       200.00     200.00"));
  EXPECT_THAT(text, HasSubstr("1 x UNAVAILABLE: full \\x1b[31m"));
  EXPECT_THAT(text, HasSubstr("goodput 0.50 requests/s"));
}

TEST(ChartTest, TicksAreRoundAndCoverTheData) {
  EXPECT_THAT(Ticks(10, 5), ElementsAre(0, 2, 4, 6, 8, 10));
  EXPECT_EQ(Ticks(0.3, 3).size(), 4u);
  EXPECT_GE(Ticks(1234, 5).back(), 1234);
  EXPECT_THAT(Ticks(0, 5).back(), 1);
  EXPECT_THAT(Ticks(INFINITY, 5).back(), 1);
}

TEST(ChartTest, AChartWithoutPointsSaysSo) {
  EXPECT_THAT(ToSvg({"t", "x", "y", true, false, 0, {{"a", {{0, 1}}}}}), HasSubstr("no data"));
  EXPECT_THAT(ToSvg({"t", "x", "y", true, false, 0, {{"a", {{5, 1}}}}}), Not(HasSubstr("nan")));
}

TEST(HtmlReportTest, LoadsNothingAndEscapesNames) {
  ReportContext context = kContext;
  context.model = "<script>alert(1)</script>";
  RunResult run = TwoGoodOneBad();
  const Summary summary = Summarize(run, {}, 4);
  const std::string html = HtmlReport(context, {{run, summary}, {run, summary}});
  EXPECT_THAT(html, HasSubstr("&lt;script&gt;"));
  EXPECT_THAT(html, HasSubstr("concurrency &lt;2&gt;"));
  for (const char* word : {"<script", "http:", "https:", "src=", "href=", "url(", "@import", "nan", "<2>"}) {
    EXPECT_THAT(html, Not(HasSubstr(word))) << word;
  }
  EXPECT_THAT(html, HasSubstr("Latency against throughput"));
  EXPECT_THAT(HtmlReport(context, {{run, summary}}), Not(HasSubstr("Latency against throughput")));
}

TEST(HtmlReportTest, NoRunsMakeAPageToo) { EXPECT_THAT(HtmlReport(kContext, {}), HasSubstr("</html>")); }

}  // namespace
}  // namespace minitron::bench
