// Logits and greedy continuations equal those of Hugging Face's NemotronForCausalLM in fp32 (goldens/make_goldens.py).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "engine/checkpoint/checkpoint.h"
#include "engine/checkpoint/json.h"
#include "engine/cpu/cpu_model_runner.h"
#include "engine/cpu/cpu_ops.h"
#include "engine/model_config.h"
#include "engine/nemotron_forward.h"
#include "engine/nemotron_weights.h"
#include "gtest/gtest.h"

namespace minitron::engine {
namespace {

constexpr int kBlockSize = 16;
constexpr int kMaxTokens = 512;

// Both sides compute in fp32 from the same bf16 weights and differ only in the order of sums: about sqrt(n) half-ulps
// per reduction of n terms, over a dozen reductions, on activations of size 1 to 100. Measured: 1e-5 on logits of size
// 15. A wrong rotary width, a missing +1 or a swapped kv head moves logits by 0.1 and more.
constexpr double kLogitTolerance = 1e-4;

struct Golden {
  std::string name;
  std::string model_dir;
};

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::vector<std::vector<TokenId>> TokenLists(const JsonValue& lists) {
  std::vector<std::vector<TokenId>> result;
  for (const JsonValue& list : lists.items) {
    std::vector<TokenId>& tokens = result.emplace_back();
    for (const JsonValue& token : list.items) tokens.push_back(static_cast<TokenId>(token.integer));
  }
  return result;
}

std::ostream& operator<<(std::ostream& out, const Golden& golden) { return out << golden.name; }

class GoldenTest : public testing::TestWithParam<Golden> {
 protected:
  void SetUp() override {
    const std::string stem = std::string(MINITRON_SOURCE_DIR) + "/tests/engine/goldens/" + GetParam().name;
    const std::string text = ReadFile(stem + ".json");
    JsonValue json;
    std::string error;
    ASSERT_TRUE(ParseJson(text.data(), static_cast<int64_t>(text.size()), {}, &json, &error)) << error;
    prompts_ = TokenLists(*json.Find("prompts"));
    continuations_ = TokenLists(*json.Find("continuations"));
    const std::string bytes = ReadFile(stem + ".bin");
    ASSERT_FALSE(bytes.empty());
    logits_.resize(bytes.size() / sizeof(float));
    std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(logits_.data()));  // little-endian hosts only

    const std::string model_dir = std::string(MINITRON_SOURCE_DIR) + "/" + GetParam().model_dir;
    auto config = LoadNemotronConfig(model_dir);
    ASSERT_TRUE(config.ok()) << config.status();
    config_ = *config;
    auto checkpoint = Checkpoint::Open(model_dir);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    checkpoint_ = *std::move(checkpoint);
    auto weights = MapNemotronWeights(*checkpoint_, config_);
    ASSERT_TRUE(weights.ok()) << weights.status();
    weights_ = *weights;
    limits_ = {.block_size = kBlockSize,
               .num_kv_blocks = config_.max_position_embeddings / kBlockSize,
               .max_num_sequences = 1,
               .max_num_tokens = kMaxTokens,
               .max_context_tokens = config_.max_position_embeddings,
               .kv_cache_type = KvCacheType::kF32};
  }

  // Rows `first` .. `end` of one sequence, blocks in reverse so that position and slot differ.
  Batch SequenceBatch(const std::vector<TokenId>& tokens, int first) const {
    Batch batch;
    const int end = static_cast<int>(tokens.size());
    for (int position = 0; position < end; position += kBlockSize) {
      batch.block_ids.push_back(limits_.num_kv_blocks - 1 - position / kBlockSize);
    }
    for (int position = first; position < end; ++position) {
      batch.token_ids.push_back(tokens[position]);
      batch.positions.push_back(position);
      batch.slot_mapping.push_back(int64_t{batch.block_ids[position / kBlockSize]} * kBlockSize +
                                   position % kBlockSize);
    }
    batch.query_start.push_back(batch.num_tokens());
    batch.block_start.push_back(static_cast<int>(batch.block_ids.size()));
    batch.kv_lens.push_back(end);
    return batch;
  }

