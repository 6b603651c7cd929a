#include "server/compat/constraint_fields.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/compat/sampling_fields.h"
#include "server/grpc_status.h"

namespace minitron::server::compat {
namespace {

using engine::JsonValue;
using Type = engine::JsonValue::Type;

// The task's constraint, which nothing may have set before.
absl::StatusOr<v1::OutputConstraint*> Constrain(const std::string& field, v1::GenerationTask& task) {
  if (task.has_constraint()) return FieldError(field, "is a second constraint of the output");
  return task.mutable_constraint();
}

// A schema, as an object or as its text.
absl::Status ReadSchema(const std::string& field, const JsonValue& value, v1::GenerationTask& task) {
  if (!value.is(Type::kObject) && !value.is(Type::kString)) return FieldError(field, "is no JSON schema");
  ASSIGN_OR_RETURN(v1::OutputConstraint* const constraint, Constrain(field, task));
  constraint->set_json_schema(value.is(Type::kString) ? value.string : engine::WriteJson(value));
  return absl::OkStatus();
}

absl::Status ReadRegex(const std::string& field, const JsonValue& value, v1::GenerationTask& task) {
  ASSIGN_OR_RETURN(const std::string regex, ReadString(field, value));
  ASSIGN_OR_RETURN(v1::OutputConstraint* const constraint, Constrain(field, task));
  constraint->set_regex(regex);
  return absl::OkStatus();
}

absl::Status ReadGrammar(const std::string& field, const JsonValue& value, v1::GenerationTask& task) {
  ASSIGN_OR_RETURN(const std::string grammar, ReadString(field, value));
  ASSIGN_OR_RETURN(v1::OutputConstraint* const constraint, Constrain(field, task));
  constraint->set_grammar(grammar);
  return absl::OkStatus();
}

absl::Status ReadChoice(const std::string& field, const JsonValue& value, v1::GenerationTask& task) {
  ASSIGN_OR_RETURN(const std::vector<std::string> options, ReadStrings(field, value));
  ASSIGN_OR_RETURN(v1::OutputConstraint* const constraint, Constrain(field, task));
  constraint->mutable_choices()->mutable_options()->Assign(options.begin(), options.end());
  return absl::OkStatus();
}

absl::Status ReadJsonObject(const std::string& field, const JsonValue& value, v1::GenerationTask& task) {
  ASSIGN_OR_RETURN(const bool on, ReadBool(field, value, JsonTyping::kStrict));
  if (!on) return absl::OkStatus();
  ASSIGN_OR_RETURN(v1::OutputConstraint* const constraint, Constrain(field, task));
  constraint->set_json_object(true);
  return absl::OkStatus();
}

absl::Status ReadResponseFormat(const std::string&, const JsonValue& value, v1::GenerationTask& task) {
  const JsonValue* type = value.Find("type");
  if (type == nullptr || !type->is(Type::kString)) return FieldError("response_format.type", "is missing");
  if (type->string == "text") return absl::OkStatus();
  if (type->string == "json_object") {
    ASSIGN_OR_RETURN(v1::OutputConstraint* const constraint, Constrain("response_format", task));
    constraint->set_json_object(true);
    return absl::OkStatus();
  }
  if (type->string != "json_schema") {
    return FieldError("response_format.type", "is none of text, json_object, json_schema");
  }
  const JsonValue* format = value.Find("json_schema");
  const JsonValue* schema = format == nullptr ? nullptr : format->Find("schema");
  if (schema == nullptr) return FieldError("response_format.json_schema.schema", "is missing");
  return ReadSchema("response_format.json_schema.schema", *schema, task);
}

absl::Status ReadStructuredOutputs(const std::string&, const JsonValue& value, v1::GenerationTask& task) {
  if (!value.is(Type::kObject)) return FieldError("structured_outputs", "is not an object");
  for (size_t i = 0; i < value.items.size(); ++i) {
    const std::string field = absl::StrCat("structured_outputs.", value.keys[i].substr(0, 64));
    const JsonValue& item = value.items[i];
    if (item.is(Type::kNull)) continue;
    if (value.keys[i] == "json") {
      RETURN_IF_ERROR(ReadSchema(field, item, task));
    } else if (value.keys[i] == "regex") {
      RETURN_IF_ERROR(ReadRegex(field, item, task));
    } else if (value.keys[i] == "grammar") {
      RETURN_IF_ERROR(ReadGrammar(field, item, task));
    } else if (value.keys[i] == "choice") {
      RETURN_IF_ERROR(ReadChoice(field, item, task));
    } else if (value.keys[i] == "json_object") {
      RETURN_IF_ERROR(ReadJsonObject(field, item, task));
    } else {
      return UnknownField(field);
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<bool> ReadConstraintField(const std::string& key, const JsonValue& value, v1::GenerationTask& task) {
  using Reader = absl::Status (*)(const std::string&, const JsonValue&, v1::GenerationTask&);
  static constexpr std::pair<const char*, Reader> kReaders[] = {{"response_format", ReadResponseFormat},
                                                                {"structured_outputs", ReadStructuredOutputs},
                                                                {"guided_json", ReadSchema},
                                                                {"guided_regex", ReadRegex},
                                                                {"guided_grammar", ReadGrammar},
                                                                {"guided_choice", ReadChoice}};
  for (const auto& [name, read] : kReaders) {
    if (key != name) continue;
    if (!value.is(Type::kNull)) RETURN_IF_ERROR(read(key, value, task));
    return true;
  }
  return false;
}

}  // namespace minitron::server::compat
