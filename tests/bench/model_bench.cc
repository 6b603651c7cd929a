#include "tests/bench/model_bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>

#include "engine/base/check.h"

namespace minitron::bench {
namespace {

using engine::Batch;
using engine::ModelRunner;

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// A field of /proc/self/status in MiB.
double StatusMib(const std::string& key) {
  std::ifstream file("/proc/self/status");
  std::string name, rest;
  while (file >> name && std::getline(file, rest)) {
    if (name == key + ":") return std::stod(rest) / 1024.0;
  }
  return 0.0;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Sequences of equal length side by side, each with its own contiguous blocks.
class Sequences {
 public:
  Sequences(ModelRunner& runner, int count, int max_tokens)
      : runner_(runner),
        count_(count),
        blocks_((max_tokens + runner.block_size() - 1) / runner.block_size()),
        tokens_(count, 1) {
    CHECK(count * blocks_ <= runner.num_kv_blocks());
    params_.temperature = 0.0f;
  }

  // Appends `tokens` rows to every sequence; samples from the last row of each when `sample`.
  void Step(int tokens, bool sample) {
    Batch batch;
    const int block_size = runner_.block_size();
    for (int s = 0; s < count_; ++s) {
      const int first_block = s * blocks_;
      for (int t = 0; t < tokens; ++t) {
        const int position = length_ + t;
        batch.token_ids.push_back(t == tokens - 1 ? tokens_[s] : (position * 7 + s) % runner_.model_info().vocab_size);
        batch.positions.push_back(position);
        batch.slot_mapping.push_back(int64_t{first_block + position / block_size} * block_size + position % block_size);
      }
      batch.query_start.push_back(batch.num_tokens());
      for (int b = 0; b * block_size < length_ + tokens; ++b) batch.block_ids.push_back(first_block + b);
      batch.block_start.push_back(static_cast<int>(batch.block_ids.size()));
      batch.kv_lens.push_back(length_ + tokens);
      if (sample) batch.results.push_back({.token_row = batch.num_tokens() - 1, .sequence = s, .params = &params_});
    }
    CHECK(runner_.Submit(batch).ok());
    const auto result = runner_.Collect();
    CHECK(result.ok());
    for (size_t s = 0; s < result->rows.size(); ++s) {
      CHECK(!result->rows[s].failed);
      tokens_[s] = result->rows[s].token_id;
    }
    length_ += tokens;
  }

 private:
  ModelRunner& runner_;
  const int count_;
  const int blocks_;
  int length_ = 0;
  std::vector<engine::TokenId> tokens_;
  engine::SamplingParams params_;
};

double PrefillRate(ModelRunner& runner, const ModelRun& run) {
  Sequences sequences(runner, 1, run.prefill_tokens);
  const double start = Now();
  for (int done = 0; done < run.prefill_tokens;) {
    const int chunk = std::min(run.prefill_chunk, run.prefill_tokens - done);
    done += chunk;
    sequences.Step(chunk, done == run.prefill_tokens);
  }
  return run.prefill_tokens / (Now() - start);
}

double DecodeRate(ModelRunner& runner, const ModelRun& run, int batch) {
  Sequences sequences(runner, batch, run.decode_context + run.decode_steps);
  const int chunk = std::max(1, runner.max_num_tokens() / batch);
  for (int done = 0; done < run.decode_context;) {
    const int tokens = std::min(chunk, run.decode_context - done);
    done += tokens;
    sequences.Step(tokens, done == run.decode_context);
  }
  const double start = Now();
  for (int step = 0; step < run.decode_steps; ++step) sequences.Step(1, true);
  return run.decode_steps * batch / (Now() - start);
}

}  // namespace

bool BenchModel(engine::EngineOptions options, const ModelRun& run, const Limits& limits) {
  const int largest = run.batches.empty() ? 1 : *std::max_element(run.batches.begin(), run.batches.end());
  options.max_num_sequences = std::max(16, largest);
  options.max_num_tokens = std::max(512, run.prefill_chunk);
  const double start = Now();
  auto created = engine::CreateModelRunner(options);
  if (!created.ok()) {
    std::fprintf(stderr, "%s\n", created.status().ToString().c_str());
    return false;
  }
  ModelRunner& runner = **created;
  std::printf("model %s: ready in %.2f s, resident %.0f MiB\n", runner.model_info().weight_type.c_str(), Now() - start,
              StatusMib("VmRSS"));
  const engine::ModelInfo& info = runner.model_info();
  const double embedding = static_cast<double>(info.vocab_size) * info.hidden_size;
  const double step_bytes = static_cast<double>(info.weight_bytes) - 2.0 * embedding;
  // The head works on the last token of a prompt alone.
  const double token_flops = 2.0 * (static_cast<double>(info.num_parameters) - 2.0 * embedding);
  std::vector<double> rates;
  if (run.prefill_tokens > 0) {
    for (int i = 0; i < run.repeats; ++i) rates.push_back(PrefillRate(runner, run));
    std::printf("  %-6s prefill %4d      %9.2f tok/s  %3.0f %% of FMA\n", info.weight_type.c_str(), run.prefill_tokens,
                Median(rates), 100.0 * Median(rates) * token_flops / limits.fma_flops_per_s);
  }
  for (const int batch : run.batches) {
    rates.clear();
    for (int i = 0; i < run.repeats; ++i) rates.push_back(DecodeRate(runner, run, batch));
    std::printf("  %-6s decode batch %2d  %9.2f tok/s  %3.0f %% of read\n", info.weight_type.c_str(), batch,
                Median(rates), 100.0 * Median(rates) / batch * step_bytes / limits.read_bytes_per_s);
    std::fflush(stdout);
  }
  std::printf("  %-6s resident %.0f MiB (file-backed %.0f MiB)\n", runner.model_info().weight_type.c_str(),
              StatusMib("VmRSS"), StatusMib("RssFile"));
  return true;
}

}  // namespace minitron::bench
