#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "engine/philox.h"
#include "gtest/gtest.h"

namespace minitron::engine {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> RandomLogits(std::mt19937_64& random, int size, float spread) {
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> logits(size);
  for (float& x : logits) x = normal(random);
  return logits;
}

ResultRowOutput Process(std::vector<float> logits, const ResultRow& row, const TokenHistory* history = nullptr) {
  const std::vector<float> before = logits;
  SamplerScratch scratch;
  ResultRowOutput output = ProcessRow(absl::MakeSpan(logits), row, history, scratch);
  EXPECT_EQ(std::memcmp(before.data(), logits.data(), logits.size() * sizeof(float)), 0) << "logits not restored";
  return output;
}

TokenId SampleToken(const std::vector<float>& logits, const SamplingParams& params, int32_t position = 0,
                    const TokenHistory* history = nullptr, const std::vector<TokenId>* banned = nullptr) {
  const ResultRowOutput output =
      Process(logits, {.output_position = position, .params = &params, .banned_tokens = banned}, history);
  EXPECT_FALSE(output.failed);
  return output.token_id;
}

// --- The reference: every filter by a full sort, in double. ---

std::vector<double> NaiveProbabilities(const std::vector<float>& logits, const SamplingParams& params) {
  std::vector<TokenId> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](TokenId a, TokenId b) { return logits[a] > logits[b]; });
  std::vector<double> weights(logits.size(), 0.0);
  for (const TokenId token : order) {
    weights[token] = std::exp((double{logits[token]} - double{logits[order[0]]}) / double{params.temperature});
  }
  if (params.top_k > 0) order.resize(std::min(order.size(), static_cast<size_t>(params.top_k)));
  double total = 0.0;
  for (const TokenId token : order) total += weights[token];
  if (params.top_p < 1.0f) {
    double sum = 0.0;
    for (size_t i = 0; i < order.size(); ++i) {
      sum += weights[order[i]];
      if (sum >= double{params.top_p} * total) {
        order.resize(i + 1);
        break;
      }
    }
  }
  const double heaviest = weights[order[0]];
  std::erase_if(order, [&](TokenId token) { return weights[token] < double{params.min_p} * heaviest; });
  std::vector<double> probabilities(logits.size(), 0.0);
  total = 0.0;
  for (const TokenId token : order) total += weights[token];
  for (const TokenId token : order) probabilities[token] = weights[token] / total;
  return probabilities;
}

TokenId NaiveDraw(const std::vector<double>& probabilities, double u) {
  double sum = 0.0;
  for (size_t i = 0; i < probabilities.size(); ++i) {
    sum += probabilities[i];
    if (sum > u) return static_cast<TokenId>(i);
  }
  return -1;
}

// Whether u is so close to a step of the CDF that fp32 weights may round to its other side.
bool NearStep(const std::vector<double>& probabilities, double u) {
  double sum = 0.0;
  for (const double p : probabilities) {
    sum += p;
    if (std::abs(sum - u) < 1e-5) return true;
  }
  return false;
}

// --- Selection ---

TEST(SelectTopTest, EqualsTheHeadOfAFullSortWithTies) {
  std::mt19937_64 random(1);
  for (const int size : {1, 2, 17, 300, 5000}) {
    for (const int levels : {1, 3, 40, 100000}) {
      std::vector<float> logits(size);
      for (float& x : logits) x = static_cast<float>(random() % levels) - 1.0f;
      std::vector<TokenId> order(size);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](TokenId a, TokenId b) { return logits[a] > logits[b]; });
      for (const int k : {0, 1, 2, 5, 20, 299, 5000, 9999}) {
        std::vector<TokenId> top;
        SelectTop(logits, k, top);
        const std::vector<TokenId> expected(order.begin(), order.begin() + std::min(k, size));
        ASSERT_EQ(top, expected) << "size " << size << ", levels " << levels << ", k " << k;
      }
    }
  }
}

// --- Greedy ---

