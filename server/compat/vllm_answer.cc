#include "server/compat/vllm_answer.h"

namespace minitron::server::compat {
namespace {

namespace vllm_engine = ::vllm::grpc::engine;

// The likeliest tokens but the one that is there.
void FillCandidates(const engine::ResultRowOutput& row, ::vllm::CandidateTokenInfo& out) {
  for (const engine::TokenLogprob& entry : row.top) {
    if (entry.token_id == row.chosen.token_id) continue;
    auto& token = *out.add_tokens();
    token.set_id(static_cast<uint32_t>(entry.token_id));
    token.set_logprob(entry.logprob);
    token.set_rank(static_cast<uint32_t>(entry.rank));
  }
}

void FillTop(const engine::ResultRowOutput& row, vllm_engine::TopLogProbs& out) {
  for (const engine::TokenLogprob& entry : row.top) {
    out.add_values(entry.logprob);
    out.add_token_ids(static_cast<uint32_t>(entry.token_id));
  }
}

}  // namespace

::vllm::PromptInfo ToPromptInfo(const StartedEvent& event, const VllmOptions& options,
                                const std::vector<engine::TokenId>& prompt) {
  ::vllm::PromptInfo info;
  info.set_num_prompt_tokens(static_cast<uint32_t>(event.num_prompt_tokens));
  if (options.prompt_token_ids) info.mutable_token_ids()->Add(prompt.begin(), prompt.end());
  // Nothing stands before the first token: its place in each list is there, and empty.
  if (options.prompt_logprobs) {
    info.add_logprobs(0);
    info.add_ranks(0);
  }
  if (options.prompt_candidates) info.add_candidate_tokens();
  for (const engine::ResultRowOutput& row : event.prompt_logprobs) {
    if (options.prompt_logprobs) {
      info.add_logprobs(row.chosen.logprob);
      info.add_ranks(static_cast<uint32_t>(row.chosen.rank));
    }
    if (options.prompt_candidates) FillCandidates(row, *info.add_candidate_tokens());
  }
  return info;
}

void Append(const DeltaEvent& event, const VllmOptions& options, ::vllm::SequenceOutput& out) {
  out.set_index(static_cast<uint32_t>(event.index));
  if (options.output_text) out.mutable_text()->append(event.text);
  if (!event.token.has_value()) return;
  const engine::ResultRowOutput& row = *event.token;
  out.set_num_tokens(out.num_tokens() + 1);
  if (options.output_token_ids) out.add_token_ids(static_cast<uint32_t>(row.token_id));
  if (options.output_logprobs) {
    out.add_logprobs(row.chosen.logprob);
    out.add_ranks(static_cast<uint32_t>(row.chosen.rank));
  }
  if (options.output_candidates) FillCandidates(row, *out.add_candidate_tokens());
}

::vllm::FinishInfo ToFinishInfo(const FinishedEvent& event) {
  using Reason = FinishedEvent::Reason;
  ::vllm::FinishInfo info;
  info.set_num_output_tokens(static_cast<uint32_t>(event.num_output_tokens));
  info.set_finish_reason(event.reason == Reason::kLength ? ::vllm::FinishInfo::LENGTH : ::vllm::FinishInfo::STOP);
  if (event.reason == Reason::kStopToken) info.set_stop_token_id(static_cast<uint32_t>(event.stop_token));
  if (event.reason == Reason::kEosToken) info.set_eos_token_id(static_cast<uint32_t>(event.stop_token));
  if (event.reason == Reason::kStopSequence) info.set_stop_string(event.stop_sequence);
  return info;
}

vllm_engine::InputLogProbs ToInputLogProbs(const StartedEvent& event, const std::vector<engine::TokenId>& prompt) {
  vllm_engine::InputLogProbs out;
  out.mutable_token_ids()->Add(prompt.begin(), prompt.end());
  out.add_token_logprobs();  // nothing stands before the first token
  out.add_top_logprobs();
  for (const engine::ResultRowOutput& row : event.prompt_logprobs) {
    out.add_token_logprobs()->set_value(row.chosen.logprob);
    FillTop(row, *out.add_top_logprobs());
  }
  return out;
}

void Append(const engine::ResultRowOutput& row, vllm_engine::OutputLogProbs& out) {
  out.add_token_logprobs(row.chosen.logprob);
  out.add_token_ids(static_cast<uint32_t>(row.token_id));
  FillTop(row, *out.add_top_logprobs());
}

void Describe(const FinishedEvent& event, vllm_engine::GenerateComplete& out) {
  using Reason = FinishedEvent::Reason;
  out.set_index(static_cast<uint32_t>(event.index));
  out.set_finish_reason(event.reason == Reason::kLength ? "length" : "stop");
  out.set_prompt_tokens(static_cast<uint32_t>(event.num_prompt_tokens));
  out.set_completion_tokens(static_cast<uint32_t>(event.num_output_tokens));
  out.set_cached_tokens(static_cast<uint32_t>(event.num_cached_tokens));
  if (event.reason == Reason::kStopToken) out.set_matched_token_id(static_cast<uint32_t>(event.stop_token));
  if (event.reason == Reason::kStopSequence) out.set_matched_stop_str(event.stop_sequence);
}

}  // namespace minitron::server::compat
