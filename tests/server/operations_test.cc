// What an operator relies on, in small: log lines, the audit log, memory, the self-test, reloads, readiness, vLLM
// names.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/text_serializer.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "engine/base/log.h"
#include "engine/checkpoint/json.h"
#include "server/audit_log.h"
#include "server/memory_usage.h"
#include "server/metrics.h"
#include "server/readiness.h"
#include "server/reloader.h"
#include "server/rpc_scope.h"
#include "server/self_test.h"
#include "server/vllm_metrics.h"
#include "tests/testing/fake_model_runner.h"

namespace minitron::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

std::string ReadAll(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

TEST(LogLineTest, TextEscapesWhatCouldForgeALine) {
  EXPECT_EQ(base::FormatLogLine(base::LogFormat::kText, base::LogLevel::kInfo, "T", "call", {{"a", "x\ny\x1b[2J"}}),
            "I T call a=x\\x0ay\\x1b[2J\n");
}

TEST(LogLineTest, JsonIsOneValidObjectWhateverTheFieldsHold) {
  const std::string evil = "\"}\n{\"level\":\"error\"\xff\xc0\x80\xed\xa0\x80 \xe2\x82\xac \x7f";
  const std::string line =
      base::FormatLogLine(base::LogFormat::kJson, base::LogLevel::kWarning, "T", evil, {{evil, evil}});
  EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1);
  engine::JsonValue value;
  std::string error;
  ASSERT_TRUE(engine::ParseJson(line.data(), static_cast<int64_t>(line.size()), {}, &value, &error)) << error << line;
  ASSERT_NE(value.Find("level"), nullptr);
  EXPECT_EQ(value.Find("level")->string, "warning");
  EXPECT_THAT(value.Find("event")->string, HasSubstr("\xe2\x82\xac"));
}

TEST(LogLineTest, ALongLineStaysJson) {
  const std::string line = base::FormatLogLine(base::LogFormat::kJson, base::LogLevel::kInfo, "T", "e",
                                               {{"a", std::string(5000, 'x')}, {"b", "c"}});
  EXPECT_LT(line.size(), 4200u);
  engine::JsonValue value;
  std::string error;
  EXPECT_TRUE(engine::ParseJson(line.data(), static_cast<int64_t>(line.size()), {}, &value, &error)) << error;
  EXPECT_NE(value.Find("cut"), nullptr);
}

TEST(AuditLogTest, LinesBeyondTheRateAreDroppedAndTold) {
  const std::string path = ::testing::TempDir() + "/audit.log";
  std::filesystem::remove(path);
  int drops = 0;
  {
    auto log = AuditLog::Open({path, /*max_lines_per_second=*/5, /*max_queued_lines=*/100});
    ASSERT_TRUE(log.ok());
    (*log)->SetOnDrop([&] { ++drops; });
    for (int i = 0; i < 1000; ++i) (*log)->Write("call", {{"method", "Generate"}});
  }
  const std::string text = ReadAll(path);
  const auto lines = std::count(text.begin(), text.end(), '\n');
  EXPECT_GE(drops, 900);
  EXPECT_GE(lines, 5);
  EXPECT_LE(lines, 100);
  EXPECT_THAT(text, HasSubstr("\"method\":\"Generate\""));
  std::filesystem::remove(path);
}

TEST(AuditLogTest, APathThatCannotBeWrittenIsRefused) {
  EXPECT_EQ(AuditLog::Open({"/nonexistent/audit"}).status().message(),
            "--audit-log=/nonexistent/audit: cannot be written");
}

class MemoryUsageTest : public ::testing::Test {
 protected:
  void SetUp() override { std::filesystem::create_directories(root_ + "/memory"); }
  void TearDown() override { std::filesystem::remove_all(root_); }
  void Write(const std::string& name, const std::string& text) { std::ofstream(root_ + "/" + name) << text; }
  const std::string root_ = ::testing::TempDir() + "/cgroup";
};

TEST_F(MemoryUsageTest, CountsWhatCannotBeReclaimedAgainstTheLimit) {
  Write("memory.max", "1000\n");
  Write("memory.stat", "anon 300\nfile 900\nshmem 200\nanon_thp 77\n");
  EXPECT_DOUBLE_EQ(ReadMemoryUsage(root_), 0.5);
}

