#include "server/compat/vllm_request.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/grpc_status.h"

namespace minitron::server::compat {
namespace {

constexpr uint32_t kDefaultMaxNewTokens = 20;  // what unset means in vllm.Inference

absl::Status Unsupported(const std::string& field) { return FieldError(field, "is not supported"); }

// Zero is what a client that says nothing sends, and none of these fields does anything at zero.
template <typename Value, typename Set>
void SetUnlessZero(Value value, const Set& set) {
  if (value != 0) set(value);
}

// Lower runs first in vLLM, higher here. Whatever is out of range stays so.
int32_t Negate(int32_t priority) {
  return priority == std::numeric_limits<int32_t>::min() ? std::numeric_limits<int32_t>::max() : -priority;
}

absl::Status CheckUnused(const ::vllm::GenerateRequest& request) {
  if (request.media_size() > 0) return Unsupported("media");
  if (!request.lora_name().empty()) return Unsupported("lora_name");
  if (request.kv().has_kv_transfer_params()) return Unsupported("kv.kv_transfer_params");
  if (request.kv().has_ec_transfer_params()) return Unsupported("kv.ec_transfer_params");
  if (request.decoding().allowed_token_ids_size() > 0) return Unsupported("decoding.allowed_token_ids");
  return absl::OkStatus();
}

absl::Status ReadConstraint(const ::vllm::DecodingParameters& decoding, v1::GenerationTask& task) {
  using Decoding = ::vllm::DecodingParameters;
  switch (decoding.structured_output_case()) {
    case Decoding::STRUCTURED_OUTPUT_NOT_SET:
      break;
    case Decoding::kJson:
      task.mutable_constraint()->set_json_schema(decoding.json());
      break;
    case Decoding::kRegex:
      task.mutable_constraint()->set_regex(decoding.regex());
      break;
    case Decoding::kChoice:
      *task.mutable_constraint()->mutable_choices()->mutable_options() = decoding.choice().choices();
      break;
    case Decoding::kJsonObject:
      if (decoding.json_object()) task.mutable_constraint()->set_json_object(true);
      break;
    case Decoding::kGrammar:
      task.mutable_constraint()->set_grammar(decoding.grammar());
      break;
    case Decoding::kStructuralTag:
      return Unsupported("decoding.structural_tag");
  }
  return absl::OkStatus();
}

// How many of the likeliest tokens are asked for; unset is 0.
absl::StatusOr<uint32_t> TopTokens(const std::string& field, const ::vllm::CandidateTokens& candidates) {
  if (candidates.has_token_ids()) return Unsupported(field + ".token_ids");
  if (candidates.has_all() && candidates.all()) return Unsupported(field + ".all");
  return candidates.top_n();
}

absl::Status ReadResponseOptions(const ::vllm::ResponseOptions& response, VllmTask& result) {
  VllmOptions& options = result.options;
  v1::OutputConfig& output = *result.task.mutable_output();
  options.prompt_token_ids = response.prompt_token_ids();
  options.prompt_logprobs = response.prompt_logprobs();
  options.prompt_candidates = response.has_prompt_candidates();
  options.output_text = !response.has_output_text() || response.output_text();
  options.output_token_ids = response.output_token_ids();
  options.output_logprobs = response.output_logprobs();
  options.output_candidates = response.has_output_candidates();
  if (options.prompt_logprobs || options.prompt_candidates) {
    ASSIGN_OR_RETURN(const uint32_t top, TopTokens("response.prompt_candidates", response.prompt_candidates()));
    output.set_prompt_logprobs(top);
  }
  if (options.output_logprobs || options.output_candidates) {
    ASSIGN_OR_RETURN(const uint32_t top, TopTokens("response.output_candidates", response.output_candidates()));
    output.set_logprobs(top);
  }
  if (response.has_skip_special_tokens()) output.set_skip_special_tokens(response.skip_special_tokens());
  return absl::OkStatus();
}

void ReadSampling(const ::vllm::GenerateRequest& request, v1::SamplingConfig& sampling) {
  sampling.set_temperature(request.temperature());  // unset is 0, greedy
  const ::vllm::RandomSampling& random = request.sampling();
  sampling.set_num_sequences(random.num_sequences());
  SetUnlessZero(random.top_k(), [&](uint32_t k) { sampling.set_top_k(k); });
  SetUnlessZero(random.top_p(), [&](float p) { sampling.set_top_p(p); });
  SetUnlessZero(random.min_p(), [&](float p) { sampling.set_min_p(p); });
  if (random.has_seed()) sampling.set_seed(static_cast<uint64_t>(random.seed()));
  const ::vllm::DecodingParameters& decoding = request.decoding();
  SetUnlessZero(decoding.presence_penalty(), [&](float p) { sampling.set_presence_penalty(p); });
  SetUnlessZero(decoding.frequency_penalty(), [&](float p) { sampling.set_frequency_penalty(p); });
  SetUnlessZero(decoding.repetition_penalty(), [&](float p) { sampling.set_repetition_penalty(p); });
  *sampling.mutable_logit_bias() = decoding.logit_bias();
}

void ReadStopping(const ::vllm::StoppingCriteria& from, v1::StoppingConfig& stopping) {
  stopping.set_max_tokens(from.max_new_tokens() == 0 ? kDefaultMaxNewTokens : from.max_new_tokens());
  stopping.set_min_tokens(from.min_new_tokens());
  *stopping.mutable_stop_token_ids() = from.stop_token_ids();
  *stopping.mutable_stop_sequences() = from.stop_strings();
  stopping.set_include_stop_sequence(from.include_stop_strings());
  stopping.set_ignore_eos(from.ignore_eos());
}

using ::vllm::grpc::engine::SamplingParams;

absl::Status CheckUnused(const ::vllm::grpc::engine::GenerateRequest& request) {
  if (request.has_kv_transfer_params()) return Unsupported("kv_transfer_params");
  if (request.has_kv_transfer_params_json()) return Unsupported("kv_transfer_params_json");
  if (request.has_mm_inputs()) return Unsupported("mm_inputs");
  if (request.data_parallel_rank() != 0) {
    return FieldError("data_parallel_rank", absl::StrCat(request.data_parallel_rank(), " is not there, only 0 is"),
                      {{"value", absl::StrCat(request.data_parallel_rank())}, {"limit", "0"}});
  }
  return absl::OkStatus();
}

absl::Status ReadConstraint(const SamplingParams& params, v1::GenerationTask& task) {
  switch (params.constraint_case()) {
    case SamplingParams::CONSTRAINT_NOT_SET:
      break;
    case SamplingParams::kJsonSchema:
      task.mutable_constraint()->set_json_schema(params.json_schema());
      break;
    case SamplingParams::kRegex:
      task.mutable_constraint()->set_regex(params.regex());
      break;
    case SamplingParams::kChoice:
      *task.mutable_constraint()->mutable_choices()->mutable_options() = params.choice().choices();
      break;
    case SamplingParams::kJsonObject:
      if (params.json_object()) task.mutable_constraint()->set_json_object(true);
      break;
    case SamplingParams::kGrammar:
      task.mutable_constraint()->set_grammar(params.grammar());
      break;
    case SamplingParams::kStructuralTag:
      return Unsupported("sampling_params.structural_tag");
  }
  return absl::OkStatus();
}

// A count that is signed on the wire.
absl::StatusOr<uint32_t> Count(const char* field, int32_t value) {
  if (value >= 0) return static_cast<uint32_t>(value);
  return FieldError(absl::StrCat("sampling_params.", field), absl::StrCat(value, " below 0"),
                    {{"value", absl::StrCat(value)}, {"limit", "0"}});
}

absl::Status ReadEngineSampling(const SamplingParams& params, v1::SamplingConfig& sampling) {
  if (params.has_temperature()) sampling.set_temperature(params.temperature());
  SetUnlessZero(params.top_p(), [&](float p) { sampling.set_top_p(p); });
  SetUnlessZero(params.top_k(), [&](uint32_t k) { sampling.set_top_k(k); });
  SetUnlessZero(params.min_p(), [&](float p) { sampling.set_min_p(p); });
  SetUnlessZero(params.frequency_penalty(), [&](float p) { sampling.set_frequency_penalty(p); });
  SetUnlessZero(params.presence_penalty(), [&](float p) { sampling.set_presence_penalty(p); });
  SetUnlessZero(params.repetition_penalty(), [&](float p) { sampling.set_repetition_penalty(p); });
  sampling.set_num_sequences(params.n());
  if (params.has_seed()) sampling.set_seed(static_cast<uint64_t>(int64_t{params.seed()}));
  for (const auto& [id, bias] : params.logit_bias()) {
    ASSIGN_OR_RETURN(const uint32_t token, Count("logit_bias", id));
    (*sampling.mutable_logit_bias())[token] = bias;
  }
  return absl::OkStatus();
}

absl::Status ReadEngineOutput(const SamplingParams& params, v1::OutputConfig& output) {
  output.set_skip_special_tokens(params.skip_special_tokens());
  if (params.has_logprobs()) {
    ASSIGN_OR_RETURN(const uint32_t top, Count("logprobs", params.logprobs()));
    output.set_logprobs(top);
  }
  if (params.has_prompt_logprobs()) {
    ASSIGN_OR_RETURN(const uint32_t top, Count("prompt_logprobs", params.prompt_logprobs()));
    output.set_prompt_logprobs(top);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<VllmTask> ReadVllmRequest(const ::vllm::GenerateRequest& request, const std::string& fresh_salt) {
  RETURN_IF_ERROR(CheckUnused(request));
  VllmTask result;
  v1::GenerationTask& task = result.task;
  task.set_request_id(request.request_id());
  task.set_model(request.model());
  if (request.has_text()) task.set_text(request.text());
  if (request.has_token_ids()) *task.mutable_token_ids()->mutable_ids() = request.token_ids().ids();
  ReadSampling(request, *task.mutable_sampling());
  ReadStopping(request.stopping(), *task.mutable_stopping());
  RETURN_IF_ERROR(ReadResponseOptions(request.response(), result));
  RETURN_IF_ERROR(ReadConstraint(request.decoding(), task));
  task.set_cache_salt(request.kv().bypass_prefix_cache() ? fresh_salt : request.kv().cache_salt());
  task.set_truncate_prompt_tokens(request.truncate_prompt_tokens());
  task.set_priority(Negate(request.priority()));
  return result;
}

absl::StatusOr<v1::GenerationTask> ReadEngineRequest(const ::vllm::grpc::engine::GenerateRequest& request,
                                                     int max_context_tokens) {
  RETURN_IF_ERROR(CheckUnused(request));
  const SamplingParams& params = request.sampling_params();
  v1::GenerationTask task;
  task.set_request_id(request.request_id());
  if (request.has_text()) task.set_text(request.text());
  if (request.has_tokenized()) *task.mutable_token_ids()->mutable_ids() = request.tokenized().input_ids();
  RETURN_IF_ERROR(ReadEngineSampling(params, *task.mutable_sampling()));
  RETURN_IF_ERROR(ReadEngineOutput(params, *task.mutable_output()));
  RETURN_IF_ERROR(ReadConstraint(params, task));
  v1::StoppingConfig& stopping = *task.mutable_stopping();
  if (params.has_max_tokens()) stopping.set_max_tokens(params.max_tokens());
  stopping.set_min_tokens(params.min_tokens());
  *stopping.mutable_stop_sequences() = params.stop();
  *stopping.mutable_stop_token_ids() = params.stop_token_ids();
  stopping.set_ignore_eos(params.ignore_eos());
  if (params.has_truncate_prompt_tokens()) {
    const int32_t keep = params.truncate_prompt_tokens() == -1 ? max_context_tokens : params.truncate_prompt_tokens();
    ASSIGN_OR_RETURN(const uint32_t count, Count("truncate_prompt_tokens", keep));
    task.set_truncate_prompt_tokens(count);
  }
  return task;
}

}  // namespace minitron::server::compat
