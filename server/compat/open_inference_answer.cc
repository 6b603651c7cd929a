#include "server/compat/open_inference_answer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "server/compat/open_inference_tensors.h"

namespace minitron::server::compat {

InferAnswer::InferAnswer(InferOptions options, int num_sequences, const ServedModel* model)
    : options_(std::move(options)), model_(model), sequences_(static_cast<size_t>(num_sequences)) {
  for (Sequence& sequence : sequences_) sequence.text = options_.prepended_text;
}

void InferAnswer::Add(const StartedEvent& event) { num_prompt_tokens_ = event.num_prompt_tokens; }

void InferAnswer::Add(DeltaEvent event) {
  Sequence& sequence = sequences_[static_cast<size_t>(event.index)];
  sequence.text += event.text;
  has_news_ = true;
  if (!event.token.has_value()) return;
  sequence.cumulative_logprob += event.token->chosen.logprob;
  sequence.tokens.push_back(*std::move(event.token));
}

void InferAnswer::Add(const FinishedEvent& event) {
  sequences_[static_cast<size_t>(event.index)].finish_reason =
      event.reason == FinishedEvent::Reason::kLength ? "length" : "stop";
  has_news_ = has_news_ || options_.finish_reason;
}

void InferAnswer::TakeNothing(inference::ModelInferResponse& out) const {
  out.set_model_name(model_->name);
  out.set_model_version(kModelVersion);
  out.set_id(options_.id);
}

void InferAnswer::Take(inference::ModelInferResponse& out) {
  TakeNothing(out);
  std::vector<std::string> texts;
  std::vector<std::string> reasons;
  for (Sequence& sequence : sequences_) {
    texts.push_back(std::move(sequence.text));
    reasons.emplace_back(sequence.finish_reason);
  }
  if (options_.Wants("text_output")) AddBytes("text_output", texts, out);
  if (options_.finish_reason && options_.Wants("finish_reason")) AddBytes("finish_reason", reasons, out);
  AddLogprobTensors(out);
  AddCountTensors(out);
  if (options_.requested.count("batch_index") > 0) AddInt32("batch_index", {0}, out);
  for (Sequence& sequence : sequences_) {
    sequence.text.clear();
    sequence.tokens.clear();
  }
  has_news_ = false;
}

void InferAnswer::AddLogprobTensors(inference::ModelInferResponse& out) const {
  const auto num_sequences = static_cast<int64_t>(sequences_.size());
  std::vector<float> sums;
  std::vector<std::string> json;
  size_t longest = 0;
  for (const Sequence& sequence : sequences_) {
    sums.push_back(static_cast<float>(sequence.cumulative_logprob));
    if (options_.logprobs) json.push_back(LogprobsJson(sequence));
    longest = std::max(longest, sequence.tokens.size());
  }
  if (options_.cumulative_logprob && options_.Wants("cumulative_logprob")) {
    AddFloats("cumulative_logprob", {num_sequences}, sums, out);
  }
  if (options_.logprobs && options_.Wants("logprobs")) AddBytes("logprobs", json, out);
  if (!options_.output_log_probs) return;
  if (options_.Wants("cum_log_probs")) AddFloats("cum_log_probs", {num_sequences}, sums, out);
  if (!options_.Wants("output_log_probs")) return;
  // A tensor has no ragged rows: sequences with fewer new tokens than the longest end in zeros.
  std::vector<float> rows(sequences_.size() * longest, 0.0f);
  for (size_t i = 0; i < sequences_.size(); ++i) {
    for (size_t t = 0; t < sequences_[i].tokens.size(); ++t) {
      rows[i * longest + t] = sequences_[i].tokens[t].chosen.logprob;
    }
  }
  AddFloats("output_log_probs", {num_sequences, static_cast<int64_t>(longest)}, rows, out);
}

void InferAnswer::AddCountTensors(inference::ModelInferResponse& out) const {
  if (options_.num_input_tokens && options_.Wants("num_input_tokens")) {
    AddUint32("num_input_tokens", {static_cast<uint32_t>(num_prompt_tokens_)}, out);
  }
  if (!options_.num_output_tokens || !options_.Wants("num_output_tokens")) return;
  std::vector<uint32_t> counts;
  counts.reserve(sequences_.size());
  for (const Sequence& sequence : sequences_) counts.push_back(static_cast<uint32_t>(sequence.tokens.size()));
  AddUint32("num_output_tokens", counts, out);
}

// One object per token: {"<id>": {"logprob", "rank", "decoded_token"}}, the chosen token and its alternatives.
std::string InferAnswer::LogprobsJson(const Sequence& sequence) const {
  auto positions = nlohmann::ordered_json::array();
  for (const engine::ResultRowOutput& row : sequence.tokens) {
    nlohmann::ordered_json position = nlohmann::ordered_json::object();
    const auto add = [&](const engine::TokenLogprob& token) {
      position[std::to_string(token.token_id)] = {
          {"logprob", token.logprob},
          {"rank", token.rank},
          {"decoded_token", model_->tokenizer->TokenBytes(token.token_id, /*skip_special=*/false)}};
    };
    add(row.chosen);
    for (const engine::TokenLogprob& token : row.top) add(token);
    positions.push_back(std::move(position));
  }
  // A token may be half a character: what is not UTF-8 becomes U+FFFD.
  return positions.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace minitron::server::compat
