#include "server/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/text_serializer.h>

#include <cstdio>
#include <fstream>

namespace minitron::server {
namespace {

using ::testing::HasSubstr;

MetricsOptions Options() {
  engine::ModelInfo info;
  info.architecture = "nemotron";
  info.backend = "cpu";
  info.weight_type = "bf16";
  info.max_context_tokens = 1024;
  return {"tiny", info, 64, 16};
}

std::string Text(const Metrics& metrics) {
  std::vector<prometheus::MetricFamily> families = metrics.registry()->Collect();
  for (auto& family : metrics.process()->Collect()) families.push_back(family);
  return prometheus::TextSerializer().Serialize(families);
}

TEST(MetricsTest, SeriesExistAtZeroFromTheStart) {
  const Metrics metrics(Options());
  const std::string text = Text(metrics);
  for (const char* series :
       {"minitron_requests_running{model_name=\"tiny\"} 0", "minitron_generation_tokens_total{model_name=\"tiny\"} 0",
        "minitron_time_to_first_token_seconds_count{model_name=\"tiny\"} 0",
        "minitron_kv_cache_blocks{model_name=\"tiny\"} 64", "process_resident_memory_bytes"}) {
    EXPECT_THAT(text, HasSubstr(series));
  }
}

TEST(MetricsTest, StepIsObservedOnce) {
  Metrics metrics(Options());
  scheduler::StepStats stats;
  stats.num_running = 3;
  stats.num_blocks = 64;
  stats.num_blocks_used = 16;
  stats.num_batch_tokens = stats.num_batch_sequences = 3;
  StepObservations observations;
  observations.inter_token_latency = {0.001, 0.0011, 99};
  observations.num_generated_tokens = 3;
  metrics.RecordStep(stats, observations);
  const std::string text = Text(metrics);
  EXPECT_THAT(text, HasSubstr("minitron_kv_cache_usage_ratio{model_name=\"tiny\"} 0.25"));
  EXPECT_THAT(text, HasSubstr("minitron_inter_token_latency_seconds_bucket{model_name=\"tiny\",le=\"0.001\"} 1"));
  EXPECT_THAT(text, HasSubstr("minitron_inter_token_latency_seconds_bucket{model_name=\"tiny\",le=\"0.002\"} 2"));
  EXPECT_THAT(text, HasSubstr("minitron_inter_token_latency_seconds_bucket{model_name=\"tiny\",le=\"+Inf\"} 3"));
  EXPECT_THAT(text, HasSubstr("minitron_engine_steps_total{model_name=\"tiny\",phase=\"decode\"} 1"));
}

TEST(MetricsTest, PromtoolFindsNothingToSay) {
  const Metrics metrics(Options());
  const std::string path = ::testing::TempDir() + "/minitron_metrics.txt";
  std::ofstream(path) << Text(metrics);
  std::FILE* pipe = popen(("promtool check metrics < " + path + " 2>&1").c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  std::string said;
  char buffer[512];
  while (std::fgets(buffer, sizeof(buffer), pipe) != nullptr) said += buffer;
  EXPECT_EQ(pclose(pipe), 0) << said;
  EXPECT_EQ(said, "");
}

TEST(MetricsTest, ServerPicksAPortAndRefusesATakenOne) {
  auto first = MetricsServer::Start("127.0.0.1", 0);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_GT((*first)->port(), 0);
  const auto second = MetricsServer::Start("127.0.0.1", (*first)->port());
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace minitron::server