TEST(SamplerTest, GreedyTiesGoToTheLowestId) {
  const SamplingParams greedy{.temperature = 0.0f};
  EXPECT_EQ(SampleToken({1.0f, 3.0f, 2.0f, 3.0f, 3.0f}, greedy), 1);
  EXPECT_EQ(SampleToken({5.0f, 5.0f}, greedy), 0);
  EXPECT_EQ(SampleToken({-1.0f, 0.0f, -0.0f}, greedy), 1);  // +0 and -0 are equal
}

TEST(SamplerTest, GreedyIgnoresSeedAndFilters) {
  std::mt19937_64 random(2);
  for (int i = 0; i < 50; ++i) {
    const std::vector<float> logits = RandomLogits(random, 1000, 2.0f);
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    const SamplingParams params{.temperature = 0.0f, .top_k = 7, .top_p = 0.3f, .min_p = 0.5f, .seed = random()};
    EXPECT_EQ(SampleToken(logits, params, i), best);
  }
}

TEST(SamplerTest, TinyTemperatureIsGreedyAndDoesNotOverflow) {
  const SamplingParams params{.temperature = std::numeric_limits<float>::denorm_min(), .seed = 3};
  EXPECT_EQ(SampleToken({1e30f, 2e30f, -3e38f}, params), 1);
}

// --- Draws ---

TEST(SamplerTest, EveryFilterCombinationEqualsTheNaiveReference) {
  std::mt19937_64 random(4);
  int compared = 0;
  for (int i = 0; i < 3000; ++i) {
    const int size = 2 + static_cast<int>(random() % 700);
    const std::vector<float> logits = RandomLogits(random, size, 0.5f + static_cast<float>(random() % 40) / 10.0f);
    SamplingParams params{.temperature = 0.2f + static_cast<float>(random() % 18) / 10.0f, .seed = random()};
    if (random() % 2 == 0) params.top_k = 1 + static_cast<int>(random() % size);
    if (random() % 2 == 0) params.top_p = 0.05f + static_cast<float>(random() % 95) / 100.0f;
    if (random() % 2 == 0) params.min_p = static_cast<float>(random() % 100) / 150.0f;
    const std::vector<double> probabilities = NaiveProbabilities(logits, params);
    for (int32_t position = 0; position < 4; ++position) {
      const double u = UniformForPosition(params.seed, position);
      if (NearStep(probabilities, u)) continue;
      ++compared;
      ASSERT_EQ(SampleToken(logits, params, position), NaiveDraw(probabilities, u))
          << "case " << i << ": size " << size << ", T " << params.temperature << ", k " << params.top_k << ", p "
          << params.top_p << ", min_p " << params.min_p;
    }
  }
  EXPECT_GT(compared, 10000);
}

TEST(SamplerTest, TopPOfAFlatRowLooksFarEnough) {
  const std::vector<float> flat(6000, 1.25f);
  const SamplingParams params{.top_p = 0.5f, .seed = 9};
  TokenId largest = 0;
  for (int32_t position = 0; position < 300; ++position) {
    largest = std::max(largest, SampleToken(flat, params, position));
  }
  EXPECT_LT(largest, 3000);  // ties by lower id: exactly the first half is kept
  EXPECT_GT(largest, 2900);
}

