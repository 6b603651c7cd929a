// The sampler on the device against engine/sampler.h: the same tokens, ranks and most likely tokens.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/cuda/sampler.h"
#include "engine/philox.h"
#include "engine/sampler.h"
#include "gtest/gtest.h"
#include "tests/engine/cuda/device_array.h"
#include "tests/engine/test_constraints.h"

namespace minitron::engine::cuda {
namespace {

constexpr int kNumSlots = 4;

// One row: its logits, what is asked for, and the tokens so far.
struct Row {
  std::vector<float> logits;
  SamplingParams params;
  std::vector<TokenId> banned;
  HistoryReset history;  // its slot is used when a penalty is on
  ResultRow result;
};

// The same rows through the kernels.
class DeviceSampler {
 public:
  DeviceSampler(const std::vector<Row>& rows, int vocab)
      : rows_(rows),
        vocab_(vocab),
        num_rows_(static_cast<int>(rows.size())),
        states_(num_rows_ * SampleStateBytes()),
        edited_(int64_t{num_rows_} * vocab),
        bin_masses_(std::vector<uint64_t>(num_rows_ * kRadixBins, 0)),
        bin_counts_(std::vector<uint32_t>(num_rows_ * kRadixBins, 0)),
        tile_masses_(int64_t{num_rows_} * NumSampleTiles(vocab)),
        tile_tops_(int64_t{num_rows_} * NumSampleTiles(vocab) * kMaxTopLogprobs),
        history_(std::vector<uint32_t>(int64_t{kNumSlots} * vocab, 0)),
        result_tokens_(num_rows_),
        outputs_(num_rows_),
        top_(int64_t{num_rows_} * kMaxTopLogprobs) {}

  std::vector<ResultRowOutput> Run() {
    std::vector<float> logits;
    std::vector<HistoryToken> history;
    for (const Row& row : rows_) {
      logits.insert(logits.end(), row.logits.begin(), row.logits.end());
      for (const TokenId token : row.history.prompt) history.push_back({row.history.slot, token, 0});
      for (const TokenId token : row.history.output) history.push_back({row.history.slot, token, 1});
      Translate(row);
    }
    if (!history.empty()) {
      const DeviceArray<HistoryToken> tokens(history);
      EXPECT_EQ(AddToHistory(tokens.data(), static_cast<int>(history.size()), history_.data(), vocab_, TestStream()),
                cudaSuccess);
      EXPECT_EQ(cudaStreamSynchronize(TestStream()), cudaSuccess);
    }
    if (edits_.empty()) edits_.push_back({});
    if (masks_.empty()) masks_.push_back(0);
    const DeviceArray<float> device_logits(logits);
    const DeviceArray<SampleRow> device_rows(sample_rows_);
    const DeviceArray<LogitEdit> device_edits(edits_);
    const DeviceArray<uint32_t> device_masks(masks_);
    const SampleCall call{device_logits.data(), num_rows_,           vocab_,          device_rows.data(),
                          device_edits.data(),  device_masks.data(), history_.data(), result_tokens_.data(),
                          outputs_.data(),      top_.data(),         Memory(),        needs_};
    EXPECT_EQ(SampleLogits(call, TestStream()), cudaSuccess);
    return Results();
  }
  uint32_t HistoryOf(int slot, TokenId token) const { return history_.Get()[int64_t{slot} * vocab_ + token]; }

