#include "server/compat/open_inference_request.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/json.h"
#include "server/compat/open_inference_tensors.h"
#include "server/compat/sampling_fields.h"
#include "server/grpc_status.h"
#include "server/limits.h"

namespace minitron::server::compat {
namespace {

using engine::JsonValue;

constexpr size_t kMaxIdBytes = 256;  // returned in every answer

// What is known of a request while its tensors are read.
struct State {
  InferTask& result;
  bool has_text = false;
  bool has_sampling_parameters = false;
  std::optional<bool> exclude_input{};
  std::optional<int64_t> end_id{};
};

using Handler = absl::Status (*)(const InputTensor& tensor, State& state);

struct InputEntry {
  TensorSpec spec;
  Handler read;
};

v1::SamplingConfig& Sampling(State& state) { return *state.result.task.mutable_sampling(); }
v1::StoppingConfig& Stopping(State& state) { return *state.result.task.mutable_stopping(); }

absl::StatusOr<uint32_t> OneUint32(const InputTensor& tensor) {
  ASSIGN_OR_RETURN(const int64_t value, OneInt(tensor));
  constexpr int64_t kMax = std::numeric_limits<uint32_t>::max();
  if (value >= 0 && value <= kMax) return static_cast<uint32_t>(value);
  return FieldError("inputs." + tensor.name, absl::StrCat(value, " outside [0, ", kMax, "]"),
                    {{"value", absl::StrCat(value)}, {"limit", absl::StrCat(value < 0 ? 0 : kMax)}});
}

template <bool InferOptions::*kOption>
absl::Status ReadOption(const InputTensor& tensor, State& state) {
  ASSIGN_OR_RETURN(state.result.options.*kOption, OneBool(tensor));
  return absl::OkStatus();
}

template <void (v1::SamplingConfig::*kSet)(float)>
absl::Status ReadFloat(const InputTensor& tensor, State& state) {
  ASSIGN_OR_RETURN(const double value, OneFloat(tensor));
  (Sampling(state).*kSet)(static_cast<float>(value));
  return absl::OkStatus();
}

template <void (v1::SamplingConfig::*kSet)(uint32_t)>
absl::Status ReadSamplingUint(const InputTensor& tensor, State& state) {
  ASSIGN_OR_RETURN(const uint32_t value, OneUint32(tensor));
  (Sampling(state).*kSet)(value);
  return absl::OkStatus();
}

template <void (v1::StoppingConfig::*kSet)(uint32_t)>
absl::Status ReadStoppingUint(const InputTensor& tensor, State& state) {
  ASSIGN_OR_RETURN(const uint32_t value, OneUint32(tensor));
  (Stopping(state).*kSet)(value);
  return absl::OkStatus();
}

absl::Status ReadText(const InputTensor& tensor, State& state) {
  ASSIGN_OR_RETURN(*state.result.task.mutable_text(), OneText(tensor));
  state.has_text = true;
  return absl::OkStatus();
}

absl::Status ReadSamplingParameters(const InputTensor& tensor, State& state);

absl::Status ReadExcludeInput(const InputTensor& tensor, State& state) {
  ASSIGN_OR_RETURN(state.exclude_input, OneBool(tensor));
  return absl::OkStatus();
}

absl::Status ReadSeed(const InputTensor& tensor, State& state) {
  ASSIGN_OR_RETURN(const int64_t seed, OneInt(tensor));
  Sampling(state).set_seed(static_cast<uint64_t>(seed));
  return absl::OkStatus();
}

// Empty words are how clients fill the tensor when there are none.
absl::Status ReadStopWords(const InputTensor& tensor, State& state) {
  ASSIGN_OR_RETURN(const std::vector<std::string> words, Texts(tensor));
  for (const std::string& word : words) {
    if (!word.empty()) Stopping(state).add_stop_sequences(word);
  }
  return absl::OkStatus();
}

absl::Status RefuseBadWords(const InputTensor& tensor, State&) {
  ASSIGN_OR_RETURN(const std::vector<std::string> words, Texts(tensor));
  if (std::all_of(words.begin(), words.end(), [](const std::string& word) { return word.empty(); })) {
    return absl::OkStatus();
  }
  return FieldError("inputs.bad_words", "is not supported; use logit_bias in sampling_parameters");
}

absl::Status ReadBeamWidth(const InputTensor& tensor, State&) {
  ASSIGN_OR_RETURN(const int64_t width, OneInt(tensor));
  if (width == 1) return absl::OkStatus();
  return FieldError("inputs.beam_width", absl::StrCat(width, " is not supported, only 1 is"),
                    {{"value", absl::StrCat(width)}, {"limit", "1"}});
}

absl::Status ReadEndId(const InputTensor& tensor, State& state) {
  ASSIGN_OR_RETURN(state.end_id, OneInt(tensor));
  return absl::OkStatus();
}

// Nothing is ever padded here, and without beams a length has no penalty.
absl::Status IgnoreInt(const InputTensor& tensor, State&) { return OneInt(tensor).status(); }
absl::Status IgnoreFloat(const InputTensor& tensor, State&) { return OneFloat(tensor).status(); }

const std::vector<InputEntry>& Inputs() {
  using S = v1::SamplingConfig;
  using E = v1::StoppingConfig;
  using O = InferOptions;
  constexpr auto kBool = inference::TYPE_BOOL;
  constexpr auto kInt = inference::TYPE_INT32;
  constexpr auto kFloat = inference::TYPE_FP32;
  constexpr auto kText = inference::TYPE_STRING;
  static const std::vector<InputEntry> kInputs = {
      {{"text_input", "BYTES", kText, 1, /*optional=*/false}, ReadText},
      {{"stream", "BOOL", kBool, 1}, ReadOption<&O::stream>},
      {{"exclude_input_in_output", "BOOL", kBool, 1}, ReadExcludeInput},
      // vLLM.
      {{"sampling_parameters", "BYTES", kText, 1}, ReadSamplingParameters},
      {{"return_finish_reason", "BOOL", kBool, 1}, ReadOption<&O::finish_reason>},
      {{"return_cumulative_logprob", "BOOL", kBool, 1}, ReadOption<&O::cumulative_logprob>},
      {{"return_logprobs", "BOOL", kBool, 1}, ReadOption<&O::logprobs>},
      {{"return_num_input_tokens", "BOOL", kBool, 1}, ReadOption<&O::num_input_tokens>},
      {{"return_num_output_tokens", "BOOL", kBool, 1}, ReadOption<&O::num_output_tokens>},
      // TensorRT-LLM.
      {{"max_tokens", "INT32", kInt, 1}, ReadStoppingUint<&E::set_max_tokens>},
      {{"min_tokens", "INT32", kInt, 1}, ReadStoppingUint<&E::set_min_tokens>},
      {{"min_length", "INT32", kInt, 1}, ReadStoppingUint<&E::set_min_tokens>},
      {{"bad_words", "BYTES", kText, -1}, RefuseBadWords},
      {{"stop_words", "BYTES", kText, -1}, ReadStopWords},
      {{"end_id", "INT32", kInt, 1}, ReadEndId},
      {{"pad_id", "INT32", kInt, 1}, IgnoreInt},
      {{"top_k", "INT32", kInt, 1}, ReadSamplingUint<&S::set_top_k>},
      {{"top_p", "FP32", kFloat, 1}, ReadFloat<&S::set_top_p>},
      {{"temperature", "FP32", kFloat, 1}, ReadFloat<&S::set_temperature>},
      {{"length_penalty", "FP32", kFloat, 1}, IgnoreFloat},
      {{"repetition_penalty", "FP32", kFloat, 1}, ReadFloat<&S::set_repetition_penalty>},
      {{"presence_penalty", "FP32", kFloat, 1}, ReadFloat<&S::set_presence_penalty>},
      {{"frequency_penalty", "FP32", kFloat, 1}, ReadFloat<&S::set_frequency_penalty>},
      {{"seed", "UINT64", inference::TYPE_UINT64, 1}, ReadSeed},
      {{"random_seed", "UINT64", inference::TYPE_UINT64, 1}, ReadSeed},
      {{"return_log_probs", "BOOL", kBool, 1}, ReadOption<&O::output_log_probs>},
      {{"beam_width", "INT32", kInt, 1}, ReadBeamWidth},
      {{"num_return_sequences", "INT32", kInt, 1}, ReadSamplingUint<&S::set_num_sequences>},
  };
  return kInputs;
}

// vLLM's names that this protocol adds to the shared ones.
absl::Status ReadSamplingMember(const std::string& key, const JsonValue& value, State& state) {
  const std::string field = "sampling_parameters." + key.substr(0, 64);
  if (key == "logprobs") {
    if (value.is(JsonValue::Type::kNull)) return absl::OkStatus();
    ASSIGN_OR_RETURN(const uint32_t top, ReadUint32(field, value, JsonTyping::kStringsAllowed));
    state.result.task.mutable_output()->set_logprobs(top);
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(const bool known, ReadSamplingField(key, value, JsonTyping::kStringsAllowed, state.result.task));
  return known ? absl::OkStatus() : UnknownField(field);
}

absl::Status ReadSamplingParameters(const InputTensor& tensor, State& state) {
  ASSIGN_OR_RETURN(const std::string text, OneText(tensor));
  state.has_sampling_parameters = true;
  JsonValue object;
  std::string error;
  engine::JsonLimits limits;
  limits.max_bytes = limits::kMaxTextBytes;
  if (!engine::ParseJson(text.data(), static_cast<int64_t>(text.size()), limits, &object, &error)) {
    return FieldError("inputs.sampling_parameters", error);
  }
  if (!object.is(JsonValue::Type::kObject)) return FieldError("inputs.sampling_parameters", "is not a JSON object");
  for (size_t i = 0; i < object.items.size(); ++i) {
    RETURN_IF_ERROR(ReadSamplingMember(object.keys[i], object.items[i], state));
  }
  return absl::OkStatus();
}

JsonValue ToJson(const inference::InferParameter& parameter) {
  JsonValue value;
  switch (parameter.parameter_choice_case()) {
    case inference::InferParameter::kBoolParam:
      value.type = JsonValue::Type::kBool;
      value.boolean = parameter.bool_param();
      break;
    case inference::InferParameter::kInt64Param:
      value.type = JsonValue::Type::kInt;
      value.integer = parameter.int64_param();
      break;
    case inference::InferParameter::kUint64Param:
      value.type = JsonValue::Type::kInt;
      value.integer = static_cast<int64_t>(parameter.uint64_param());
      break;
    case inference::InferParameter::kDoubleParam:
      value.type = JsonValue::Type::kNumber;
      value.number = parameter.double_param();
      break;
    case inference::InferParameter::kStringParam:
      value.type = JsonValue::Type::kString;
      value.string = parameter.string_param();
      break;
    case inference::InferParameter::PARAMETER_CHOICE_NOT_SET:
      break;
  }
  return value;
}

absl::Status ReadTimeout(const JsonValue& value, State& state) {
  ASSIGN_OR_RETURN(const int64_t micros, ReadInteger("parameters.timeout", value, JsonTyping::kStringsAllowed));
  if (micros < 0) {
    return FieldError("parameters.timeout", absl::StrCat(micros, " below 0"),
                      {{"value", absl::StrCat(micros)}, {"limit", "0"}});
  }
  if (micros > 0) state.result.timeout = std::chrono::microseconds(micros);
  return absl::OkStatus();
}

// Triton's levels: 1 first, 0 the default.
absl::Status ReadPriority(const JsonValue& value, State& state) {
  ASSIGN_OR_RETURN(const uint32_t level, ReadUint32("parameters.priority", value, JsonTyping::kStringsAllowed));
  if (level > static_cast<uint32_t>(limits::kPriority.max)) {
    return FieldError("parameters.priority", absl::StrCat(level, " outside [0, ", limits::kPriority.max, "]"),
                      {{"value", absl::StrCat(level)}, {"limit", absl::StrCat(limits::kPriority.max)}});
  }
  state.result.task.set_priority(-static_cast<int32_t>(level));
  return absl::OkStatus();
}

// Parameters of the protocol; what is left are sampling parameters, unless the tensor of that name is there, which then
// is the only place for them, as in Triton's back end.
absl::Status ReadParameters(const inference::ModelInferRequest& request, State& state) {
  for (const auto& [key, parameter] : request.parameters()) {
    const JsonValue value = ToJson(parameter);
    const std::string field = "parameters." + key.substr(0, 64);
    if (key == "triton_enable_empty_final_response") {
      ASSIGN_OR_RETURN(state.result.options.empty_final, ReadBool(field, value, JsonTyping::kStringsAllowed));
    } else if (key == "timeout") {
      RETURN_IF_ERROR(ReadTimeout(value, state));
    } else if (key == "priority") {
      RETURN_IF_ERROR(ReadPriority(value, state));
    } else if (key == "binary_data_output") {
      continue;  // of the HTTP form of this protocol
    } else if (state.has_sampling_parameters) {
      return UnknownField(field);
    } else {
      RETURN_IF_ERROR(ReadSamplingMember(key, value, state));
    }
  }
  return absl::OkStatus();
}

// A completion echoes its prompt unless it streams: the rule of Triton's back end.
absl::Status ReadEcho(State& state) {
  InferOptions& options = state.result.options;
  const bool exclude = state.exclude_input.value_or(options.stream);
  if (!exclude && options.stream) {
    return FieldError("inputs.exclude_input_in_output", "false is not possible for a stream");
  }
  if (!exclude) options.prepended_text = state.result.task.text();
  return absl::OkStatus();
}

// TensorRT-LLM's end_id replaces the model's own end of sequence; -1 means none.
absl::Status ReadEnd(State& state) {
  if (!state.end_id.has_value()) return absl::OkStatus();
  if (*state.end_id < -1 || *state.end_id > std::numeric_limits<int32_t>::max()) {
    return FieldError("inputs.end_id", absl::StrCat(*state.end_id, " is not a token id"),
                      {{"value", absl::StrCat(*state.end_id)}});
  }
  Stopping(state).set_ignore_eos(true);
  if (*state.end_id >= 0) Stopping(state).add_stop_token_ids(static_cast<uint32_t>(*state.end_id));
  return absl::OkStatus();
}

absl::Status ReadRequested(const inference::ModelInferRequest& request, InferOptions& options) {
  const std::vector<TensorSpec> known = OutputSpecs();
  for (const auto& output : request.outputs()) {
    const auto found =
        std::find_if(known.begin(), known.end(), [&](const TensorSpec& spec) { return output.name() == spec.name; });
    if (found == known.end()) return UnknownField("outputs." + output.name().substr(0, 64));
    options.requested.insert(output.name());
  }
  return absl::OkStatus();
}

absl::Status ReadTensors(const inference::ModelInferRequest& request, State& state) {
  ASSIGN_OR_RETURN(const std::vector<InputTensor> tensors, DecodeInputs(request));
  std::set<std::string> seen;
  for (const InputTensor& tensor : tensors) {
    const auto& inputs = Inputs();
    const auto found = std::find_if(inputs.begin(), inputs.end(),
                                    [&](const InputEntry& entry) { return tensor.name == entry.spec.name; });
    const std::string field = "inputs." + tensor.name.substr(0, 64);
    if (found == inputs.end()) return UnknownField(field);
    if (!seen.insert(tensor.name).second) return FieldError(field, "is there twice");
    RETURN_IF_ERROR(found->read(tensor, state));
  }
  if (!state.has_text) return FieldError("inputs.text_input", "is missing");
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckModelVersion(const std::string& version) {
  if (version.empty() || version == kModelVersion) return absl::OkStatus();
  const std::string shown = version.substr(0, 32);
  absl::Status status = ReasonError(absl::StatusCode::kNotFound, reason::kModelNotFound,
                                    absl::StrCat("model_version: \"", shown, "\" is not served, \"1\" is"),
                                    {{"value", shown}, {"served", kModelVersion}});
  SetField(status, "model_version");
  return status;
}

absl::StatusOr<InferTask> ReadInferRequest(const inference::ModelInferRequest& request) {
  InferTask result;
  State state{result};
  RETURN_IF_ERROR(CheckModelVersion(request.model_version()));
  result.task.set_model(request.model_name());
  result.options.id = request.id();
  if (request.id().size() > kMaxIdBytes) {
    return FieldError("id", absl::StrCat(request.id().size(), " bytes, at most ", kMaxIdBytes),
                      {{"actual", absl::StrCat(request.id().size())}, {"limit", absl::StrCat(kMaxIdBytes)}});
  }
  RETURN_IF_ERROR(ReadTensors(request, state));
  RETURN_IF_ERROR(ReadParameters(request, state));
  RETURN_IF_ERROR(ReadEcho(state));
  RETURN_IF_ERROR(ReadEnd(state));
  RETURN_IF_ERROR(ReadRequested(request, result.options));
  const InferOptions& options = result.options;
  const bool needs_logprobs = options.cumulative_logprob || options.output_log_probs || options.logprobs;
  if (needs_logprobs && !result.task.output().has_logprobs()) result.task.mutable_output()->set_logprobs(0);
  return result;
}

std::vector<TensorSpec> InputSpecs() {
  std::vector<TensorSpec> specs;
  for (const InputEntry& entry : Inputs()) specs.push_back(entry.spec);
  return specs;
}

std::vector<TensorSpec> OutputSpecs() {
  return {{"text_output", "BYTES", inference::TYPE_STRING, -1},
          {"finish_reason", "BYTES", inference::TYPE_STRING, -1},
          {"cumulative_logprob", "FP32", inference::TYPE_FP32, -1},
          {"logprobs", "BYTES", inference::TYPE_STRING, -1},
          {"num_input_tokens", "UINT32", inference::TYPE_UINT32, 1},
          {"num_output_tokens", "UINT32", inference::TYPE_UINT32, -1},
          {"cum_log_probs", "FP32", inference::TYPE_FP32, -1},
          {"output_log_probs", "FP32", inference::TYPE_FP32, -1},
          {"batch_index", "INT32", inference::TYPE_INT32, 1}};
}

}  // namespace minitron::server::compat
