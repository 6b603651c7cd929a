#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/base/check.h"
#include "engine/philox.h"

namespace minitron::engine {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The order of tokens everywhere: higher logit first, then lower id.
struct Better {
  absl::Span<const float> logits;
  bool operator()(TokenId a, TokenId b) const { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); }
};

bool AllFinite(absl::Span<const float> logits) {
  bool finite = true;
  for (const float x : logits) finite &= std::abs(x) <= std::numeric_limits<float>::max();  // false for NaN
  return finite;
}

// In lanes: one chain of comparisons would wait for each of them.
float Maximum(absl::Span<const float> logits) {
  constexpr size_t kLanes = 16;
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -kInfinity);
  size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const float x = logits[i + lane];
      lanes[lane] = x > lanes[lane] ? x : lanes[lane];
    }
  }
  for (size_t lane = 0; i < logits.size(); ++i, ++lane) lanes[lane] = std::max(lanes[lane], logits[i]);
  return *std::max_element(lanes, lanes + kLanes);
}

TokenId ArgMax(absl::Span<const float> logits) {
  const float maximum = Maximum(logits);
  return static_cast<TokenId>(std::find(logits.begin(), logits.end(), maximum) - logits.begin());
}

// log-softmax of one row: logprob(i) = (x_i - max) - log(sum exp(x - max)), the sum in double in id order.
class LogSoftmax {
 public:
  explicit LogSoftmax(absl::Span<const float> logits) : logits_(logits), maximum_(Maximum(logits)) {
    double sum = 0.0;
    for (const float x : logits) sum += std::exp(x - maximum_);
    log_sum_ = static_cast<float>(std::log(sum));
  }

  TokenLogprob Of(TokenId token, int32_t rank) const { return {token, logits_[token] - maximum_ - log_sum_, rank}; }

  // 1 + how many tokens come before `token`.
  int32_t Rank(TokenId token) const {
    const float logit = logits_[token];
    int32_t better = 0;
    for (size_t i = 0; i < logits_.size(); ++i) better += logits_[i] > logit;
    for (TokenId i = 0; i < token; ++i) better += logits_[i] == logit;
    return better + 1;
  }

 private:
  absl::Span<const float> logits_;
  float maximum_;
  float log_sum_;
};

void FillLogprobs(absl::Span<const float> raw_logits, const ResultRow& row, SamplerScratch& scratch,
                  ResultRowOutput& output) {
  if (row.num_top_logprobs < 0) return;
  const LogSoftmax log_softmax(raw_logits);
  output.chosen = log_softmax.Of(output.token_id, log_softmax.Rank(output.token_id));
  SelectTop(raw_logits, row.num_top_logprobs, scratch.candidates);
  output.top.reserve(scratch.candidates.size());
  for (const TokenId token : scratch.candidates) {
    output.top.push_back(log_softmax.Of(token, static_cast<int32_t>(output.top.size()) + 1));
  }
}

// Changes logits in place and remembers what was there; restores it when destroyed.
class EditedLogits {
 public:
  EditedLogits(absl::Span<float> logits, std::vector<SamplerScratch::Edit>& edits) : logits_(logits), edits_(edits) {
    edits_.clear();
  }
  EditedLogits(const EditedLogits&) = delete;
  EditedLogits& operator=(const EditedLogits&) = delete;
  ~EditedLogits() {
    // Backwards: of several edits of one token, the first holds the raw value.
    for (auto edit = edits_.rbegin(); edit != edits_.rend(); ++edit) logits_[edit->token] = edit->raw_logit;
  }

  TokenId size() const { return static_cast<TokenId>(logits_.size()); }
  float Get(TokenId token) const { return logits_[token]; }
  void Set(TokenId token, float value) {
    CHECK(token >= 0 && static_cast<size_t>(token) < logits_.size());
    edits_.push_back({token, logits_[token]});
    logits_[token] = value;
  }

 private:
  absl::Span<float> logits_;
  std::vector<SamplerScratch::Edit>& edits_;
};

