#include "server/compat/sampling_fields.h"

#include <cmath>
#include <limits>
#include <map>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/compat/constraint_fields.h"
#include "server/grpc_status.h"

namespace minitron::server::compat {
namespace {

using engine::JsonValue;
using Type = engine::JsonValue::Type;

// Integers up to here are exact in a double.
constexpr double kMaxExact = 9007199254740992.0;

absl::Status WrongType(const std::string& field, const JsonValue& value, const char* wanted) {
  const std::string shown = value.Describe();
  return FieldError(field, absl::StrCat(shown, " is not ", wanted), {{"value", shown}});
}

struct Reader {
  const std::string& key;
  const JsonValue& value;
  JsonTyping typing;
  v1::GenerationTask& task;

  template <typename Message>
  absl::Status Float(Message* message, void (Message::*set)(float)) const {
    ASSIGN_OR_RETURN(const double number, ReadNumber(key, value, typing));
    (message->*set)(static_cast<float>(number));
    return absl::OkStatus();
  }
  template <typename Message>
  absl::Status Uint(Message* message, void (Message::*set)(uint32_t)) const {
    ASSIGN_OR_RETURN(const uint32_t number, ReadUint32(key, value, typing));
    (message->*set)(number);
    return absl::OkStatus();
  }
  template <typename Message>
  absl::Status Bool(Message* message, void (Message::*set)(bool)) const {
    ASSIGN_OR_RETURN(const bool on, ReadBool(key, value, typing));
    (message->*set)(on);
    return absl::OkStatus();
  }
  absl::Status TopK() const {
    ASSIGN_OR_RETURN(const int64_t top_k, ReadInteger(key, value, typing));
    if (top_k == -1) {  // vLLM's and OpenAI clients' word for "all"
      task.mutable_sampling()->set_top_k(0);
      return absl::OkStatus();
    }
    return Uint(task.mutable_sampling(), &v1::SamplingConfig::set_top_k);
  }
  absl::Status Seed() const {
    ASSIGN_OR_RETURN(const int64_t seed, ReadInteger(key, value, typing));
    task.mutable_sampling()->set_seed(static_cast<uint64_t>(seed));
    return absl::OkStatus();
  }
  absl::Status Stop() const {
    ASSIGN_OR_RETURN(const std::vector<std::string> stops, ReadStrings(key, value));
    task.mutable_stopping()->mutable_stop_sequences()->Assign(stops.begin(), stops.end());
    return absl::OkStatus();
  }
  absl::Status StopIds() const {
    ASSIGN_OR_RETURN(const std::vector<uint32_t> ids, ReadTokenIds(key, value, typing));
    task.mutable_stopping()->mutable_stop_token_ids()->Assign(ids.begin(), ids.end());
    return absl::OkStatus();
  }
  absl::Status LogitBias() const {
    if (!value.is(Type::kObject)) return WrongType(key, value, "an object of token id to number");
    for (size_t i = 0; i < value.items.size(); ++i) {
      uint32_t id = 0;
      if (!absl::SimpleAtoi(value.keys[i], &id)) {
        return FieldError(key, absl::StrCat("\"", value.keys[i].substr(0, 32), "\" is not a token id"));
      }
      ASSIGN_OR_RETURN(const double bias, ReadNumber(key, value.items[i], typing));
      (*task.mutable_sampling()->mutable_logit_bias())[id] = static_cast<float>(bias);
    }
    return absl::OkStatus();
  }
  absl::Status Priority() const {
    ASSIGN_OR_RETURN(const int64_t priority, ReadInteger(key, value, typing));
    if (priority < std::numeric_limits<int32_t>::min() || priority > std::numeric_limits<int32_t>::max()) {
      return FieldError(key, absl::StrCat(priority, " outside [-100, 100]"), {{"value", absl::StrCat(priority)}});
    }
    task.set_priority(static_cast<int32_t>(priority));
    return absl::OkStatus();
  }
  absl::Status CacheSalt() const {
    ASSIGN_OR_RETURN(*task.mutable_cache_salt(), ReadString(key, value));
    return absl::OkStatus();
  }
  // One sequence is drawn per asked-for one; drawing more and keeping the best would need a ranking.
  absl::Status BestOf() const {
    ASSIGN_OR_RETURN(const int64_t best_of, ReadInteger(key, value, typing));
    if (best_of == 1) return absl::OkStatus();
    return FieldError(key, absl::StrCat(best_of, " is not supported, only 1 is"),
                      {{"value", absl::StrCat(best_of)}, {"limit", "1"}});
  }
  absl::Status MustBeFalse() const {
    ASSIGN_OR_RETURN(const bool on, ReadBool(key, value, typing));
    if (!on) return absl::OkStatus();
    return FieldError(key, "true is not supported", {{"value", "true"}});
  }
  // Has a meaning for beams only, and there are none.
  absl::Status AnyNumber() const { return ReadNumber(key, value, typing).status(); }
  absl::Status AnyBool() const { return ReadBool(key, value, typing).status(); }
};

using FieldReader = absl::Status (*)(const Reader&);

const std::map<std::string, FieldReader>& FieldReaders() {
  using S = v1::SamplingConfig;
  using E = v1::StoppingConfig;
  static const std::map<std::string, FieldReader> kReaders = {
      {"temperature", [](const Reader& r) { return r.Float(r.task.mutable_sampling(), &S::set_temperature); }},
      {"top_p", [](const Reader& r) { return r.Float(r.task.mutable_sampling(), &S::set_top_p); }},
      {"min_p", [](const Reader& r) { return r.Float(r.task.mutable_sampling(), &S::set_min_p); }},
      {"top_k", [](const Reader& r) { return r.TopK(); }},
      {"repetition_penalty",
       [](const Reader& r) { return r.Float(r.task.mutable_sampling(), &S::set_repetition_penalty); }},
      {"presence_penalty",
       [](const Reader& r) { return r.Float(r.task.mutable_sampling(), &S::set_presence_penalty); }},
      {"frequency_penalty",
       [](const Reader& r) { return r.Float(r.task.mutable_sampling(), &S::set_frequency_penalty); }},
      {"logit_bias", [](const Reader& r) { return r.LogitBias(); }},
      {"seed", [](const Reader& r) { return r.Seed(); }},
      {"n", [](const Reader& r) { return r.Uint(r.task.mutable_sampling(), &S::set_num_sequences); }},
      {"max_tokens", [](const Reader& r) { return r.Uint(r.task.mutable_stopping(), &E::set_max_tokens); }},
      {"min_tokens", [](const Reader& r) { return r.Uint(r.task.mutable_stopping(), &E::set_min_tokens); }},
      {"stop", [](const Reader& r) { return r.Stop(); }},
      {"stop_token_ids", [](const Reader& r) { return r.StopIds(); }},
      {"include_stop_str_in_output",
       [](const Reader& r) { return r.Bool(r.task.mutable_stopping(), &E::set_include_stop_sequence); }},
      {"ignore_eos", [](const Reader& r) { return r.Bool(r.task.mutable_stopping(), &E::set_ignore_eos); }},
      {"skip_special_tokens",
       [](const Reader& r) { return r.Bool(r.task.mutable_output(), &v1::OutputConfig::set_skip_special_tokens); }},
      {"truncate_prompt_tokens",
       [](const Reader& r) { return r.Uint(&r.task, &v1::GenerationTask::set_truncate_prompt_tokens); }},
      {"priority", [](const Reader& r) { return r.Priority(); }},
      {"cache_salt", [](const Reader& r) { return r.CacheSalt(); }},
      {"best_of", [](const Reader& r) { return r.BestOf(); }},
      {"use_beam_search", [](const Reader& r) { return r.MustBeFalse(); }},
      {"length_penalty", [](const Reader& r) { return r.AnyNumber(); }},
      {"early_stopping", [](const Reader& r) { return r.AnyBool(); }},
      {"spaces_between_special_tokens", [](const Reader& r) { return r.AnyBool(); }},
  };
  return kReaders;
}

}  // namespace

absl::Status UnknownField(const std::string& field) { return FieldError(field, "is not a known field"); }

absl::StatusOr<double> ReadNumber(const std::string& field, const JsonValue& value, JsonTyping typing) {
  if (value.is(Type::kInt)) return static_cast<double>(value.integer);
  if (value.is(Type::kNumber)) return value.number;
  double number = 0;
  if (typing == JsonTyping::kStringsAllowed && value.is(Type::kString) && absl::SimpleAtod(value.string, &number) &&
      std::isfinite(number)) {
    return number;
  }
  return WrongType(field, value, "a number");
}

absl::StatusOr<int64_t> ReadInteger(const std::string& field, const JsonValue& value, JsonTyping typing) {
  if (value.is(Type::kInt)) return value.integer;
  int64_t integer = 0;
  if (typing == JsonTyping::kStringsAllowed && value.is(Type::kString) && absl::SimpleAtoi(value.string, &integer)) {
    return integer;
  }
  if (value.is(Type::kNumber) && std::trunc(value.number) == value.number && std::fabs(value.number) <= kMaxExact) {
    return static_cast<int64_t>(value.number);
  }
  return WrongType(field, value, "an integer of 64 bits");
}

absl::StatusOr<uint32_t> ReadUint32(const std::string& field, const JsonValue& value, JsonTyping typing) {
  ASSIGN_OR_RETURN(const int64_t integer, ReadInteger(field, value, typing));
  constexpr int64_t kMax = std::numeric_limits<uint32_t>::max();
  if (integer >= 0 && integer <= kMax) return static_cast<uint32_t>(integer);
  return FieldError(field, absl::StrCat(integer, " outside [0, ", kMax, "]"),
                    {{"value", absl::StrCat(integer)}, {"limit", absl::StrCat(integer < 0 ? 0 : kMax)}});
}

absl::StatusOr<bool> ReadBool(const std::string& field, const JsonValue& value, JsonTyping typing) {
  if (value.is(Type::kBool)) return value.boolean;
  bool on = false;
  if (typing == JsonTyping::kStringsAllowed && value.is(Type::kString) && absl::SimpleAtob(value.string, &on)) {
    return on;
  }
  return WrongType(field, value, "true or false");
}

absl::StatusOr<std::string> ReadString(const std::string& field, const JsonValue& value) {
  if (value.is(Type::kString)) return value.string;
  return WrongType(field, value, "a string");
}

absl::StatusOr<std::vector<std::string>> ReadStrings(const std::string& field, const JsonValue& value) {
  if (value.is(Type::kString)) return std::vector<std::string>{value.string};
  if (!value.is(Type::kArray)) return WrongType(field, value, "a string or a list of strings");
  std::vector<std::string> strings;
  for (const JsonValue& item : value.items) {
    ASSIGN_OR_RETURN(strings.emplace_back(), ReadString(field, item));
  }
  return strings;
}

absl::StatusOr<std::vector<uint32_t>> ReadTokenIds(const std::string& field, const JsonValue& value,
                                                   JsonTyping typing) {
  if (!value.is(Type::kArray)) return WrongType(field, value, "a list of token ids");
  std::vector<uint32_t> ids;
  ids.reserve(value.items.size());
  for (const JsonValue& item : value.items) {
    ASSIGN_OR_RETURN(const uint32_t id, ReadUint32(field, item, typing));
    ids.push_back(id);
  }
  return ids;
}

absl::StatusOr<bool> ReadSamplingField(const std::string& key, const JsonValue& value, JsonTyping typing,
                                       v1::GenerationTask& task) {
  const auto found = FieldReaders().find(key);
  if (found == FieldReaders().end()) return ReadConstraintField(key, value, task);
  if (value.is(Type::kNull)) return true;
  RETURN_IF_ERROR(found->second(Reader{key, value, typing, task}));
  return true;
}

}  // namespace minitron::server::compat
