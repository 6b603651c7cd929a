#include "server/request_builder.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>
#include <unordered_set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/grpc_status.h"
#include "server/limits.h"

namespace minitron::server {
namespace {

using engine::SamplingParams;
using engine::TokenId;

absl::Status CheckInt(const IntLimit& limit, int64_t value) {
  if (value >= limit.min && value <= limit.max) return absl::OkStatus();
  return FieldError(
      limit.field, absl::StrCat(value, " outside [", limit.min, ", ", limit.max, "]"),
      {{"value", absl::StrCat(value)}, {"limit", absl::StrCat(value < limit.min ? limit.min : limit.max)}});
}

// As CheckInt, for how many of something there are.
absl::Status CheckCount(const IntLimit& limit, int64_t count, const char* unit) {
  if (count >= limit.min && count <= limit.max) return absl::OkStatus();
  return FieldError(
      limit.field, absl::StrCat(count, " ", unit, ", allowed are ", limit.min, " to ", limit.max),
      {{"actual", absl::StrCat(count)}, {"limit", absl::StrCat(count < limit.min ? limit.min : limit.max)}});
}

// As few digits as tell it from its neighbours: "2.0000002", never "2 outside [0, 2]".
std::string Shortest(float value) {
  char text[32];
  return std::string(text, std::to_chars(std::begin(text), std::end(text), value).ptr);
}

// Returns the value, with -0.0 made +0.0 so that it cannot tell the engine anything.
absl::StatusOr<float> CheckFloat(const FloatLimit& limit, float value) {
  const bool above_min = limit.min_exclusive ? value > limit.min : value >= static_cast<float>(limit.min);
  if (std::isfinite(value) && above_min && value <= limit.max) return value == 0.0f ? 0.0f : value;
  const bool is_low = !above_min && !std::isnan(value);
  return FieldError(
      limit.field,
      absl::StrCat(Shortest(value), " outside ", limit.min_exclusive ? "(" : "[", limit.min, ", ", limit.max, "]"),
      {{"value", Shortest(value)}, {"limit", absl::StrCat(is_low ? limit.min : limit.max)}});
}

absl::Status CheckTokenId(const char* field, uint32_t id, int vocab_size) {
  if (id < static_cast<uint32_t>(vocab_size)) return absl::OkStatus();
  return FieldError(field, absl::StrCat("token id ", id, " outside [0, ", vocab_size, ")"),
                    {{"value", absl::StrCat(id)}, {"limit", absl::StrCat(vocab_size - 1)}});
}

absl::Status CheckTextBytes(const char* field, int64_t num_bytes) {
  return CheckCount({field, 0, limits::kMaxTextBytes}, num_bytes, "bytes");
}

absl::StatusOr<std::vector<TokenId>> ReadIds(const char* field, const google::protobuf::RepeatedField<uint32_t>& ids,
                                             const ServedModel& model) {
  RETURN_IF_ERROR(CheckCount({field, 0, limits::kMaxTokenIds}, ids.size(), "token ids"));
  for (const uint32_t id : ids) RETURN_IF_ERROR(CheckTokenId(field, id, model.info.vocab_size));
  return std::vector<TokenId>(ids.begin(), ids.end());
}

EncodeOptions MakeEncodeOptions(const v1::TokenizeOptions& options, const ServedModel& model) {
  EncodeOptions result;
  result.add_bos = options.has_add_bos() ? options.add_bos() : model.default_add_bos;
  result.parse_special = options.parse_special();
  return result;
}

absl::Status CheckBos(const EncodeOptions& options, const ServedModel& model) {
  if (!options.add_bos || model.tokenizer->bos_id() >= 0) return absl::OkStatus();
  return FieldError("tokenize_options.add_bos", "the model's tokenizer has no BOS token");
}

absl::StatusOr<std::vector<TokenId>> EncodeText(const char* field, const std::string& text,
                                                const v1::TokenizeOptions& options, const ServedModel& model) {
  RETURN_IF_ERROR(CheckTextBytes(field, static_cast<int64_t>(text.size())));
  const EncodeOptions encode_options = MakeEncodeOptions(options, model);
  RETURN_IF_ERROR(CheckBos(encode_options, model));
  return model.tokenizer->Encode(text, encode_options);
}

absl::StatusOr<std::vector<TokenId>> ReadPrompt(const v1::GenerationTask& task, const ServedModel& model) {
  std::vector<TokenId> ids;
  switch (task.prompt_case()) {
    case v1::GenerationTask::kText: {
      ASSIGN_OR_RETURN(ids, EncodeText("text", task.text(), task.tokenize_options(), model));
      break;
    }
    case v1::GenerationTask::kTokenIds: {
      ASSIGN_OR_RETURN(ids, ReadIds("token_ids", task.token_ids().ids(), model));
      break;
    }
    case v1::GenerationTask::PROMPT_NOT_SET:
      return FieldError("prompt", "neither text nor token_ids is set");
  }
  if (ids.empty())
    return FieldError("prompt", "has no tokens, at least 1 is needed", {{"actual", "0"}, {"limit", "1"}});
  const size_t keep = task.truncate_prompt_tokens();
  if (keep > 0 && ids.size() > keep) ids.erase(ids.begin(), ids.end() - static_cast<int64_t>(keep));
  return ids;
}

absl::Status TooLong(const char* field, const std::string& message, int64_t actual, int64_t limit) {
  return FieldError(field, message, {{"actual", absl::StrCat(actual)}, {"limit", absl::StrCat(limit)}},
                    reason::kPromptTooLong);
}

// Only the ranges; what depends on the vocabulary is checked with the model at hand.
absl::Status ReadSampling(const v1::SamplingConfig& config, const ServedModel& model, SamplingParams& params) {
  const engine::GenerationDefaults& defaults = model.defaults;
  const auto read = [](bool is_set, float value, float fallback, const FloatLimit& limit, float& out) -> absl::Status {
    ASSIGN_OR_RETURN(out, CheckFloat(limit, is_set ? value : fallback));
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(read(config.has_temperature(), config.temperature(), defaults.temperature, limits::kTemperature,
                       params.temperature));
  RETURN_IF_ERROR(read(config.has_top_p(), config.top_p(), defaults.top_p, limits::kTopP, params.top_p));
  RETURN_IF_ERROR(read(config.has_min_p(), config.min_p(), 0.0f, limits::kMinP, params.min_p));
  RETURN_IF_ERROR(read(config.has_repetition_penalty(), config.repetition_penalty(), 1.0f, limits::kRepetitionPenalty,
                       params.repetition_penalty));
  RETURN_IF_ERROR(read(config.has_presence_penalty(), config.presence_penalty(), 0.0f, limits::kPresencePenalty,
                       params.presence_penalty));
  RETURN_IF_ERROR(read(config.has_frequency_penalty(), config.frequency_penalty(), 0.0f, limits::kFrequencyPenalty,
                       params.frequency_penalty));
  const int64_t top_k = config.has_top_k() ? config.top_k() : defaults.top_k;
  RETURN_IF_ERROR(CheckInt({"sampling.top_k", 0, model.info.vocab_size}, top_k));
  params.top_k = static_cast<int32_t>(top_k);
  RETURN_IF_ERROR(CheckInt(limits::kNumSequences, config.num_sequences()));
  RETURN_IF_ERROR(CheckCount(limits::kLogitBiasEntries, static_cast<int64_t>(config.logit_bias().size()), "entries"));
  for (const auto& [id, bias] : config.logit_bias()) {
    RETURN_IF_ERROR(CheckTokenId(limits::kLogitBias.field, id, model.info.vocab_size));
    ASSIGN_OR_RETURN(const float checked, CheckFloat(limits::kLogitBias, bias));
    params.logit_bias.emplace_back(static_cast<TokenId>(id), checked);
  }
  // A map has no order; the engine gets one, so that equal requests are equal in memory too.
  std::sort(params.logit_bias.begin(), params.logit_bias.end());
  return absl::OkStatus();
}

absl::Status ReadStopping(const v1::StoppingConfig& config, const ServedModel& model, BuiltRequest& built) {
  scheduler::Request& request = built.request;
  const int64_t prompt = static_cast<int64_t>(request.prompt_token_ids.size());
  const int64_t context = model.info.max_context_tokens;
  if (prompt >= context) {
    return TooLong("prompt",
                   absl::StrCat(prompt, " tokens, at most ", context - 1, " leave room for a completion in ",
                                "the context of ", context),
                   prompt, context - 1);
  }
  int64_t max_tokens = std::min<int64_t>(context - prompt, model.default_max_tokens);
  if (config.has_max_tokens()) {
    max_tokens = config.max_tokens();
    if (max_tokens < 1) return FieldError("stopping.max_tokens", "0 below 1", {{"value", "0"}, {"limit", "1"}});
    if (max_tokens > context - prompt) {
      return TooLong(
          "stopping.max_tokens",
          absl::StrCat(prompt, " prompt tokens and ", max_tokens, " to generate exceed ", "the context of ", context),
          prompt + max_tokens, context);
    }
  }
  RETURN_IF_ERROR(CheckInt({"stopping.min_tokens", 0, max_tokens}, config.min_tokens()));
  RETURN_IF_ERROR(CheckCount(limits::kStopTokenIds, config.stop_token_ids_size(), "ids"));
  for (const uint32_t id : config.stop_token_ids()) {
    RETURN_IF_ERROR(CheckTokenId(limits::kStopTokenIds.field, id, model.info.vocab_size));
  }
  RETURN_IF_ERROR(CheckCount(limits::kStopSequences, config.stop_sequences_size(), "strings"));
  for (const std::string& stop : config.stop_sequences()) {
    RETURN_IF_ERROR(CheckCount(limits::kStopSequenceBytes, static_cast<int64_t>(stop.size()), "bytes"));
  }
  request.max_tokens = static_cast<int>(max_tokens);
  request.min_tokens = static_cast<int>(config.min_tokens());
  request.stop_token_ids.assign(config.stop_token_ids().begin(), config.stop_token_ids().end());
  if (!config.ignore_eos()) request.eos_token_ids = model.info.eos_token_ids;
  built.spec.min_tokens = request.min_tokens;
  built.spec.stop_sequences.assign(config.stop_sequences().begin(), config.stop_sequences().end());
  built.spec.include_stop_sequence = config.include_stop_sequence();
  return absl::OkStatus();
}

absl::Status ReadOutput(const v1::OutputConfig& config, BuiltRequest& built) {
  if (config.has_logprobs()) {
    RETURN_IF_ERROR(CheckInt(limits::kLogprobs, config.logprobs()));
    built.request.num_top_logprobs = static_cast<int>(config.logprobs());
  }
  if (config.has_prompt_logprobs()) {
    RETURN_IF_ERROR(CheckInt(limits::kPromptLogprobs, config.prompt_logprobs()));
    built.request.num_prompt_top_logprobs = static_cast<int>(config.prompt_logprobs());
  }
  built.send_token_ids = !config.has_token_ids() || config.token_ids();
  built.spec.skip_special_tokens = !config.has_skip_special_tokens() || config.skip_special_tokens();
  return absl::OkStatus();
}

// The fields that generating and scoring share.
template <typename Message>
absl::Status ReadCommon(const Message& message, const CallContext& context, BuiltRequest& built) {
  RETURN_IF_ERROR(CheckPrintable(limits::kRequestIdBytes.field, message.request_id(), limits::kRequestIdBytes.max));
  RETURN_IF_ERROR(CheckPrintable("x-request-id", context.request_id, limits::kRequestIdBytes.max));
  RETURN_IF_ERROR(CheckPrintable(limits::kTenantBytes.field, context.tenant, limits::kTenantBytes.max));
  RETURN_IF_ERROR(CheckCount(limits::kCacheSaltBytes, static_cast<int64_t>(message.cache_salt().size()), "bytes"));
  RETURN_IF_ERROR(CheckInt(limits::kPriority, message.priority()));
  built.request.priority = message.priority();
  built.request.cache_salt = message.cache_salt();
  built.request.tenant = context.tenant;
  built.request.arrival = context.arrival;
  built.request.deadline = context.deadline;
  built.spec.arrival = context.arrival;
  built.spec.request_id = !message.request_id().empty() ? message.request_id()
                          : !context.request_id.empty() ? context.request_id
                                                        : context.fresh_request_id;
  return absl::OkStatus();
}

absl::Status ReadFirstTokenTimeout(const v1::GenerationTask& task, const CallContext& context, BuiltRequest& built) {
  if (!task.has_first_token_timeout()) return absl::OkStatus();
  const google::protobuf::Duration& timeout = task.first_token_timeout();
  const IntLimit& limit = limits::kFirstTokenTimeoutNs;
  // Seconds alone decide beyond the limit, so the product below cannot overflow.
  const bool is_sane = timeout.seconds() >= 0 && timeout.seconds() <= limit.max / 1000000000 && timeout.nanos() >= 0 &&
                       timeout.nanos() < 1000000000;
  const int64_t ns = is_sane ? timeout.seconds() * 1000000000 + timeout.nanos() : 0;
  if (ns < limit.min || ns > limit.max) {
    const std::string value = absl::StrCat(timeout.seconds(), " s ", timeout.nanos(), " ns");
    const bool is_low = timeout.seconds() <= 0 && timeout.nanos() <= 0;
    return FieldError(limit.field, absl::StrCat(value, " outside (0 s, ", limit.max / 1000000000, " s]"),
                      {{"value", value}, {"limit", absl::StrCat(is_low ? 0 : limit.max / 1000000000, " s")}});
  }
  built.request.first_token_deadline = context.arrival + std::chrono::nanoseconds(ns);
  built.spec.has_first_token_timeout = true;
  return absl::OkStatus();
}

// A text has at least one token; how many it has is not known before it is tokenized.
absl::Status CheckAdmission(const CallContext& context, const BuiltRequest& built, int num_sequences,
                            int64_t min_prompt_tokens) {
  if (!context.check_admission) return absl::OkStatus();
  scheduler::Arrival arrival = scheduler::ArrivalOf(built.request);
  arrival.work = {.num_sequences = num_sequences, .num_prompt_tokens = min_prompt_tokens};
  return context.check_admission(arrival);
}

absl::Status ReadConstraint(const v1::GenerationTask& task, const ServedModel& model, SamplingParams& params) {
  if (!task.has_constraint()) return absl::OkStatus();
  const v1::OutputConstraint& constraint = task.constraint();
  constexpr char kField[] = "constraint";
  if (task.stopping().min_tokens() > 0) return FieldError(kField, "cannot be kept together with min_tokens");
  if (task.stopping().ignore_eos()) return FieldError(kField, "cannot be kept together with ignore_eos");
  switch (constraint.kind_case()) {
    case v1::OutputConstraint::kRegex:
      RETURN_IF_ERROR(CheckCount(limits::kRegexBytes, static_cast<int64_t>(constraint.regex().size()), "bytes"));
      break;
    case v1::OutputConstraint::kJsonSchema:
      RETURN_IF_ERROR(
          CheckCount(limits::kJsonSchemaBytes, static_cast<int64_t>(constraint.json_schema().size()), "bytes"));
      break;
    case v1::OutputConstraint::kChoices:
      RETURN_IF_ERROR(CheckCount(limits::kChoices, constraint.choices().options_size(), "options"));
      for (const std::string& option : constraint.choices().options()) {
        RETURN_IF_ERROR(CheckCount(limits::kChoiceBytes, static_cast<int64_t>(option.size()), "bytes"));
      }
      break;
    case v1::OutputConstraint::kJsonObject:
      if (!constraint.json_object()) return FieldError("constraint.json_object", "false means nothing; leave it out");
      break;
    case v1::OutputConstraint::kGrammar:
      RETURN_IF_ERROR(CheckCount(limits::kGrammarBytes, static_cast<int64_t>(constraint.grammar().size()), "bytes"));
      break;
    case v1::OutputConstraint::KIND_NOT_SET:
      return FieldError(kField, "none of regex, json_schema, choices, json_object and grammar is set");
  }
  ASSIGN_OR_RETURN(params.constraint, model.constraints->Compile(constraint));
  return absl::OkStatus();
}

struct ScoreTokens {
  std::vector<TokenId> ids;
  size_t num_context = 0;
};

bool IsSpace(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

absl::StatusOr<ScoreTokens> EncodeAsOneText(const v1::ScoreRequest& message, const ServedModel& model) {
  std::string context = message.context_text();
  RETURN_IF_ERROR(CheckTextBytes("target_text", static_cast<int64_t>(context.size() + message.target_text().size())));
  const std::string whole = context + message.target_text();
  while (!context.empty() && IsSpace(context.back())) context.pop_back();
  ScoreTokens tokens;
  ASSIGN_OR_RETURN(tokens.ids, EncodeText("target_text", whole, message.tokenize_options(), model));
  ASSIGN_OR_RETURN(const std::vector<TokenId> context_ids,
                   EncodeText("context_text", context, message.tokenize_options(), model));
  tokens.num_context = std::min(context_ids.size(), tokens.ids.size());
  return tokens;
}

absl::StatusOr<ScoreTokens> ReadScoreTokens(const v1::ScoreRequest& message, const ServedModel& model) {
  if (message.target_case() == v1::ScoreRequest::TARGET_NOT_SET) {
    return FieldError("target", "neither target_text nor target_token_ids is set");
  }
  const bool text_target = message.target_case() == v1::ScoreRequest::kTargetText;
  const bool id_context = message.context_case() == v1::ScoreRequest::kContextTokenIds;
  if (text_target && !id_context) return EncodeAsOneText(message, model);
  ScoreTokens tokens;
  if (id_context) {
    ASSIGN_OR_RETURN(tokens.ids, ReadIds("context_token_ids", message.context_token_ids().ids(), model));
  } else {
    ASSIGN_OR_RETURN(tokens.ids, EncodeText("context_text", message.context_text(), message.tokenize_options(), model));
  }
  tokens.num_context = tokens.ids.size();
  std::vector<TokenId> target;
  if (text_target) {
    v1::TokenizeOptions options = message.tokenize_options();
    if (!tokens.ids.empty()) options.set_add_bos(false);  // BOS stands at the start of a text only
    ASSIGN_OR_RETURN(target, EncodeText("target_text", message.target_text(), options, model));
  } else {
    ASSIGN_OR_RETURN(target, ReadIds("target_token_ids", message.target_token_ids().ids(), model));
  }
  tokens.ids.insert(tokens.ids.end(), target.begin(), target.end());
  return tokens;
}

}  // namespace

absl::Status CheckModelName(const std::string& name, const ServedModel& model) {
  if (name.empty() || name == model.name) return absl::OkStatus();
  RETURN_IF_ERROR(CheckCount(limits::kModelNameBytes, static_cast<int64_t>(name.size()), "bytes"));
  absl::Status status = ReasonError(absl::StatusCode::kNotFound, reason::kModelNotFound,
                                    absl::StrCat("model: \"", name, "\" is not served, \"", model.name, "\" is"),
                                    {{"value", name}, {"served", model.name}});
  SetField(status, "model");
  return status;
}

absl::Status CheckPrintable(const char* field, const std::string& text, int64_t max_bytes) {
  RETURN_IF_ERROR(CheckCount({field, 0, max_bytes}, static_cast<int64_t>(text.size()), "bytes"));
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] >= 0x20 && text[i] < 0x7F) continue;
    const int byte = static_cast<unsigned char>(text[i]);
    return FieldError(field, absl::StrCat("byte ", byte, " at offset ", i, " is not printable ASCII (32 to 126)"),
                      {{"value", absl::StrCat(byte)}, {"limit", "126"}});
  }
  return absl::OkStatus();
}