TEST_F(MemoryUsageTest, NoLimitIsNoUsage) {
  Write("memory.max", "max\n");
  Write("memory.stat", "anon 300\n");
  EXPECT_EQ(ReadMemoryUsage(root_), 0);
  Write("memory/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(ReadMemoryUsage(root_), 0);
  EXPECT_EQ(ReadMemoryUsage(root_ + "/nowhere"), 0);
}

TEST_F(MemoryUsageTest, VersionOneIsReadToo) {
  Write("memory/memory.limit_in_bytes", "1000\n");
  Write("memory/memory.stat", "rss 1\ntotal_rss 600\ntotal_shmem 300\n");
  EXPECT_DOUBLE_EQ(ReadMemoryUsage(root_), 0.9);
}

TEST(SelfTestTest, AHealthyRunnerPassesAndABrokenOneDoesNot) {
  testing::FakeModelRunner healthy({});
  EXPECT_TRUE(RunSelfTest(healthy, scheduler::Clock::now).ok());
  testing::FakeModelRunner failing({.fail_at_step = 1});
  EXPECT_THAT(std::string(RunSelfTest(failing, scheduler::Clock::now).status().message()), HasSubstr("engine failed"));
  testing::FakeModelRunner nan({.nan_one_in = 1});
  EXPECT_THAT(std::string(RunSelfTest(nan, scheduler::Clock::now).status().message()), HasSubstr("not finite"));
  int calls = 0;
  testing::FakeModelRunner drifting({.choose_token = [&calls](engine::TokenId, int) { return 2 + calls++; }});
  EXPECT_THAT(std::string(RunSelfTest(drifting, scheduler::Clock::now).status().message()), HasSubstr("two answers"));
}

TEST(ReadinessTest, ReadyWhileNothingSpeaksAgainstIt) {
  std::vector<bool> changes;
  Readiness readiness([&](bool ready) { changes.push_back(ready); });
  readiness.Set(Readiness::Objection::kMemory, true);
  readiness.Set(Readiness::Objection::kStarting, false);
  EXPECT_THAT(changes, ElementsAre());
  readiness.Set(Readiness::Objection::kMemory, false);
  readiness.Set(Readiness::Objection::kDraining, true);
  readiness.Set(Readiness::Objection::kHung, true);
  readiness.Set(Readiness::Objection::kDraining, false);
  EXPECT_THAT(changes, ElementsAre(true, false));
}

class MetricsViewTest : public ::testing::Test {
 protected:
  std::string Text(const prometheus::Collectable& view) {
    return prometheus::TextSerializer().Serialize(view.Collect());
  }
  Metrics metrics_{MetricsOptions{"tiny", {}, 100, 16}};
  OperatorMetrics operator_metrics_{metrics_.registry(), metrics_.labels()};
};

TEST_F(MetricsViewTest, AReloadFailsWhenTwoLooksFindTheSameProblem) {
  absl::StatusOr<bool> result = absl::InvalidArgumentError("half written");
  int news = 0;
  Reloader reloader(
      "tls", [&] { return result; }, [&] { ++news; }, &operator_metrics_);
  const std::string failed = R"(reloads_total{model_name="tiny",result="failed",what="tls"} )";
  const std::string failing = R"(reload_failing{model_name="tiny",what="tls"} )";
  reloader.Look();
  EXPECT_THAT(Text(*metrics_.registry()), HasSubstr(failed + "0")) << "the second file may just be missing";
  reloader.Look();
  reloader.Look();
  EXPECT_THAT(Text(*metrics_.registry()), HasSubstr(failed + "1"));
  EXPECT_THAT(Text(*metrics_.registry()), HasSubstr(failing + "1"));
  result = true;
  reloader.Look();
  EXPECT_EQ(news, 1);
  EXPECT_THAT(Text(*metrics_.registry()), HasSubstr(failing + "0"));
}

TEST_F(MetricsViewTest, TenantsBeyondTheBoundShareALabel) {
  for (int i = 0; i < 1000; ++i) operator_metrics_.CountTenantRequest("tenant-" + std::to_string(i), 1);
  const std::string text = Text(*metrics_.registry());
  EXPECT_THAT(text, HasSubstr(R"(tenant_requests_total{model_name="tiny",tenant="tenant-63"} 1)"));
  EXPECT_THAT(text, HasSubstr(R"(tenant_requests_total{model_name="tiny",tenant="other"} 936)"));
  EXPECT_THAT(text, Not(HasSubstr("tenant-64")));
}

TEST_F(MetricsViewTest, VllmNamesShowTheSameValues) {
  metrics_.SetLoad(3, 7);
  const std::string text = Text(VllmMetrics(metrics_.registry()));
  EXPECT_THAT(text, HasSubstr(R"(vllm:num_requests_running{model_name="tiny",engine="0"} 3)"));
  EXPECT_THAT(text, HasSubstr(R"(vllm:num_requests_waiting{model_name="tiny",engine="0"} 7)"));
  EXPECT_THAT(text, HasSubstr("vllm:kv_cache_usage_perc"));
  EXPECT_THAT(text, HasSubstr("vllm:time_to_first_token_seconds_bucket"));
  EXPECT_THAT(text, HasSubstr(R"(block_size="16",num_gpu_blocks="100"} 1)"));
  EXPECT_THAT(text, Not(HasSubstr("cancelled")));
}

TEST(TraceparentTest, OnlyTheStandardsFormIsPassedOn) {
  EXPECT_TRUE(IsTraceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
  EXPECT_FALSE(IsTraceparent(""));
  EXPECT_FALSE(IsTraceparent("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"));
  EXPECT_FALSE(IsTraceparent("00-00000000000000000000000000000000-00f067aa0ba902b7-01"));
  EXPECT_FALSE(IsTraceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01"));
  EXPECT_FALSE(IsTraceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01x"));
  EXPECT_FALSE(IsTraceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-\n1"));
}

}  // namespace
}  // namespace minitron::server