 private:
  void Translate(const Row& row) {
    SampleRow out = {};
    const SamplingParams& params = row.params;
    out.target = row.result.target;
    out.num_top_logprobs = row.result.num_top_logprobs;
    out.history_slot = row.result.history_slot;
    out.uniform = UniformForPosition(params.seed, row.result.output_position);
    out.temperature = params.temperature;
    out.top_p = params.top_p;
    out.first_edit = static_cast<int32_t>(edits_.size());
    out.mask = -1;
    if (row.result.target == kNone) {
      out.uses_history = params.HasPenalties() ? 1 : 0;
      if (params.constraint != nullptr) out.mask = AddMask(params.constraint->NewWalk()->Allowed());
      out.top_k = params.top_k < vocab_ ? params.top_k : 0;
      out.min_p = params.min_p;
      out.repetition_penalty = params.repetition_penalty;
      out.presence_penalty = params.presence_penalty;
      out.frequency_penalty = params.frequency_penalty;
      for (const auto& [token, bias] : params.logit_bias) {
        const bool banned = std::count(row.banned.begin(), row.banned.end(), token) > 0;
        if (!banned) edits_.push_back({token, bias});
      }
      for (const TokenId token : row.banned) edits_.push_back({token, -std::numeric_limits<float>::infinity()});
    }
    out.num_edits = static_cast<int32_t>(edits_.size()) - out.first_edit;
    needs_.draws |= IsDrawn(out);
    needs_.top_k |= out.top_k > 0;
    needs_.top_p |= out.top_p < 1.0f;
    needs_.logprobs |= out.num_top_logprobs >= 0;
    sample_rows_.push_back(out);
  }
  int32_t AddMask(absl::Span<const uint64_t> allowed) {
    const auto first = static_cast<int64_t>(masks_.size());
    masks_.resize(first + MaskWords(vocab_), 0);
    for (TokenId token = 0; token < vocab_; ++token) {
      if (Has(allowed, token)) masks_[first + token / 32] |= 1u << (token % 32);
    }
    return static_cast<int32_t>(first / MaskWords(vocab_));
  }
  SamplerMemory Memory() const {
    return {reinterpret_cast<SampleState*>(states_.data()),
            edited_.data(),
            bin_masses_.data(),
            bin_counts_.data(),
            tile_masses_.data(),
            tile_tops_.data()};
  }
  std::vector<ResultRowOutput> Results() const {
    const std::vector<SampleOutput> outputs = outputs_.Get();
    const std::vector<TopLogprob> top = top_.Get();
    const std::vector<int32_t> tokens = result_tokens_.Get();
    std::vector<ResultRowOutput> results(num_rows_);
    for (int r = 0; r < num_rows_; ++r) {
      EXPECT_EQ(tokens[r], outputs[r].token);
      results[r].token_id = outputs[r].token;
      results[r].failed = outputs[r].failed != 0;
      if (rows_[r].result.num_top_logprobs < 0 || results[r].failed) continue;
      results[r].chosen = {outputs[r].token, outputs[r].logprob, outputs[r].rank};
      for (int n = 0; n < rows_[r].result.num_top_logprobs; ++n) {
        const TopLogprob& entry = top[r * kMaxTopLogprobs + n];
        if (entry.token >= 0) results[r].top.push_back({entry.token, entry.logprob, n + 1});
      }
    }
    return results;
  }

