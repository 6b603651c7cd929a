#include "tests/gpu/runner_bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model_runner.h"
#include "tests/gpu/step_gaps.h"
#if !defined(MINITRON_GPU_BENCH_WITHOUT_KERNELS)
#include "tests/gpu/random_runner.h"
#endif

namespace minitron::gpu {
namespace {

using engine::Backend;
using engine::Batch;
using engine::KvCacheType;
using engine::ModelRunner;
using engine::Quantization;
using engine::SamplingParams;
using engine::TokenId;

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

constexpr int kBlockSize = 32;
constexpr int kMaxTokens = 2048;
constexpr int kScoreBlocks = 4;  // of a line that is scored

struct RunnerOptions {
  std::string model, backend, weights = "none", kv = "bf16", launch = "plain", points = "full";
  int max_sequences = 256;
  int max_context = 0;
};

struct Made {
  std::unique_ptr<ModelRunner> runner;
  std::shared_ptr<StepGaps> gaps;  // null: not to be had
};

absl::StatusOr<Made> MakeFrom(const std::string& model, const engine::EngineOptions& options,
                              [[maybe_unused]] bool batch_invariant) {
  constexpr const char* kRandom = "random:";
  if (model.starts_with(kRandom)) {
#if defined(MINITRON_GPU_BENCH_WITHOUT_KERNELS)
    return absl::UnimplementedError(model + ": made on a device, and this is built without");
#else
    if (options.quantization != Quantization::kOff) return absl::InvalidArgumentError(model + " is bf16");
    auto random = MakeRandomRunner(model.substr(std::string(kRandom).size()), options, batch_invariant);
    if (!random.ok()) return random.status();
    return Made{std::move(random->runner), std::move(random->gaps)};
#endif
  }
  if (!batch_invariant) return absl::InvalidArgumentError("only a model made on the device can do without invariance");
#if defined(MINITRON_GPU_BENCH_WITHOUT_ENGINE)
  return absl::UnimplementedError(model + ": this is built without the engine that reads it");
#else
  auto runner = engine::CreateModelRunner(options);
  if (!runner.ok()) return runner.status();
  return Made{*std::move(runner), nullptr};
#endif
}

// Null when that failed, which is told.
Made MakeRunner(const RunnerOptions& options) {
  engine::EngineOptions engine_options;
  engine_options.model_dir = options.model;
  engine_options.backend = options.backend == "cpu" ? Backend::kCpu : Backend::kCuda;
  engine_options.quantization = options.weights == "int8"          ? Quantization::kInt8
                                : options.weights == "int4"        ? Quantization::kInt4
                                : options.weights == "fp8"         ? Quantization::kFp8
                                : options.weights == "fp8-dynamic" ? Quantization::kFp8Dynamic
                                                                   : Quantization::kOff;
  engine_options.early_launch = options.launch == "early";
  engine_options.kv_cache_type = options.kv == "fp8" ? KvCacheType::kFp8 : KvCacheType::kBf16;
  engine_options.block_size = kBlockSize;
  engine_options.max_num_sequences = options.max_sequences;
  engine_options.max_context_tokens = options.max_context;
  engine_options.max_num_tokens = options.points == "small" ? 64 : kMaxTokens;
  // So that a run finds the products' choices of the one before.
  if (const char* folder = std::getenv("MINITRON_GPU_CACHE_DIR"); folder != nullptr) engine_options.cache_dir = folder;
  auto made = MakeFrom(options.model, engine_options, options.launch != "free");
  if (made.ok()) return *std::move(made);
  std::fprintf(stderr, "minitron-gpu-bench: %s\n", made.status().ToString().c_str());
  return {};
}

// Adds rows [first, first + count) of a sequence whose blocks are its own.
void AddRows(Batch& batch, int sequence, int blocks_per_sequence, int first, int count, TokenId token) {
  const int first_block = sequence * blocks_per_sequence;
  for (int position = first; position < first + count; ++position) {
    batch.token_ids.push_back(token < 0 ? token : (token + 31 * position) % 1000);
    batch.positions.push_back(position);
    batch.slot_mapping.push_back(int64_t{first_block + position / kBlockSize} * kBlockSize + position % kBlockSize);
  }
  batch.query_start.push_back(batch.num_tokens());
  for (int block = 0; block * kBlockSize < first + count; ++block) batch.block_ids.push_back(first_block + block);
  batch.block_start.push_back(static_cast<int>(batch.block_ids.size()));
  batch.kv_lens.push_back(first + count);
}

bool Run(ModelRunner& runner, const Batch& batch) { return runner.Submit(batch).ok() && runner.Collect().ok(); }

// Seconds to compute the contexts of sequences [first, last), with a token for each; negative when the runner failed.
double Fill(ModelRunner& runner, int first, int last, int context, int blocks_per_sequence) {
  const SamplingParams params{.temperature = 0.0f};
  const double begin = Now();
  for (int sequence = first; sequence < last; ++sequence) {
    for (int position = 0; position < context; position += runner.max_num_tokens()) {
      Batch batch;
      AddRows(batch, sequence, blocks_per_sequence, position, std::min(runner.max_num_tokens(), context - position),
              sequence);
      // A step is waited for by its results: one without would be collected while it runs.
      batch.results.push_back({.token_row = batch.num_tokens() - 1, .sequence = 0, .params = &params});
      if (!Run(runner, batch)) return -1.0;
    }
  }
  return Now() - begin;
}

// Decode steps of `size` sequences at a context, submitted ahead as the scheduler does. Seconds of each; empty when the
// runner failed.
std::vector<double> RunSteps(ModelRunner& runner, int size, int context, int blocks_per_sequence, int num_steps) {
  const SamplingParams params{.temperature = 0.0f};
  Batch steps[2];
  for (int turn = 0; turn < 2; ++turn) {
    for (int s = 0; s < size; ++s) {
      AddRows(steps[turn], s, blocks_per_sequence, context - 1, 1, engine::TokenFromPreviousResult(s));
      steps[turn].results.push_back({.token_row = s, .sequence = s, .output_position = turn, .params = &params});
    }
  }
  Batch first = steps[0];
  for (TokenId& token : first.token_ids) token = 5;
  if (!runner.Submit(first).ok()) return {};
  std::vector<double> times;
  for (int step = 0; step < num_steps; ++step) {
    const double begin = Now();
    if (!runner.Submit(steps[step % 2]).ok() || !runner.Collect().ok()) return {};
    times.push_back(Now() - begin);
  }
  if (!runner.Collect().ok()) return {};
  return times;
}

double Percentile(std::vector<double>& values, double share) {
  if (values.empty()) return 0.0;
  const auto at = values.begin() + static_cast<int64_t>(share * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

// Where decode steps are measured. Contexts ascend; a batch of `most_tokens` tokens in all is the largest.
struct Points {
  std::vector<int> contexts, sizes, gap_sizes;
  int64_t most_tokens;
  int num_steps, num_gap_steps;
  int prefill_size;  // when the cache is filled up to this many, the time is the prompts'
};
Points PointsOf(const std::string& name) {
  if (name == "small") return {{32, 64}, {1, 4}, {4}, 1 << 20, 3, 5, 4};
  if (name == "brief") return {{512}, {1, 8, 64}, {}, 160 << 10, 30, 0, 8};
  return {{512, 2048}, {1, 4, 8, 16, 32, 64, 128, 256}, {1, 64, 256}, 160 << 10, 30, 300, 8};
}

class StepBench {
 public:
  StepBench(const RunnerOptions& options, Made made)
      : options_(options), points_(PointsOf(options.points)), made_(std::move(made)) {}

  // What of the contexts lies in the cache is kept from one size to the next. False: the runner failed.
  bool Run() {
    ModelRunner& runner = *made_.runner;
    for (const int context : points_.contexts) {
      const int blocks = (context + kBlockSize - 1) / kBlockSize;
      int filled = 0;
      for (const int size : points_.sizes) {
        if (size > options_.max_sequences || int64_t{size} * blocks > runner.num_kv_blocks()) break;
        if (int64_t{size} * context > points_.most_tokens) break;
        const double fill_s = Fill(runner, filled, size, context, blocks);
        if (fill_s < 0.0) return false;
        if (size == points_.prefill_size) Print("prefill", PrefillText(context, size - filled, fill_s));
        filled = size;
        std::vector<double> times = RunSteps(runner, size, context, blocks, points_.num_steps);
        if (times.empty()) return false;
        Print("step", PointText(size, context) + Number(", \"ms\": %.4f", Percentile(times, 0.5) * 1e3));
        const bool wanted = context == points_.contexts.front() &&
                            std::count(points_.gap_sizes.begin(), points_.gap_sizes.end(), size) > 0;
        if (made_.gaps != nullptr && wanted && !Gaps(size, context, blocks)) return false;
      }
    }
    return true;
  }

  void Print(const char* kind, const std::string& rest) const {
    std::printf("{\"kind\": \"%s\", \"weights\": \"%s\", \"kv\": \"%s\", \"launch\": \"%s\", %s}\n", kind,
                options_.weights == "none" ? "bf16" : options_.weights.c_str(), options_.kv.c_str(),
                options_.launch.c_str(), rest.c_str());
    std::fflush(stdout);
  }
  static std::string Number(const char* format, double value) {
    char text[64];
    std::snprintf(text, sizeof(text), format, value);
    return text;
  }

 private:
  static std::string PointText(int size, int context) {
    return "\"batch\": " + std::to_string(size) + ", \"context\": " + std::to_string(context);
  }
  static std::string PrefillText(int context, int prompts, double seconds) {
    return "\"prompt\": " + std::to_string(context) + Number(", \"tokens_per_s\": %.1f", prompts * context / seconds);
  }

  // A run of its own: the marks are work for the device as well.
  bool Gaps(int size, int context, int blocks) {
    if (!made_.gaps->Watch(points_.num_gap_steps).ok()) return false;
    if (RunSteps(*made_.runner, size, context, blocks, points_.num_gap_steps).empty()) return false;
    const auto gaps = made_.gaps->Gaps();
    if (!gaps.ok()) return false;
    std::vector<double> idle, wait, forward, sampling;
    for (const StepGap& gap : *gaps) {
      idle.push_back(gap.idle_us());
      wait.push_back(gap.wait_us);
      forward.push_back(gap.forward_us);
      sampling.push_back(gap.sampling_us);
    }
    Print("gap", PointText(size, context) + ", \"steps\": " + std::to_string(idle.size()) +
                     Number(", \"idle_p50_us\": %.2f", Percentile(idle, 0.5)) +
                     Number(", \"idle_p99_us\": %.2f", Percentile(idle, 0.99)) +
                     Number(", \"wait_p99_us\": %.2f", Percentile(wait, 0.99)) +
                     Number(", \"forward_us\": %.2f", Percentile(forward, 0.5)) +
                     Number(", \"sampling_us\": %.2f", Percentile(sampling, 0.5)));
    return true;
  }

  const RunnerOptions options_;
  const Points points_;
  const Made made_;
};

int Steps(const RunnerOptions& given) {
  RunnerOptions options = given;
  options.max_context = PointsOf(options.points).contexts.back() + kBlockSize;
  options.max_sequences = options.points == "small" ? 4 : options.points == "brief" ? 64 : 256;
  const double begin = Now();
  Made made = MakeRunner(options);
  if (made.runner == nullptr) return 1;
  const std::string loaded = StepBench::Number("\"seconds\": %.3f", Now() - begin) +
                             ", \"blocks\": " + std::to_string(made.runner->num_kv_blocks()) +
                             ", \"weight_bytes\": " + std::to_string(made.runner->model_info().weight_bytes);
  StepBench bench(options, std::move(made));
  bench.Print("load_model", loaded);
  return bench.Run() ? 0 : 1;
}

// A row of one sequence whose logprobs are asked for.
void AddScored(Batch& batch, const std::vector<TokenId>& tokens, int sequence, int first, int count) {
  const int first_row = batch.num_tokens();
  AddRows(batch, sequence, kScoreBlocks, first, count, 0);
  for (int i = 0; i < count; ++i) {
    batch.token_ids[first_row + i] = tokens[first + i];
    batch.results.push_back(
        {.token_row = first_row + i, .sequence = sequence, .target = tokens[first + i + 1], .num_top_logprobs = 1});
  }
}

using Rows = std::vector<engine::ResultRowOutput>;

// Appends a batch's results to those of the sequences in it, `counts[s]` each. False: the runner failed.
bool RunScored(ModelRunner& runner, const Batch& batch, const std::vector<std::pair<int, int>>& counts,
               std::vector<Rows>& scores) {
  if (!runner.Submit(batch).ok()) return false;
  const auto result = runner.Collect();
  if (!result.ok()) return false;
  auto row = result->rows.begin();
  for (const auto& [sequence, count] : counts) {
    scores[sequence].insert(scores[sequence].end(), row, row + count);
    row += count;
  }
  return true;
}

// The logprobs of every line: each line as a prompt of its own (alone), all prompts in one batch (together), or a token
// of each at a time, as decode steps are (steps). The bits are the same, or the runner breaks its contract.
bool ScoreLines(ModelRunner& runner, const std::vector<std::vector<TokenId>>& lines, const std::string& how,
                std::vector<Rows>& scores) {
  const int num_lines = static_cast<int>(lines.size());
  scores.assign(lines.size(), {});
  const auto length = [&](int line) { return static_cast<int>(lines[line].size()) - 1; };
  if (how == "steps") {
    for (int t = 0;; ++t) {
      Batch batch;
      std::vector<std::pair<int, int>> counts;
      for (int s = 0; s < num_lines; ++s) {
        if (t >= length(s)) continue;
        AddScored(batch, lines[s], s, t, 1);
        batch.results.back().sequence = static_cast<int>(counts.size());
        counts.emplace_back(s, 1);
      }
      if (counts.empty()) return true;
      if (!RunScored(runner, batch, counts, scores)) return false;
    }
  }
  Batch batch;
  std::vector<std::pair<int, int>> counts;
  for (int s = 0; s < num_lines; ++s) {
    AddScored(batch, lines[s], how == "alone" ? 0 : s, 0, length(s));
    counts.emplace_back(s, length(s));
    if (how != "alone" && s + 1 < num_lines) continue;
    if (!RunScored(runner, batch, counts, scores)) return false;
    batch = Batch();
    counts.clear();
  }
  return true;
}

int Score(const RunnerOptions& given, const std::string& file_name, const std::string& ways) {
  std::vector<std::vector<TokenId>> lines;
  std::ifstream file(file_name);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    lines.emplace_back();
    for (TokenId token; words >> token;) lines.back().push_back(token);
  }
  RunnerOptions options = given;
  options.max_sequences = std::max(1, static_cast<int>(lines.size()));
  options.max_context = kScoreBlocks * kBlockSize;
  const Made made = MakeRunner(options);
  if (made.runner == nullptr) return 1;
  std::istringstream words(ways);
  for (std::string how; std::getline(words, how, ',');) {
    std::vector<Rows> scores;
    if (!ScoreLines(*made.runner, lines, how, scores)) return 1;
    for (const Rows& rows : scores) {
      std::printf("{\"kind\": \"score\", \"how\": \"%s\", \"logprobs\": [", how.c_str());
      for (size_t r = 0; r < rows.size(); ++r) std::printf("%s%.9g", r == 0 ? "" : ", ", rows[r].chosen.logprob);
      std::printf("], \"top\": [");
      for (size_t r = 0; r < rows.size(); ++r) std::printf("%s%d", r == 0 ? "" : ", ", rows[r].top[0].token_id);
      std::printf("]}\n");
    }
  }
  return 0;
}

}  // namespace

int RunnerSteps(const std::vector<std::string>& arguments) {
  return Steps({.model = arguments[0],
                .backend = arguments[1],
                .weights = arguments[2],
                .kv = arguments[3],
                .launch = arguments[4],
                .points = arguments[5]});
}

int RunnerScore(const std::vector<std::string>& arguments) {
  return Score({.model = arguments[0], .backend = arguments[1]}, arguments[2], arguments[3]);
}

}  // namespace minitron::gpu
