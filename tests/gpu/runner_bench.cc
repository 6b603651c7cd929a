#include "tests/gpu/runner_bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "engine/model_runner.h"

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

struct RunnerOptions {
  std::string model, backend, weights = "none", kv = "bf16", launch = "plain";
  int max_sequences = 256;
  int max_context = 0;
};

std::unique_ptr<ModelRunner> MakeRunner(const RunnerOptions& options) {
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
  engine_options.max_num_tokens = kMaxTokens;
  engine_options.max_context_tokens = options.max_context;
  auto runner = engine::CreateModelRunner(engine_options);
  if (!runner.ok()) {
    std::fprintf(stderr, "minitron-gpu-bench: %s\n", runner.status().ToString().c_str());
    return nullptr;
  }
  return *std::move(runner);
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

// Seconds to compute the contexts of sequences [first, last); negative when the runner failed.
double Fill(ModelRunner& runner, int first, int last, int context, int blocks_per_sequence) {
  const double begin = Now();
  for (int sequence = first; sequence < last; ++sequence) {
    for (int position = 0; position < context; position += kMaxTokens) {
      Batch batch;
      AddRows(batch, sequence, blocks_per_sequence, position, std::min(kMaxTokens, context - position), sequence);
      if (!Run(runner, batch)) return -1.0;
    }
  }
  return Now() - begin;
}

// Seconds per decode step of `size` sequences at a context, submitted ahead as the scheduler does.
double TimeSteps(ModelRunner& runner, int size, int context, int blocks_per_sequence, int num_steps) {
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
  if (!runner.Submit(first).ok()) return -1.0;
  std::vector<double> times;
  for (int step = 0; step < num_steps; ++step) {
    const double begin = Now();
    if (!runner.Submit(steps[step % 2]).ok() || !runner.Collect().ok()) return -1.0;
    times.push_back(Now() - begin);
  }
  if (!runner.Collect().ok()) return -1.0;
  std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

int Steps(const RunnerOptions& given) {
  RunnerOptions options = given;
  const bool small = options.backend == "cpu";
  const std::vector<int> contexts = small ? std::vector<int>{32, 64} : std::vector<int>{512, 2048};
  options.max_context = contexts.back() + kBlockSize;
  options.max_sequences = small ? 4 : 256;
  const double begin = Now();
  const auto runner = MakeRunner(options);
  if (runner == nullptr) return 1;
  const std::string weights = options.weights == "none" ? "bf16" : options.weights;
  const auto print = [&](const char* kind, const std::string& rest) {
    std::printf("{\"kind\": \"%s\", \"weights\": \"%s\", \"kv\": \"%s\", \"launch\": \"%s\", %s}\n", kind,
                weights.c_str(), options.kv.c_str(), options.launch.c_str(), rest.c_str());
    std::fflush(stdout);
  };
  char text[256];
  std::snprintf(text, sizeof(text), "\"seconds\": %.3f, \"blocks\": %d, \"weight_bytes\": %lld", Now() - begin,
                runner->num_kv_blocks(), static_cast<long long>(runner->model_info().weight_bytes));
  print("load_model", text);
  for (const int context : contexts) {
    const int blocks = (context + kBlockSize - 1) / kBlockSize;
    int filled = 0;
    for (const int size : {1, 4, 8, 16, 32, 64, 128, 256}) {
      // What the cache holds; at long contexts up to what fills in a few seconds.
      if (size > options.max_sequences || int64_t{size} * blocks > runner->num_kv_blocks()) break;
      if (int64_t{size} * context > (160 << 10)) break;
      const double fill_s = Fill(*runner, filled, size, context, blocks);
      if (fill_s < 0.0) return 1;
      if (size == 8) {
        std::snprintf(text, sizeof(text), "\"prompt\": %d, \"tokens_per_s\": %.1f", context, 4.0 * context / fill_s);
        print("prefill", text);
      }
      filled = size;
      const double step_s = TimeSteps(*runner, size, context, blocks, small ? 3 : 30);
      if (step_s < 0.0) return 1;
      std::snprintf(text, sizeof(text), "\"batch\": %d, \"context\": %d, \"ms\": %.4f", size, context, step_s * 1e3);
      print("step", text);
    }
  }
  return 0;
}

int Score(const RunnerOptions& given, const std::string& file_name) {
  RunnerOptions options = given;
  options.max_sequences = 1;
  const auto runner = MakeRunner(options);
  if (runner == nullptr) return 1;
  std::ifstream file(file_name);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::vector<TokenId> tokens;
    for (TokenId token; words >> token;) tokens.push_back(token);
    Batch batch;
    AddRows(batch, 0, 1 << 10, 0, static_cast<int>(tokens.size()) - 1, 0);
    for (int t = 0; t + 1 < static_cast<int>(tokens.size()); ++t) {
      batch.token_ids[t] = tokens[t];
      batch.results.push_back({.token_row = t, .target = tokens[t + 1], .num_top_logprobs = 1});
    }
    if (!runner->Submit(batch).ok()) return 1;
    const auto result = runner->Collect();
    if (!result.ok()) return 1;
    std::printf("{\"kind\": \"score\", \"logprobs\": [");
    for (size_t r = 0; r < result->rows.size(); ++r) {
      std::printf("%s%.6f", r == 0 ? "" : ", ", result->rows[r].chosen.logprob);
    }
    std::printf("], \"top\": [");
    for (size_t r = 0; r < result->rows.size(); ++r) {
      std::printf("%s%d", r == 0 ? "" : ", ", result->rows[r].top[0].token_id);
    }
    std::printf("]}\n");
  }
  return 0;
}

}  // namespace

int RunnerSteps(const std::vector<std::string>& arguments) {
  return Steps({.model = arguments[0],
                .backend = arguments[1],
                .weights = arguments[2],
                .kv = arguments[3],
                .launch = arguments[4]});
}

int RunnerScore(const std::vector<std::string>& arguments) {
  return Score({.model = arguments[0], .backend = arguments[1]}, arguments[2]);
}

}  // namespace minitron::gpu