absl::StatusOr<BuiltRequest> BuildGenerate(const v1::GenerationTask& task, const ServedModel& model,
                                           const CallContext& context) {
  BuiltRequest built;
  RETURN_IF_ERROR(CheckModelName(task.model(), model));
  RETURN_IF_ERROR(ReadCommon(task, context, built));
  RETURN_IF_ERROR(ReadSampling(task.sampling(), model, built.request.params));
  RETURN_IF_ERROR(ReadOutput(task.output(), built));
  const int num_sequences = std::max(1, static_cast<int>(task.sampling().num_sequences()));
  RETURN_IF_ERROR(CheckInt({limits::kNumSequences.field, 0, model.max_queued_requests}, num_sequences));
  RETURN_IF_ERROR(ReadFirstTokenTimeout(task, context, built));
  RETURN_IF_ERROR(CheckAdmission(context, built, num_sequences, 1));
  ASSIGN_OR_RETURN(built.request.prompt_token_ids, ReadPrompt(task, model));
  RETURN_IF_ERROR(ReadStopping(task.stopping(), model, built));
  RETURN_IF_ERROR(ReadConstraint(task, model, built.request.params));
  built.request.params.seed = task.sampling().has_seed() ? task.sampling().seed() : context.fresh_seed;
  built.request.num_sequences = num_sequences;
  built.spec.num_sequences = num_sequences;
  built.spec.num_prompt_tokens = static_cast<int>(built.request.prompt_token_ids.size());
  return built;
}