// Chi-square against exact probabilities; seeds are fixed, so this cannot flake.
TEST(SamplerTest, DrawsFollowTheDistribution) {
  const std::vector<float> logits = {0.0f, 1.0f, 2.0f, -1.0f, 0.5f, 1.5f, -2.0f, 0.7f, -0.3f, 1.1f};
  const std::vector<SamplingParams> cases = {{.temperature = 1.0f},
                                             {.temperature = 0.5f},
                                             {.temperature = 2.0f},
                                             {.temperature = 1.0f, .top_k = 4},
                                             {.temperature = 1.0f, .top_p = 0.8f},
                                             {.temperature = 1.3f, .min_p = 0.2f}};
  for (SamplingParams params : cases) {
    const std::vector<double> probabilities = NaiveProbabilities(logits, params);
    std::vector<int> counts(logits.size(), 0);
    constexpr int kDraws = 20000;
    for (int i = 0; i < kDraws; ++i) {
      params.seed = 1000 + i / 100;  // both parts of the key vary
      ++counts[SampleToken(logits, params, i % 100)];
    }
    double chi_square = 0.0;
    for (size_t token = 0; token < logits.size(); ++token) {
      const double expected = probabilities[token] * kDraws;
      if (expected == 0.0) {
        EXPECT_EQ(counts[token], 0);
        continue;
      }
      chi_square += (counts[token] - expected) * (counts[token] - expected) / expected;
    }
    EXPECT_LT(chi_square, 27.9);  // p = 0.001 at 9 degrees of freedom
  }
}

TEST(SamplerTest, SameSeedAndPositionDrawTheSameToken) {
  std::mt19937_64 random(5);
  const std::vector<float> logits = RandomLogits(random, 500, 1.0f);
  const SamplingParams params{.seed = 77};
  std::map<TokenId, int> seen;
  for (int32_t position = 0; position < 50; ++position) {
    const TokenId token = SampleToken(logits, params, position);
    EXPECT_EQ(token, SampleToken(logits, params, position));
    ++seen[token];
  }
  EXPECT_GT(seen.size(), 20u);
}

TEST(SamplerTest, TopKOfTheWholeVocabularyDrawsLikeNoFilter) {
  std::mt19937_64 random(6);
  const std::vector<float> logits = RandomLogits(random, 64, 1.0f);
  for (int32_t position = 0; position < 100; ++position) {
    EXPECT_EQ(SampleToken(logits, {.top_k = 64, .seed = 1}, position), SampleToken(logits, {.seed = 1}, position));
  }
}

// --- Bans, penalties, bias ---

TEST(SamplerTest, BannedTokensAreNeverChosen) {
  const std::vector<float> logits = {1.0f, 9.0f, 8.0f, 0.0f};
  const std::vector<TokenId> banned = {1, 2};
  EXPECT_EQ(SampleToken(logits, {.temperature = 0.0f}, 0, nullptr, &banned), 0);
  for (int32_t position = 0; position < 200; ++position) {
    for (const SamplingParams& params : std::vector<SamplingParams>{{}, {.top_k = 3}, {.top_p = 0.99f}}) {
      const TokenId token = SampleToken(logits, params, position, nullptr, &banned);
      EXPECT_TRUE(token == 0 || token == 3) << token;
    }
  }
}

TEST(SamplerTest, BanWinsOverBias) {
  const std::vector<TokenId> banned = {1};
  EXPECT_EQ(SampleToken({0.0f, 0.0f}, {.temperature = 0.0f, .logit_bias = {{1, 100.0f}}}, 0, nullptr, &banned), 0);
}

TEST(SamplerTest, EverythingBannedFails) {
  const std::vector<TokenId> banned = {0, 1};
  const SamplingParams params;
  EXPECT_TRUE(Process({1.0f, 2.0f}, {.params = &params, .banned_tokens = &banned}).failed);
}

TEST(SamplerTest, LogitBiasMovesTheChoice) {
  EXPECT_EQ(SampleToken({1.0f, 2.0f, 3.0f}, {.temperature = 0.0f, .logit_bias = {{0, 2.5f}}}), 0);
  EXPECT_EQ(SampleToken({1.0f, 2.0f, 3.0f}, {.temperature = 0.0f, .logit_bias = {{2, -100.0f}}}), 1);
}

class PenaltyTest : public testing::Test {
 protected:
  PenaltyTest() { history_.Reset({.slot = 0, .prompt = {0, 1, 1}, .output = {1, 2, 2, 2}}); }
  TokenId Greedy(const std::vector<float>& logits, SamplingParams params) {
    params.temperature = 0.0f;
    return SampleToken(logits, params, 0, &history_);
  }
  TokenHistory history_;
};

