// What a decode step costs on the host: Schedule + BuildBatch + Update of 256 running sequences of 2k context, and the
// whole EngineCore::Step with overlap. Reports the median over the steps and the heap allocations per step.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <utility>
#include <vector>

#include "engine/base/check.h"
#include "scheduler/batch_builder.h"
#include "scheduler/engine_core.h"
#include "tests/testing/counting_new.h"
#include "tests/testing/instant_runner.h"

namespace minitron::scheduler {
namespace {

constexpr int kBlockSize = 16;

Request MakeRequest(int index, int context) {
  Request request;
  request.id = index + 1;
  // Different prompts, so that every sequence has blocks of its own.
  for (int i = 0; i < context; ++i) request.prompt_token_ids.push_back((index * 131 + i) % 256000);
  request.max_tokens = 2000;
  request.eos_token_ids = {1};
  request.stop_token_ids = {2, 3};
  return request;
}

class DiscardingSink : public StepSink {
 public:
  void OnStep(StepOutput output) override { recycled_ = std::move(output); }
  StepOutput Recycled() override { return std::move(recycled_); }

 private:
  StepOutput recycled_;
};

double Seconds(std::chrono::steady_clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

void Report(benchmark::State& state, std::vector<double>& seconds, int64_t num_allocations) {
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  state.counters["median_us"] = seconds[seconds.size() / 2] * 1e6;
  state.counters["allocations_per_step"] =
      static_cast<double>(num_allocations) / static_cast<double>(state.iterations());
}

void BM_ScheduleBuildUpdate(benchmark::State& state) {
  const int num_sequences = static_cast<int>(state.range(0));
  const int context = static_cast<int>(state.range(1));
  Scheduler scheduler({.max_prefill_chunk = context}, {.num_kv_blocks = num_sequences * 4096 / kBlockSize,
                                                       .block_size = kBlockSize,
                                                       .max_num_tokens = 1 << 20,
                                                       .max_num_sequences = num_sequences,
                                                       .max_context_tokens = 8192,
                                                       .vocab_size = 256000});
  SchedulerOutput plan;
  engine::Batch batch;
  engine::StepResult result;
  StepOutput output;
  const TimePoint now = TimePoint(std::chrono::seconds(1));
  const auto step = [&] {
    plan = scheduler.Schedule(now, std::move(plan));
    batch = BuildBatch(plan, std::move(batch));
    result.rows.resize(plan.num_result_rows);
    for (engine::ResultRowOutput& row : result.rows) row.token_id = 7;
    output = scheduler.Update(plan, result, now, std::move(output));
  };
  for (int i = 0; i < num_sequences; ++i) scheduler.Add(MakeRequest(i, context), now);
  for (int i = 0; i < 40; ++i) step();
  CHECK(batch.num_tokens() == num_sequences);
  std::vector<double> seconds;
  seconds.reserve(1 << 20);
  const int64_t before = minitron::testing::NumAllocations();
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    step();
    seconds.push_back(Seconds(std::chrono::steady_clock::now() - start));
  }
  Report(state, seconds, minitron::testing::NumAllocations() - before);
}

void BM_EngineStep(benchmark::State& state) {
  const int num_sequences = static_cast<int>(state.range(0));
  const int context = static_cast<int>(state.range(1));
  minitron::testing::InstantRunner runner(num_sequences * 4096 / kBlockSize, kBlockSize, 1 << 20, num_sequences, true);
  DiscardingSink sink;
  EngineCoreOptions options;
  options.scheduler.max_prefill_chunk = context;
  options.queue.max_sequences = num_sequences;
  options.queue.max_prompt_tokens = int64_t{num_sequences} * context;
  EngineCore core(options, &runner, &sink, [] { return Clock::now(); });
  for (int i = 0; i < num_sequences; ++i) CHECK(core.Submit(MakeRequest(i, context)).ok());
  for (int i = 0; i < 40; ++i) core.Step();
  CHECK(static_cast<int>(core.scheduler().running().size()) == num_sequences);
  std::vector<double> seconds;
  seconds.reserve(1 << 20);
  const int64_t before = minitron::testing::NumAllocations();
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    core.Step();
    seconds.push_back(Seconds(std::chrono::steady_clock::now() - start));
  }
  Report(state, seconds, minitron::testing::NumAllocations() - before);
}

// 1500 steps: within max_tokens, and long enough for every sequence to fill some 90 blocks.
BENCHMARK(BM_ScheduleBuildUpdate)->Args({64, 2048})->Args({256, 2048})->Iterations(1500)->Repetitions(5);
BENCHMARK(BM_EngineStep)->Args({64, 2048})->Args({256, 2048})->Iterations(1500)->Repetitions(5);

// Prints the medians of the repetitions as the rows of a table.
class TableReporter : public benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context&) override {
    std::printf("| step/sequences/context | median, us | heap allocations |\n|---|---|---|\n");
    return true;
  }
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs) {
      if (run.run_type != Run::RT_Aggregate || run.aggregate_name != "median") continue;
      std::printf("| %s/%s | %.1f | %g |\n", run.run_name.function_name.c_str() + 3, run.run_name.args.c_str(),
                  run.counters.at("median_us").value, run.counters.at("allocations_per_step").value);
    }
  }
};

}  // namespace
}  // namespace minitron::scheduler

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  minitron::scheduler::TableReporter reporter;
  benchmark::RunSpecifiedBenchmarks(&reporter);
  return 0;
}