absl::StatusOr<BuiltRequest> BuildScore(const v1::ScoreRequest& message, const ServedModel& model,
                                        const CallContext& context) {
  BuiltRequest built;
  RETURN_IF_ERROR(CheckModelName(message.model(), model));
  RETURN_IF_ERROR(ReadCommon(message, context, built));
  RETURN_IF_ERROR(CheckInt(limits::kTopLogprobs, message.top_logprobs()));
  RETURN_IF_ERROR(CheckAdmission(context, built, /*num_sequences=*/1, 1));
  ASSIGN_OR_RETURN(ScoreTokens tokens, ReadScoreTokens(message, model));
  const size_t num_tokens = tokens.ids.size();
  if (num_tokens == tokens.num_context) {
    return FieldError("target", "has no tokens, at least 1 is needed", {{"actual", "0"}, {"limit", "1"}});
  }
  if (num_tokens < 2) {
    return FieldError("context", "is empty, and a target of 1 token has nothing before it; 2 are needed",
                      {{"actual", "1"}, {"limit", "2"}});
  }
  const int64_t max_context = model.info.max_context_tokens;
  if (static_cast<int64_t>(num_tokens) > max_context) {
    return TooLong("target", absl::StrCat(num_tokens, " tokens with the context, at most ", max_context),
                   static_cast<int64_t>(num_tokens), max_context);
  }
  built.num_context_tokens = static_cast<int>(tokens.num_context);
  built.num_target_tokens = static_cast<int>(num_tokens - tokens.num_context);
  built.request.prompt_token_ids = std::move(tokens.ids);
  built.request.max_tokens = 0;
  built.request.num_prompt_top_logprobs = static_cast<int>(message.top_logprobs());
  built.request.prompt_logprobs_start = std::max(1, built.num_context_tokens);
  built.spec.num_prompt_tokens = static_cast<int>(num_tokens);
  built.spec.scoring = true;
  return built;
}