  NemotronConfig config_;
  std::unique_ptr<Checkpoint> checkpoint_;
  NemotronWeights weights_;
  RunnerLimits limits_;
  std::vector<std::vector<TokenId>> prompts_, continuations_;
  std::vector<float> logits_;
};

TEST_P(GoldenTest, LogitsEqualHuggingFaceInFp32) {
  cpu::CpuOps ops(config_, limits_, 2);
  ForwardBuffers<cpu::CpuOps> buffers(ops, config_, kMaxTokens);
  double largest = 0.0, sum = 0.0;
  size_t row = 0;
  for (size_t p = 0; p < prompts_.size(); ++p) {
    const Batch batch = SequenceBatch(prompts_[p], 0);
    const MatrixView<const float> hidden = Forward(ops, config_, weights_, ops.Upload(batch), buffers);
    std::vector<float> computed(hidden.rows * config_.vocab_size);
    ops.MatMul(hidden, weights_.lm_head, {computed.data(), hidden.rows, config_.vocab_size});
    for (int64_t t = p == 0 ? 0 : hidden.rows - 1; t < hidden.rows; ++t, ++row) {
      for (int i = 0; i < config_.vocab_size; ++i) {
        const double difference =
            std::abs(double{computed[t * config_.vocab_size + i]} - logits_.at(row * config_.vocab_size + i));
        ASSERT_LT(difference, kLogitTolerance) << "prompt " << p << ", row " << t << ", token " << i;
        largest = std::max(largest, difference);
        sum += difference;
      }
    }
  }
  ASSERT_EQ(row * config_.vocab_size, logits_.size());
  EXPECT_GT(row, 20u);
  std::printf("%s: %zu rows of %d logits, largest difference %.3g, mean %.3g\n", GetParam().name.c_str(), row,
              config_.vocab_size, largest, sum / static_cast<double>(logits_.size()));
}

// The tolerance can tell: the error of old transformers releases is far outside it.
TEST_P(GoldenTest, WrongRotaryWidthIsFarOutsideTheTolerance) {
  const size_t vocab = config_.vocab_size;
  config_.rotary_dim -= 2;
  cpu::CpuOps ops(config_, limits_, 1);
  ForwardBuffers<cpu::CpuOps> buffers(ops, config_, kMaxTokens);
  const Batch batch = SequenceBatch(prompts_[0], 0);
  const MatrixView<const float> hidden = Forward(ops, config_, weights_, ops.Upload(batch), buffers);
  std::vector<float> computed(hidden.rows * vocab);
  ops.MatMul(hidden, weights_.lm_head, {computed.data(), hidden.rows, config_.vocab_size});
  double largest = 0.0;
  for (size_t i = 0; i < computed.size(); ++i) largest = std::max(largest, double{std::abs(computed[i] - logits_[i])});
  EXPECT_GT(largest, 100 * kLogitTolerance);
}

TEST_P(GoldenTest, GreedyContinuationsEqualHuggingFaceTokenByToken) {
  const auto runner = cpu::CreateCpuModelRunner(config_, weights_, nullptr, limits_, 2);
  const SamplingParams greedy{.temperature = 0.0f};
  ASSERT_EQ(prompts_.size(), 6u);
  for (size_t p = 0; p < prompts_.size(); ++p) {
    ASSERT_EQ(continuations_.at(p).size(), 48u);
    std::vector<TokenId> tokens = prompts_[p];
    int num_computed = 0;
    for (size_t n = 0; n < continuations_[p].size(); ++n) {
      Batch batch = SequenceBatch(tokens, num_computed);
      batch.results.push_back({.token_row = batch.num_tokens() - 1, .params = &greedy});
      ASSERT_TRUE(runner->Submit(batch).ok());
      const auto result = runner->Collect();
      ASSERT_TRUE(result.ok());
      num_computed = static_cast<int>(tokens.size());
      tokens.push_back(result->rows[0].token_id);
    }
    const std::vector<TokenId> continuation(tokens.begin() + static_cast<int64_t>(prompts_[p].size()), tokens.end());
    EXPECT_EQ(continuation, continuations_[p]) << "prompt " << p;
  }
}

INSTANTIATE_TEST_SUITE_P(Models, GoldenTest,
                         testing::Values(Golden{"tiny", "deploy/models/minitron-tiny"},
                                         Golden{"ratio8b", "tests/engine/goldens/ratio8b"}),
                         [](const auto& golden) { return golden.param.name; });

}  // namespace
}  // namespace minitron::engine