void ApplyPenalties(const SamplingParams& params, const TokenHistory& history, EditedLogits& logits) {
  for (const auto& [token, seen] : history.seen()) {  // any order: each token is changed on its own
    float logit = logits.Get(token);
    logit = logit > 0.0f ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    if (seen.output_count > 0) {
      logit -= params.frequency_penalty * static_cast<float>(seen.output_count);
      logit -= params.presence_penalty;
    }
    logits.Set(token, logit);
  }
}

void ApplyConstraint(absl::Span<const uint64_t> allowed, EditedLogits& logits) {
  for (TokenId token = 0; token < logits.size(); ++token) {
    const auto word = static_cast<size_t>(token) / 64;
    if (word >= allowed.size() || (allowed[word] >> (token % 64) & 1) == 0) logits.Set(token, -kInfinity);
  }
}

void ApplyEdits(const ResultRow& row, const TokenHistory* history, EditedLogits& logits) {
  const SamplingParams& params = *row.params;
  if (row.banned_tokens != nullptr) {
    for (const TokenId token : *row.banned_tokens) logits.Set(token, -kInfinity);
  }
  CHECK(history != nullptr || !params.NeedsHistory());
  if (params.constraint != nullptr) ApplyConstraint(history->AllowedTokens(), logits);
  if (params.HasPenalties()) ApplyPenalties(params, *history, logits);
  for (const auto& [token, bias] : params.logit_bias) logits.Set(token, logits.Get(token) + bias);
}

// Unnormalised probability of a logit: exp((x - max) / temperature), 1 for the most likely. Subtracting first keeps
// tiny temperatures from overflowing.
struct Weight {
  float maximum;
  float temperature;
  float operator()(float logit) const { return std::exp((logit - maximum) / temperature); }
};

// The id at which the running sum of weights(i), i = 0 .. count-1, first exceeds u * total.
template <typename WeightAt>
int64_t InverseCdf(int64_t count, double total, double u, const WeightAt& weight_at) {
  const double threshold = u * total;
  double sum = 0.0;
  int64_t last_possible = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float weight = weight_at(i);
    sum += weight;
    if (sum > threshold) return i;
    if (weight > 0.0f) last_possible = i;
  }
  return last_possible;  // u * total rounded up to the whole sum
}

// Cuts `candidates`, sorted best first, to the shortest head whose weight reaches top_p of `total`.
// Returns false if the candidates' weight does not reach it.
bool CutAtTopP(absl::Span<const float> logits, const Weight& weight, double total, float top_p,
               std::vector<TokenId>& candidates) {
  double sum = 0.0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    sum += weight(logits[candidates[i]]);
    if (sum >= static_cast<double>(top_p) * total) {
      candidates.resize(i + 1);
      return true;
    }
  }
  return false;
}

void FilterTopP(absl::Span<const float> logits, const Weight& weight, float top_p, std::vector<TokenId>& candidates) {
  double total = 0.0;
  for (const float x : logits) total += weight(x);
  // The head is short for a peaked distribution: look at ever larger heads instead of sorting the vocabulary.
  for (size_t k = 64; k < logits.size(); k *= 8) {
    SelectTop(logits, static_cast<int>(k), candidates);
    if (CutAtTopP(logits, weight, total, top_p, candidates)) return;
  }
  SelectTop(logits, static_cast<int>(logits.size()), candidates);
  CutAtTopP(logits, weight, total, top_p, candidates);
}

// Candidates after top-k, top-p and min-p, in id order. Requires one of them to be on.
void Filter(absl::Span<const float> logits, const SamplingParams& params, const Weight& weight,
            std::vector<TokenId>& candidates) {
  const bool has_top_k = params.top_k > 0 && static_cast<size_t>(params.top_k) < logits.size();
  candidates.clear();
  if (has_top_k) {
    SelectTop(logits, params.top_k, candidates);
    if (params.top_p < 1.0f) {
      double total = 0.0;
      for (const TokenId token : candidates) total += weight(logits[token]);
      CutAtTopP(logits, weight, total, params.top_p, candidates);
    }
  } else if (params.top_p < 1.0f) {
    FilterTopP(logits, weight, params.top_p, candidates);
  } else {
    for (size_t i = 0; i < logits.size(); ++i) {
      if (weight(logits[i]) >= params.min_p) candidates.push_back(static_cast<TokenId>(i));
    }
    return;
  }
  if (params.min_p > 0.0f) {  // the most likely token weighs 1
    std::erase_if(candidates, [&](TokenId token) { return weight(logits[token]) < params.min_p; });
  }
  std::sort(candidates.begin(), candidates.end());
}