absl::StatusOr<std::vector<TokenId>> BuildTokenize(const v1::TokenizeRequest& message, const ServedModel& model) {
  RETURN_IF_ERROR(CheckModelName(message.model(), model));
  return EncodeText("text", message.text(), message.options(), model);
}

absl::StatusOr<std::string> BuildDetokenize(const v1::DetokenizeRequest& message, const ServedModel& model) {
  RETURN_IF_ERROR(CheckModelName(message.model(), model));
  ASSIGN_OR_RETURN(const std::vector<TokenId> ids, ReadIds("token_ids", message.token_ids(), model));
  DecodeOptions options;
  options.skip_special = !message.has_skip_special_tokens() || message.skip_special_tokens();
  options.at_text_start = true;
  return model.tokenizer->Decode(ids, options);
}

v1::SamplingConfig DefaultSampling(const ServedModel& model) {
  v1::SamplingConfig config;
  config.set_temperature(model.defaults.temperature);
  config.set_top_k(static_cast<uint32_t>(model.defaults.top_k));
  config.set_top_p(model.defaults.top_p);
  config.set_min_p(0.0f);
  config.set_repetition_penalty(1.0f);
  config.set_presence_penalty(0.0f);
  config.set_frequency_penalty(0.0f);
  config.set_num_sequences(1);
  return config;
}

}  // namespace minitron::server
