// Runs and the command line, against the in-process server.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "clients/bench/bench_options.h"
#include "clients/bench/load_run.h"
#include "tests/clients/fake_server.h"

namespace minitron::bench {
namespace {

using ::testing::HasSubstr;

std::vector<Prompt> Texts(size_t count, const std::string& text) {
  Prompt prompt;
  prompt.text = text;
  prompt.output_tokens = 2;
  return std::vector<Prompt>(count, prompt);
}

class LoadTest : public testing::Test {
 protected:
  std::unique_ptr<Driver> Native(double timeout_s = 0) {
    DriverOptions options;
    options.target = server_.target();
    options.timeout_s = timeout_s;
    options.connections = 2;
    return MakeNativeDriver(options);
  }

  client::FakeServer server_;
};

TEST_F(LoadTest, EveryRequestIsRecordedOnce) {
  const auto driver = Native();
  LoadOptions options;
  options.max_concurrency = 4;
  Progress last;
  options.on_progress = [&](const Progress& progress) { last = progress; };
  const RunResult run = RunLoad(Texts(50, "hello"), options, driver.get());
  ASSERT_EQ(run.records.size(), 50u);
  for (const CallRecord& record : run.records) {
    EXPECT_TRUE(record.ok()) << record.error << record.message;
    EXPECT_EQ(record.output_tokens, 2u);
    EXPECT_EQ(record.prompt_tokens, 9u);
    EXPECT_EQ(record.gaps_s.size(), 1u);
    EXPECT_GE(record.total_s, record.first_token_s);
  }
  EXPECT_LE(run.peak_concurrency, 4u);
  EXPECT_EQ(last.ended, 50u);
  EXPECT_EQ(last.output_tokens, 100u);
}

TEST_F(LoadTest, ErrorsAreRecordedByStatus) {
  const auto driver = Native();
  LoadOptions options;
  options.max_concurrency = 2;
  std::vector<Prompt> prompts = Texts(2, "fail");
  prompts.push_back(Texts(1, "cut")[0]);
  const Summary summary = Summarize(RunLoad(prompts, options, driver.get()), {}, 1);
  EXPECT_EQ(summary.errors, (std::map<std::string, size_t>{{"INTERNAL", 1}, {"INVALID_ARGUMENT", 2}}));
}

TEST_F(LoadTest, TheTimeoutIsARequestsDeadline) {
  const auto driver = Native(0.05);
  LoadOptions options;
  options.max_concurrency = 1;
  const RunResult run = RunLoad(Texts(1, "forever"), options, driver.get());
  EXPECT_EQ(run.records[0].error, "DEADLINE_EXCEEDED");
}

TEST_F(LoadTest, RequestsAreNotSentBeforeTheirTime) {
  const auto driver = Native();
  LoadOptions options;
  options.offsets = {0, 0.02, 0.02, 0.05};
  RunResult run = RunLoad(Texts(4, "hello"), options, driver.get());
  std::sort(run.records.begin(), run.records.end(),
            [](const CallRecord& a, const CallRecord& b) { return a.start_s < b.start_s; });
  ASSERT_EQ(run.records.size(), 4u);
  for (size_t i = 0; i < 4; ++i) EXPECT_GE(run.records[i].start_s, options.offsets[i]);
}

TEST_F(LoadTest, AStoppedRunWaitsForWhatRuns) {
  const auto driver = Native(0.05);
  std::atomic<bool> stop{false};
  LoadOptions options;
  options.max_concurrency = 1;
  options.stop = &stop;
  // The first request ends by its deadline; meanwhile the run is stopped.
  options.on_progress = [&](const Progress&) { stop.store(true); };
  std::vector<Prompt> prompts = Texts(100000, "forever");
  const RunResult run = RunLoad(prompts, options, driver.get());
  EXPECT_TRUE(run.interrupted);
  EXPECT_LT(run.records.size(), prompts.size());
  EXPECT_GE(run.records.size(), 1u);
}

TEST(LoadWithoutServerTest, EachProtocolNamesTheFailure) {
  std::string target;
  { target = client::FakeServer().target(); }  // a port that was free a moment ago
  DriverOptions options;
  options.target = target;
  LoadOptions load;
  load.max_concurrency = 2;
  const auto error = [&](const std::unique_ptr<Driver>& driver) {
    return RunLoad(Texts(3, "hello"), load, driver.get()).records[2].error;
  };
  EXPECT_EQ(error(MakeNativeDriver(options)), "UNAVAILABLE");
  EXPECT_EQ(error(MakeOpenInferenceDriver(options)), "UNAVAILABLE");
  EXPECT_EQ(error(MakeOpenAiDriver(options)), "TRANSPORT");
}

TEST_F(LoadTest, AServerWithoutTheProtocolIsNamed) {
  DriverOptions options;
  options.target = server_.target();
  LoadOptions load;
  load.max_concurrency = 1;
  const auto driver = MakeOpenInferenceDriver(options);
  EXPECT_EQ(RunLoad(Texts(1, "hello"), load, driver.get()).records[0].error, "UNIMPLEMENTED");
}

std::string OptionError(std::vector<std::string> args) {
  client::Arguments arguments;
  auto error = client::Arguments::Parse(BenchSpec(), args, &arguments);
  BenchOptions options;
  if (!error) error = ReadBenchOptions(arguments, &options);
  return error ? error->message : "";
}

TEST(BenchOptionsTest, WrongCommandLinesAreNamed) {
  const std::string server = "--server=h:1";
  EXPECT_THAT(OptionError({"--concurrency=1"}), HasSubstr("--server HOST:PORT says what to put under load"));
  EXPECT_THAT(OptionError({server}), HasSubstr("exactly one of --concurrency, --request-rate and --replay"));
  EXPECT_THAT(OptionError({server, "--concurrency=1", "--request-rate=1"}), HasSubstr("exactly one of"));
  EXPECT_EQ(OptionError({server, "--concurrency=1.5"}), "--concurrency \"1.5\" is not a whole number in [1, 1000000]");
  EXPECT_EQ(OptionError({server, "--request-rate=1,-2"}), "--request-rate \"-2\" is not a number in [0.001, 1000000]");
  EXPECT_EQ(OptionError({server, "--concurrency=1", "--protocol=http"}),
            "--protocol \"http\" is none of native, oip, vllm, openai");
  EXPECT_EQ(OptionError({server, "--concurrency=1", "--protocol=oip"}), "--protocol oip needs --model");
  EXPECT_EQ(OptionError({server, "--concurrency=1", "--dataset=jsonl"}), "--dataset jsonl needs --dataset-path");
  EXPECT_THAT(OptionError({server, "--replay"}), HasSubstr("--replay goes with"));
  EXPECT_THAT(OptionError({server, "--concurrency=1", "--burstiness=2"}), HasSubstr("go with --request-rate"));
  EXPECT_THAT(OptionError({server, "--concurrency=1", "--num-prompts=0"}), HasSubstr("not a whole number in [1, "));
  EXPECT_THAT(OptionError({server, "--concurrency=1", "--range-ratio=1"}), HasSubstr("not a number in [0, 0.99]"));
  EXPECT_THAT(OptionError({server, "--concurrency=1", "--goodput=x"}), HasSubstr("is not ttft:MS"));
  EXPECT_THAT(OptionError({"--concurency=1"}), HasSubstr("did you mean --concurrency?"));
}

TEST(BenchOptionsTest, ListsMakeSweeps) {
  client::Arguments arguments;
  ASSERT_FALSE(client::Arguments::Parse(
      BenchSpec(), {"--server=h:1", "--request-rate=1,2.5", "--max-concurrency=9", "--burstiness=0.5"}, &arguments));
  BenchOptions options;
  ASSERT_FALSE(ReadBenchOptions(arguments, &options).has_value());
  ASSERT_EQ(options.plans.size(), 2u);
  EXPECT_EQ(options.plans[1].label, "2.5 requests/s");
  EXPECT_EQ(options.plans[1].rate, 2.5);
  EXPECT_EQ(options.plans[1].max_concurrency, 9u);
  EXPECT_EQ(options.arrivals.burstiness, 0.5);
}

}  // namespace
}  // namespace minitron::bench