TokenId Draw(absl::Span<const float> logits, const ResultRow& row, SamplerScratch& scratch) {
  const SamplingParams& params = *row.params;
  const Weight weight{Maximum(logits), params.temperature};
  const double u = UniformForPosition(params.seed, row.output_position);
  std::vector<float>& weights = scratch.weights;
  double total = 0.0;
  const auto weight_at = [&weights](int64_t i) { return weights[i]; };
  const bool keeps_all = (params.top_k <= 0 || static_cast<size_t>(params.top_k) >= logits.size()) &&
                         params.top_p >= 1.0f && params.min_p <= 0.0f;
  if (keeps_all) {
    weights.resize(logits.size());
    for (size_t i = 0; i < logits.size(); ++i) total += weights[i] = weight(logits[i]);
    return static_cast<TokenId>(InverseCdf(static_cast<int64_t>(weights.size()), total, u, weight_at));
  }
  Filter(logits, params, weight, scratch.candidates);
  weights.resize(scratch.candidates.size());
  for (size_t i = 0; i < weights.size(); ++i) total += weights[i] = weight(logits[scratch.candidates[i]]);
  return scratch.candidates[InverseCdf(static_cast<int64_t>(weights.size()), total, u, weight_at)];
}

}  // namespace

void TokenHistory::Reset(const HistoryReset& reset) {
  seen_.clear();
  for (const TokenId token : reset.prompt) seen_[token].in_prompt = true;
  walk_ = reset.constraint == nullptr ? nullptr : reset.constraint->NewWalk();
  for (const TokenId token : reset.output) AppendOutput(token);
}

void TokenHistory::AppendOutput(TokenId token) {
  ++seen_[token].output_count;
  if (walk_ != nullptr) walk_->Advance(token);
}

void SelectTop(absl::Span<const float> logits, int k, std::vector<TokenId>& out) {
  out.clear();
  const size_t limit = std::min(static_cast<size_t>(std::max(k, 0)), logits.size());
  if (limit == 0) return;
  const Better better{logits};
  // Keeps up to 2 * limit candidates above a rising floor, so that the vocabulary is read once and never sorted.
  float floor = -kInfinity;
  const auto keep_best = [&] {
    if (out.size() <= limit) return;
    std::nth_element(out.begin(), out.begin() + static_cast<int64_t>(limit) - 1, out.end(), better);
    out.resize(limit);
    floor = logits[out.back()];
  };
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] < floor || (logits[i] == floor && floor > -kInfinity)) continue;  // an equal one has a higher id
    out.push_back(static_cast<TokenId>(i));
    if (out.size() >= 2 * limit) keep_best();
  }
  keep_best();
  std::sort(out.begin(), out.end(), better);
}

ResultRowOutput ProcessRow(absl::Span<float> logits, const ResultRow& row, const TokenHistory* history,
                           SamplerScratch& scratch) {
  ResultRowOutput output;
  output.token_id = row.target == kNone ? 0 : row.target;
  if (!AllFinite(logits)) {
    output.failed = true;
    return output;
  }
  if (row.target != kNone) {
    CHECK(row.target >= 0 && static_cast<size_t>(row.target) < logits.size());
  } else {
    CHECK(row.params != nullptr);
    EditedLogits edited(logits, scratch.edits);
    ApplyEdits(row, history, edited);
    // Every token banned, or penalties beyond fp32: there is nothing to choose from.
    if (!std::isfinite(Maximum(logits))) {
      output.failed = true;
      return output;
    }
    output.token_id = row.params->temperature == 0.0f ? ArgMax(logits) : Draw(logits, row, scratch);
  }
  FillLogprobs(logits, row, scratch, output);
  return output;
}

}  // namespace minitron::engine