TEST_F(PenaltyTest, RepetitionDividesPositiveAndMultipliesNegativeLogitsOfPromptAndOutput) {
  const SamplingParams params{.repetition_penalty = 2.0f};
  EXPECT_EQ(Greedy({4.0f, 4.0f, 4.0f, 2.01f}, params), 3);  // 2, 2, 2 against 2.01
  EXPECT_EQ(Greedy({4.0f, 4.0f, 4.0f, 1.99f}, params), 0);
  EXPECT_EQ(Greedy({-1.0f, -1.0f, -1.0f, -1.99f}, params), 3);  // -2, -2, -2
  EXPECT_EQ(Greedy({-1.0f, -1.0f, -1.0f, -2.01f}, params), 0);
  EXPECT_EQ(Greedy({1.0f, 1.0f, 1.0f, 1.5f}, {.repetition_penalty = 0.5f}), 0);  // a reward
}

TEST_F(PenaltyTest, PresenceCountsOnceAndOnlyTheOutput) {
  EXPECT_EQ(Greedy({3.0f, 3.9f, 3.9f, 0.0f}, {.presence_penalty = 1.0f}), 0);
  EXPECT_EQ(Greedy({3.0f, 4.1f, 3.9f, 0.0f}, {.presence_penalty = 1.0f}), 1);
  EXPECT_EQ(Greedy({3.0f, 0.0f, 4.1f, 0.0f}, {.presence_penalty = 1.0f}), 2);
}

TEST_F(PenaltyTest, FrequencyTimesTheCountInTheOutput) {
  EXPECT_EQ(Greedy({0.0f, 2.0f, 3.9f, 0.0f}, {.frequency_penalty = 1.0f}), 1);  // 1 against 0.9
  EXPECT_EQ(Greedy({0.0f, 2.0f, 4.1f, 0.0f}, {.frequency_penalty = 1.0f}), 2);
  EXPECT_EQ(Greedy({0.0f, 0.0f, 0.0f, 1.4f}, {.frequency_penalty = -0.5f}), 2);  // 1.5
}

TEST_F(PenaltyTest, AppendedOutputCounts) {
  EXPECT_EQ(Greedy({0.0f, 0.0f, 0.0f, 5.0f}, {.presence_penalty = 2.0f, .frequency_penalty = 2.0f}), 3);
  history_.AppendOutput(3);
  history_.AppendOutput(3);
  EXPECT_EQ(Greedy({0.0f, 0.0f, 0.0f, 5.0f}, {.presence_penalty = 2.0f, .frequency_penalty = 2.0f}), 0);
}

TEST_F(PenaltyTest, ResetForgets) {
  history_.Reset({.slot = 0, .prompt = {}, .output = {}});
  EXPECT_EQ(Greedy({0.0f, 1.0f, 2.0f, 1.5f}, {.repetition_penalty = 10.0f, .presence_penalty = 2.0f}), 2);
}

TEST_F(PenaltyTest, PenaltyThenBiasOnTheSameTokenIsRestoredAfterwards) {
  // 4 / 2 - 1 + 3 = 4 for token 1; Process checks that the row comes back unchanged.
  const SamplingParams params{.repetition_penalty = 2.0f, .presence_penalty = 1.0f, .logit_bias = {{1, 3.0f}}};
  EXPECT_EQ(Greedy({0.0f, 4.0f, 0.0f, 3.9f}, params), 1);
  EXPECT_EQ(Greedy({0.0f, 4.0f, 0.0f, 4.1f}, params), 3);
}

// --- Not finite ---