  const std::vector<Row>& rows_;
  const int vocab_, num_rows_;
  std::vector<SampleRow> sample_rows_;
  std::vector<LogitEdit> edits_;
  std::vector<uint32_t> masks_;
  SampleNeeds needs_;
  DeviceArray<unsigned char> states_;
  DeviceArray<float> edited_;
  DeviceArray<uint64_t> bin_masses_;
  DeviceArray<uint32_t> bin_counts_;
  DeviceArray<uint64_t> tile_masses_, tile_tops_;
  DeviceArray<uint32_t> history_;
  DeviceArray<int32_t> result_tokens_;
  DeviceArray<SampleOutput> outputs_;
  DeviceArray<TopLogprob> top_;
};

ResultRowOutput OnCpu(const Row& row) {
  std::vector<float> logits = row.logits;
  TokenHistory history;
  HistoryReset reset = row.history;
  reset.constraint = row.params.constraint.get();
  history.Reset(reset);
  SamplerScratch scratch;
  ResultRow result = row.result;
  result.params = result.target == kNone ? &row.params : nullptr;
  result.banned_tokens = &row.banned;
  return ProcessRow(absl::MakeSpan(logits), result, &history, scratch);
}

void ExpectSame(const ResultRowOutput& actual, const ResultRowOutput& expected, const std::string& what) {
  ASSERT_EQ(actual.failed, expected.failed) << what;
  ASSERT_EQ(actual.token_id, expected.token_id) << what;
  ASSERT_EQ(actual.chosen.rank, expected.chosen.rank) << what;
  ASSERT_NEAR(actual.chosen.logprob, expected.chosen.logprob, 2e-6 + 1e-6 * std::abs(expected.chosen.logprob)) << what;
  ASSERT_EQ(actual.top.size(), expected.top.size()) << what;
  for (size_t i = 0; i < actual.top.size(); ++i) {
    ASSERT_EQ(actual.top[i].token_id, expected.top[i].token_id) << what << " top " << i;
    ASSERT_NEAR(actual.top[i].logprob, expected.top[i].logprob, 2e-6 + 1e-6 * std::abs(expected.top[i].logprob));
  }
}

void Constrain(TokenSet allowed, Row& row) {
  row.params.constraint = std::make_shared<Sets>(std::vector<TokenSet>{std::move(allowed)});
}

// One token, few, half of them or all.
TokenSet RandomSet(std::mt19937_64& random, int vocab) {
  std::vector<TokenId> tokens = {static_cast<TokenId>(random() % vocab)};
  const uint64_t kinds[] = {0, 3, 128, 256};
  const uint64_t share = kinds[random() % 4];
  for (TokenId token = 0; token < vocab; ++token) {
    if (random() % 256 < share) tokens.push_back(token);
  }
  return SetOf(tokens);
}

Row RandomRow(std::mt19937_64& random, int vocab, int slot) {
  std::normal_distribution<float> normal(0.0f, 3.0f);
  const auto chance = [&random](int one_in) { return random() % one_in == 0; };
  const auto token = [&] { return static_cast<TokenId>(random() % vocab); };
  Row row;
  row.logits.resize(vocab);
  for (float& logit : row.logits) logit = normal(random);
  if (chance(3)) {  // ties, zeros of both signs
    for (float& logit : row.logits) logit = std::round(logit);
  }
  SamplingParams& params = row.params;
  params.seed = random();
  params.temperature = chance(4) ? 0.0f : 0.2f + 0.1f * static_cast<float>(random() % 15);
  if (chance(2)) params.top_k = 1 + static_cast<int>(random() % vocab);
  if (chance(3)) params.top_k = 1 + static_cast<int>(random() % std::min(vocab, 50));
  if (chance(2)) params.top_p = 0.05f + 0.05f * static_cast<float>(random() % 19);
  if (chance(3)) params.min_p = 0.02f * static_cast<float>(random() % 20);
  if (chance(3)) params.repetition_penalty = 1.3f;
  if (chance(3)) params.presence_penalty = 0.7f;
  if (chance(3)) params.frequency_penalty = -0.4f;
  if (chance(3)) params.logit_bias = {{0, 4.0f}, {vocab - 1, vocab > 1 ? -2.0f : 0.0f}};
  if (vocab == 1) params.logit_bias.clear();
  if (vocab > 2 && chance(3)) row.banned = {0, static_cast<TokenId>(vocab / 2)};
  row.history.slot = slot;
  for (int i = 0; i < 20; ++i) {
    row.history.prompt.push_back(token());
    row.history.output.push_back(i % 3 == 0 ? row.history.prompt.back() : token());
  }
  row.result.history_slot = slot;
  row.result.output_position = static_cast<int32_t>(random() % 1000);
  if (chance(2)) row.result.num_top_logprobs = static_cast<int32_t>(random() % 21);
  if (chance(5)) {
    row.result.target = token();
    row.result.num_top_logprobs = 3;
  }
  if (row.result.target == kNone && chance(3)) Constrain(RandomSet(random, vocab), row);
  return row;
}

void CheckAgainstCpu(const std::vector<Row>& rows, int vocab, const std::string& what) {
  const std::vector<ResultRowOutput> outputs = DeviceSampler(rows, vocab).Run();
  for (size_t r = 0; r < rows.size(); ++r) {
    ExpectSame(outputs[r], OnCpu(rows[r]), what + " row " + std::to_string(r));
  }
}

TEST(SamplerKernelsTest, RandomRowsGiveTheCpuSamplersTokens) {
  std::mt19937_64 random(1);
  for (const int vocab : {1, 5, 131, 2048, 4095, 4096, 4097, 9000}) {
    for (int round = 0; round < (vocab < 1000 ? 20 : 5); ++round) {
      std::vector<Row> rows;
      for (int slot = 0; slot < kNumSlots; ++slot) rows.push_back(RandomRow(random, vocab, slot));
      CheckAgainstCpu(rows, vocab, "vocab " + std::to_string(vocab) + " round " + std::to_string(round));
    }
  }
}

TEST(SamplerKernelsTest, FiberOrderDoesNotMatter) {
  ForEachOrder([] {
    std::mt19937_64 random(2);
    std::vector<Row> rows;
    for (int slot = 0; slot < kNumSlots; ++slot) rows.push_back(RandomRow(random, 5000, slot));
    CheckAgainstCpu(rows, 5000, "vocab 5000");
  });
}

TEST(SamplerKernelsTest, TheFullVocabularyIsSearchedWithoutASort) {
  std::mt19937_64 random(3);
  std::vector<Row> rows = {RandomRow(random, 256000, 0), RandomRow(random, 256000, 1)};
  for (Row& row : rows) {
    row.result = {.num_top_logprobs = 20, .history_slot = row.history.slot, .output_position = 5};
    row.params.temperature = 1.0f;
    row.params.top_p = 0.9f;
  }
  rows[0].params.top_k = 0;
  rows[1].params.top_k = 1000;
  CheckAgainstCpu(rows, 256000, "vocab 256000");
}

TEST(SamplerKernelsTest, ARowDoesNotDependOnItsNeighbours) {
  std::mt19937_64 random(4);
  std::vector<Row> rows;
  for (int slot = 0; slot < kNumSlots; ++slot) rows.push_back(RandomRow(random, 4500, slot));
  const std::vector<ResultRowOutput> together = DeviceSampler(rows, 4500).Run();
  for (int r = 0; r < kNumSlots; ++r) {
    const std::vector<Row> alone = {rows[r]};
    const ResultRowOutput output = DeviceSampler(alone, 4500).Run()[0];
    EXPECT_EQ(output.token_id, together[r].token_id);
    EXPECT_EQ(output.chosen, together[r].chosen);
    EXPECT_EQ(output.top, together[r].top);
  }
}

TEST(SamplerKernelsTest, AMaskBansAllButItsTokens) {
  constexpr int kVocab = 4200;
  std::mt19937_64 random(8);
  for (const float temperature : {0.0f, 1.0f}) {
    std::vector<Row> rows;
    rows.reserve(kNumSlots);
    for (int slot = 0; slot < kNumSlots; ++slot) {
      rows.push_back(RandomRow(random, kVocab, slot));
      rows.back().result = {.num_top_logprobs = 2, .history_slot = slot, .output_position = 5};
      rows.back().params = {.temperature = temperature, .top_k = 10 * slot, .seed = random()};
      rows.back().banned.clear();
    }
    const std::vector<ResultRowOutput> without = DeviceSampler(rows, kVocab).Run();
    Constrain(SetOf({4198}), rows[1]);         // one: it is taken, however unlikely
    Constrain(TokenSet(66), rows[2]);          // none: nothing to choose from
    Constrain(SetOf({7, 64, 4000}), rows[3]);  // fewer than top-k
    const std::vector<ResultRowOutput> with = DeviceSampler(rows, kVocab).Run();
    EXPECT_EQ(with[0].token_id, without[0].token_id);
    EXPECT_EQ(with[0].chosen, without[0].chosen);
    EXPECT_EQ(with[0].top, without[0].top);
    EXPECT_EQ(with[1].token_id, 4198);
    EXPECT_EQ(with[1].top, without[1].top) << "logprobs are of the raw logits";
    EXPECT_TRUE(with[2].failed);
    EXPECT_TRUE(with[3].token_id == 7 || with[3].token_id == 64 || with[3].token_id == 4000);
    CheckAgainstCpu(rows, kVocab, "masked");
  }
}

TEST(SamplerKernelsTest, EqualLogitsAreOrderedById) {
  Row row;
  row.logits.assign(5000, 1.0f);
  row.result = {.num_top_logprobs = 4, .output_position = 0};
  for (const int top_k : {1, 7, 4999}) {
    for (uint64_t seed = 0; seed < 5; ++seed) {
      row.params = {.top_k = top_k, .seed = seed};
      const std::vector<Row> rows = {row};
      const ResultRowOutput output = DeviceSampler(rows, 5000).Run()[0];
      ExpectSame(output, OnCpu(row), "top_k " + std::to_string(top_k));
      EXPECT_LT(output.token_id, top_k);
    }
  }
}

TEST(SamplerKernelsTest, RowsWithoutAFiniteChoiceFailAlone) {
  std::mt19937_64 random(6);
  std::vector<Row> rows;
  for (int slot = 0; slot < kNumSlots; ++slot) {
    rows.push_back(RandomRow(random, 4100, slot));
    rows.back().result.target = kNone;
  }
  rows[1].logits[4099] = std::nanf("");
  rows[2].logits[0] = std::numeric_limits<float>::infinity();
  rows[3].banned.resize(4100);
  for (int i = 0; i < 4100; ++i) rows[3].banned[i] = i;
  rows[3].params.logit_bias.clear();
  const std::vector<ResultRowOutput> outputs = DeviceSampler(rows, 4100).Run();
  EXPECT_FALSE(outputs[0].failed);
  for (int r = 1; r < kNumSlots; ++r) EXPECT_TRUE(outputs[r].failed) << r;
  CheckAgainstCpu(rows, 4100, "failing");
}

TEST(SamplerKernelsTest, SampledTokensJoinTheHistory) {
  std::mt19937_64 random(7);
  Row row = RandomRow(random, 100, 2);
  row.result = {.history_slot = 2, .output_position = 1};
  row.history = {2, {5, 5, 6}, {6, 7, 7}};
  row.params = {.temperature = 0.0f, .presence_penalty = 0.1f};
  row.banned.clear();
  row.logits[9] = 100.0f;
  const std::vector<Row> rows = {row};
  DeviceSampler sampler(rows, 100);
  EXPECT_EQ(sampler.Run()[0].token_id, 9);
  EXPECT_EQ(sampler.HistoryOf(2, 5), kInPrompt);
  EXPECT_EQ(sampler.HistoryOf(2, 6), kInPrompt + 1);
  EXPECT_EQ(sampler.HistoryOf(2, 7), 2u);
  EXPECT_EQ(sampler.HistoryOf(2, 9), 1u);
  EXPECT_EQ(sampler.HistoryOf(1, 9), 0u);
}

}  // namespace
}  // namespace minitron::engine::cuda