TEST(SamplerTest, NotFiniteLogitsFailTheRowAndNothingElse) {
  const SamplingParams params;
  for (const float bad : {kNan, kInfinity, -kInfinity}) {
    for (int place = 0; place < 5; ++place) {
      std::vector<float> logits = {1.0f, 2.0f, 3.0f, 4.0f, 5.0f};
      logits[place] = bad;
      const ResultRowOutput sampled = Process(logits, {.num_top_logprobs = 2, .params = &params});
      EXPECT_TRUE(sampled.failed);
      EXPECT_TRUE(sampled.top.empty());
      EXPECT_TRUE(Process(logits, {.target = 2, .num_top_logprobs = 2}).failed);
    }
  }
}

// --- Logprobs ---

TEST(LogprobTest, EqualTheDoubleLogSoftmaxOfRawLogitsWithRanks) {
  std::mt19937_64 random(7);
  for (int i = 0; i < 100; ++i) {
    const int size = 5 + static_cast<int>(random() % 3000);
    std::vector<float> logits = RandomLogits(random, size, 3.0f);
    for (int tie = 0; tie < 3; ++tie) logits[random() % size] = logits[random() % size];
    std::vector<TokenId> order(size);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](TokenId a, TokenId b) { return logits[a] > logits[b]; });
    double sum = 0.0;
    for (const float x : logits) sum += std::exp(double{x});
    const TokenId target = static_cast<TokenId>(random() % size);
    const ResultRowOutput output = Process(logits, {.target = target, .num_top_logprobs = 5});
    EXPECT_EQ(output.token_id, target);
    EXPECT_EQ(output.chosen.token_id, target);
    // 5e-6: two fp32 roundings of numbers below 32, half an ulp (1e-6) each, and exp in fp32.
    EXPECT_NEAR(output.chosen.logprob, logits[target] - std::log(sum), 5e-6);
    EXPECT_EQ(output.chosen.rank, std::find(order.begin(), order.end(), target) - order.begin() + 1);
    ASSERT_EQ(output.top.size(), 5u);
    for (int n = 0; n < 5; ++n) {
      EXPECT_EQ(output.top[n].token_id, order[n]);
      EXPECT_EQ(output.top[n].rank, n + 1);
      EXPECT_NEAR(output.top[n].logprob, logits[order[n]] - std::log(sum), 5e-6);
    }
  }
}

TEST(LogprobTest, AreOfTheRawLogitsWhateverTheParams) {
  const std::vector<float> logits = {1.0f, 2.0f, 3.0f, 4.0f};
  const SamplingParams plain{.temperature = 0.0f};
  const SamplingParams bent{.temperature = 0.3f, .top_k = 1, .logit_bias = {{3, 50.0f}}, .seed = 4};
  const ResultRowOutput a = Process(logits, {.num_top_logprobs = 4, .params = &plain});
  const ResultRowOutput b = Process(logits, {.num_top_logprobs = 4, .params = &bent});
  EXPECT_EQ(a.chosen, b.chosen);
  EXPECT_EQ(a.top, b.top);
}

TEST(LogprobTest, CountsAskForNothingChosenOrTop) {
  const std::vector<float> logits = {1.0f, 2.0f, 3.0f};
  const SamplingParams greedy{.temperature = 0.0f};
  EXPECT_EQ(Process(logits, {.params = &greedy}).chosen, TokenLogprob{});
  const ResultRowOutput chosen_only = Process(logits, {.num_top_logprobs = 0, .params = &greedy});
  EXPECT_EQ(chosen_only.chosen.token_id, 2);
  EXPECT_EQ(chosen_only.chosen.rank, 1);
  EXPECT_TRUE(chosen_only.top.empty());
  EXPECT_EQ(Process(logits, {.num_top_logprobs = 20, .params = &greedy}).top.size(), 3u);
}

TEST(LogprobTest, HugeLogitsDoNotOverflow) {
  const ResultRowOutput output = Process({3e38f, -3e38f, 3e38f}, {.target = 0, .num_top_logprobs = 1});
  EXPECT_FALSE(output.failed);
  EXPECT_NEAR(output.chosen.logprob, std::log(0.5), 1e-6);
}

}  // namespace
}  // namespace minitron::engine
