#include "server/constraint/json_schema.h"

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/json.h"
#include "server/constraint/regex_parser.h"

namespace minitron::server::constraint {
namespace {

using engine::JsonValue;
using Type = JsonValue::Type;

constexpr int kMaxRefs = 64;        // followed on one path; a recursive schema has no end
constexpr int kMaxCount = 10'000;   // of minItems, maxLength and the like
constexpr int kAnyDepth = 2;        // containers inside a value that may be anything
constexpr int kMaxSafeDigits = 15;  // of numbers, so that a double holds them

Pattern Text(std::string text) { return Pattern::Bytes(std::move(text)); }
Pattern Comma() { return Pattern::Concat({Text(","), Pattern::Optional(Text(" "))}); }
Pattern Colon() { return Pattern::Concat({Text(":"), Pattern::Optional(Text(" "))}); }

CharRanges NotPlainInString() { return {{0, 0x1F}, {'"', '"'}, {'\\', '\\'}}; }

Pattern StringChar() {
  constexpr std::string_view kEscapable = "\"\\/bfnrt";
  CharRanges escapable;
  for (const char c : kEscapable) escapable.emplace_back(c, c);
  return Pattern::Alternate({Pattern::Chars(Complement(NotPlainInString())),
                             Pattern::Concat({Text("\\"), Pattern::Chars(std::move(escapable))})});
}

Pattern String(int min, int max) {
  return Pattern::Concat({Text("\""), Pattern::Repeat(StringChar(), min, max), Text("\"")});
}

Pattern Digits(int min, int max) { return Pattern::Repeat(Pattern::Chars({{'0', '9'}}), min, max); }

Pattern Integer() {
  return Pattern::Concat({Pattern::Optional(Text("-")),
                          Pattern::Alternate({Text("0"), Pattern::Concat({Pattern::Chars({{'1', '9'}}),
                                                                          Digits(0, kMaxSafeDigits - 1)})})});
}

Pattern Number() {
  return Pattern::Concat({Integer(), Pattern::Optional(Pattern::Concat({Text("."), Digits(1, kMaxSafeDigits)})),
                          Pattern::Optional(Pattern::Concat(
                              {Pattern::Chars({{'e', 'e'}, {'E', 'E'}}),
                               Pattern::Optional(Pattern::Chars({{'+', '+'}, {'-', '-'}})), Digits(1, 2)}))});
}

Pattern Boolean() { return Pattern::Alternate({Text("true"), Text("false")}); }

// All of `one` in brackets, at least `min` and at most `max` of them.
Pattern List(std::string open, const Pattern& one, int min, int max, std::string close) {
  Pattern items = Pattern::Empty();
  if (max != 0) {
    const Pattern more = Pattern::Repeat(Pattern::Concat({Comma(), one}), std::max(min - 1, 0),
                                         max == Pattern::kUnbounded ? max : max - 1);
    items = Pattern::Concat({one, more});
    if (min == 0) items = Pattern::Optional(std::move(items));
  }
  return Pattern::Concat({Text(std::move(open)), std::move(items), Text(std::move(close))});
}

Pattern Map(const Pattern& value) {
  return List("{", Pattern::Concat({String(0, Pattern::kUnbounded), Colon(), value}), 0, Pattern::kUnbounded, "}");
}

Pattern Any(int depth) {
  std::vector<Pattern> kinds = {Text("null"), Boolean(), Number(), String(0, Pattern::kUnbounded)};
  if (depth > 0) {
    const Pattern inner = Any(depth - 1);
    kinds.push_back(List("[", inner, 0, Pattern::kUnbounded, "]"));
    kinds.push_back(Map(inner));
  }
  return Pattern::Alternate(std::move(kinds));
}

// The decimal numbers of `digits` digits from `low` to `high`, both of that many digits.
Pattern SameLengthRange(const std::string& low, const std::string& high, size_t from = 0) {
  if (from == low.size()) return Pattern::Empty();
  const auto rest = static_cast<int>(low.size() - from - 1);
  const std::string nines(low.size(), '9'), zeros(low.size(), '0');
  const auto digit = [](char first, char last) {
    return Pattern::Chars({{static_cast<unsigned char>(first), static_cast<unsigned char>(last)}});
  };
  if (low[from] == high[from])
    return Pattern::Concat({digit(low[from], low[from]), SameLengthRange(low, high, from + 1)});
  std::vector<Pattern> choices = {
      Pattern::Concat({digit(low[from], low[from]), SameLengthRange(low, nines, from + 1)}),
      Pattern::Concat({digit(high[from], high[from]), SameLengthRange(zeros, high, from + 1)})};
  if (low[from] + 1 < high[from]) {
    choices.push_back(Pattern::Concat({digit(low[from] + 1, high[from] - 1), Digits(rest, rest)}));
  }
  return Pattern::Alternate(std::move(choices));
}

// From `low` to `high`, 0 <= low <= high.
void AddNaturalRange(int64_t low, int64_t high, const std::string& sign, std::vector<Pattern>& choices) {
  for (std::string first = absl::StrCat(low), last = absl::StrCat(high);;) {
    const std::string end = first.size() < last.size() ? std::string(first.size(), '9') : last;
    choices.push_back(Pattern::Concat({Text(sign), SameLengthRange(first, end)}));
    if (first.size() == last.size()) return;
    first = "1" + std::string(first.size(), '0');
  }
}

Pattern IntegerRange(int64_t low, int64_t high) {
  std::vector<Pattern> choices;
  if (low < 0) AddNaturalRange(std::max<int64_t>(1, -high), -low, "-", choices);
  if (high >= 0) AddNaturalRange(std::max<int64_t>(0, low), high, "", choices);
  return Pattern::Alternate(std::move(choices));
}

std::string Quote(const std::string& text) {
  JsonValue value;
  value.type = Type::kString;
  value.string = text;
  return engine::WriteJson(value);
}

// The value as JSON text.
Pattern Literal(const JsonValue& value) {
  if (!value.is(Type::kArray) && !value.is(Type::kObject)) return Text(engine::WriteJson(value));
  const bool is_object = value.is(Type::kObject);
  std::vector<Pattern> parts = {Text(is_object ? "{" : "[")};
  for (size_t i = 0; i < value.items.size(); ++i) {
    if (i > 0) parts.push_back(Comma());
    if (is_object) parts.push_back(Pattern::Concat({Text(Quote(value.keys[i])), Colon()}));
    parts.push_back(Literal(value.items[i]));
  }
  parts.push_back(Text(is_object ? "}" : "]"));
  return Pattern::Concat(std::move(parts));
}

bool IsOfType(const JsonValue& value, const std::string& type) {
  switch (value.type) {
    case Type::kNull:
      return type == "null";
    case Type::kBool:
      return type == "boolean";
    case Type::kInt:
      return type == "integer" || type == "number";
    case Type::kNumber:
      return type == "number";
    case Type::kString:
      return type == "string";
    case Type::kArray:
      return type == "array";
    case Type::kObject:
      return type == "object";
  }
  return false;
}

// Keywords that say something about a schema and nothing about values. "format" is one by the specification's default.
bool IsAnnotation(const std::string& key) {
  static constexpr std::string_view kAnnotations[] = {
      "$schema", "$id",      "$comment", "$defs",      "definitions", "title",    "description",
      "default", "examples", "format",   "deprecated", "readOnly",    "writeOnly"};
  return std::find(std::begin(kAnnotations), std::end(kAnnotations), key) != std::end(kAnnotations);
}

class SchemaReader {
 public:
  explicit SchemaReader(const JsonValue& root) : root_(root) {}

  absl::StatusOr<Pattern> Read(const JsonValue& schema, const std::string& path) {
    if (schema.is(Type::kBool)) {
      if (!schema.boolean) return Error(path, "false allows no value");
      return Any(kAnyDepth);
    }
    if (!schema.is(Type::kObject)) return Error(path, absl::StrCat(schema.Describe(), " is no schema"));
    if (schema.Find("$ref") != nullptr) return ReadRef(schema, path);
    for (const char* key : {"anyOf", "oneOf", "allOf"}) {
      if (schema.Find(key) != nullptr) return ReadAlternatives(schema, key, path);
    }
    if (schema.Find("enum") != nullptr || schema.Find("const") != nullptr) return ReadValues(schema, path);
    const JsonValue* type = schema.Find("type");
    if (type == nullptr) {
      RETURN_IF_ERROR(AllowOnly(schema, {}, path));
      return Any(kAnyDepth);
    }
    if (type->is(Type::kString)) return ReadType(schema, type->string, path);
    if (!type->is(Type::kArray) || type->items.empty()) return Error(path + "/type", "is no type");
    std::vector<Pattern> alternatives;
    for (const JsonValue& one : type->items) {
      if (!one.is(Type::kString)) return Error(path + "/type", "is no type");
      // The keywords of one type mean nothing to the others.
      ASSIGN_OR_RETURN(Pattern pattern, ReadType(OnlyOf(schema, one.string), one.string, path));
      alternatives.push_back(std::move(pattern));
    }
    return Pattern::Alternate(std::move(alternatives));
  }

 private:
  static absl::Status Error(const std::string& path, const std::string& what) {
    return absl::InvalidArgumentError(absl::StrCat(path.empty() ? "/" : path, ": ", what));
  }

  static absl::Status AllowOnly(const JsonValue& schema, std::vector<std::string_view> keys, const std::string& path) {
    for (const std::string& key : schema.keys) {
      if (IsAnnotation(key) || key == "type" || std::find(keys.begin(), keys.end(), key) != keys.end()) continue;
      return Error(path, absl::StrCat("the keyword \"", key.substr(0, 64), "\" is not supported here"));
    }
    return absl::OkStatus();
  }

  static std::vector<std::string_view> KeywordsOf(const std::string& type) {
    if (type == "object") return {"properties", "required", "additionalProperties"};
    if (type == "array") return {"items", "minItems", "maxItems"};
    if (type == "string") return {"minLength", "maxLength", "pattern"};
    if (type == "integer") return {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"};
    return {};
  }

  // Without the keywords of other types than `type`.
  static JsonValue OnlyOf(const JsonValue& schema, const std::string& type) {
    const std::vector<std::string_view> own = KeywordsOf(type);
    JsonValue result;
    result.type = Type::kObject;
    for (size_t i = 0; i < schema.keys.size(); ++i) {
      bool is_others = false;
      for (const char* other : {"object", "array", "string", "integer"}) {
        const std::vector<std::string_view> keys = KeywordsOf(other);
        is_others |= std::find(keys.begin(), keys.end(), schema.keys[i]) != keys.end();
      }
      if (is_others && std::find(own.begin(), own.end(), schema.keys[i]) == own.end() && type != "number") continue;
      result.keys.push_back(schema.keys[i]);
      result.items.push_back(schema.items[i]);
    }
    return result;
  }

  absl::StatusOr<Pattern> ReadType(const JsonValue& schema, const std::string& type, const std::string& path) {
    RETURN_IF_ERROR(AllowOnly(schema, KeywordsOf(type), path));
    if (type == "object") return ReadObject(schema, path);
    if (type == "array") return ReadArray(schema, path);
    if (type == "string") return ReadString(schema, path);
    if (type == "integer") return ReadInteger(schema, path);
    if (type == "number") return Number();
    if (type == "boolean") return Boolean();
    if (type == "null") return Text("null");
    return Error(path + "/type", absl::StrCat("there is no type \"", type.substr(0, 64), "\""));
  }

  absl::StatusOr<Pattern> ReadRef(const JsonValue& schema, const std::string& path) {
    RETURN_IF_ERROR(AllowOnly(schema, {"$ref"}, path));
    const JsonValue* ref = schema.Find("$ref");
    for (const char* where : {"$defs", "definitions"}) {
      const std::string prefix = absl::StrCat("#/", where, "/");
      if (!ref->is(Type::kString) || ref->string.compare(0, prefix.size(), prefix) != 0) continue;
      const JsonValue* defs = root_.Find(where);
      const JsonValue* target = defs == nullptr ? nullptr : defs->Find(ref->string.substr(prefix.size()));
      if (target == nullptr) break;
      if (++num_refs_ > kMaxRefs) return Error(path, "a $ref that comes back to itself has no bounded language");
      absl::StatusOr<Pattern> result = Read(*target, absl::StrCat("/", where, "/", ref->string.substr(prefix.size())));
      --num_refs_;
      return result;
    }
    return Error(path + "/$ref", absl::StrCat(ref->Describe(), " names no definition of this schema"));
  }

  absl::StatusOr<Pattern> ReadAlternatives(const JsonValue& schema, const std::string& key, const std::string& path) {
    RETURN_IF_ERROR(AllowOnly(schema, {key}, path));
    if (schema.Find("type") != nullptr) return Error(path, absl::StrCat("type beside ", key, " is not supported"));
    const JsonValue& list = *schema.Find(key);
    if (!list.is(Type::kArray) || list.items.empty()) return Error(path + "/" + key, "is no list of schemas");
    if (key == "allOf" && list.items.size() > 1) return Error(path, "allOf of several schemas is not supported");
    std::vector<Pattern> alternatives;
    std::vector<std::string> types;
    for (size_t i = 0; i < list.items.size(); ++i) {
      ASSIGN_OR_RETURN(Pattern one, Read(list.items[i], absl::StrCat(path, "/", key, "/", i)));
      alternatives.push_back(std::move(one));
      const JsonValue* type = list.items[i].Find("type");
      std::string name = type != nullptr && type->is(Type::kString) ? type->string : "";
      if (name == "integer") name = "number";
      if (key == "oneOf" && (name.empty() || std::find(types.begin(), types.end(), name) != types.end())) {
        return Error(path, "oneOf needs a different type in each schema; anyOf does not");
      }
      types.push_back(std::move(name));
    }
    return Pattern::Alternate(std::move(alternatives));
  }

  absl::StatusOr<Pattern> ReadValues(const JsonValue& schema, const std::string& path) {
    RETURN_IF_ERROR(AllowOnly(schema, {"enum", "const"}, path));
    std::vector<JsonValue> values;
    if (const JsonValue* constant = schema.Find("const"); constant != nullptr) values.push_back(*constant);
    if (const JsonValue* list = schema.Find("enum"); list != nullptr) {
      if (!list->is(Type::kArray) || list->items.empty()) return Error(path + "/enum", "is no list of values");
      if (!values.empty()) return Error(path, "const beside enum is not supported");
      values = list->items;
    }
    const JsonValue* type = schema.Find("type");
    std::vector<Pattern> alternatives;
    for (const JsonValue& value : values) {
      if (type == nullptr || (type->is(Type::kString) && IsOfType(value, type->string))) {
        alternatives.push_back(Literal(value));
      }
    }
    if (alternatives.empty()) return Error(path, "no value of enum has the type");
    return Pattern::Alternate(std::move(alternatives));
  }

  // A count, or `fallback` when it is not there.
  static absl::StatusOr<int> Count(const JsonValue& schema, const char* key, int fallback, const std::string& path) {
    const JsonValue* value = schema.Find(key);
    if (value == nullptr) return fallback;
    if (!value->is(Type::kInt) || value->integer < 0 || value->integer > kMaxCount) {
      return Error(absl::StrCat(path, "/", key), absl::StrCat(value->Describe(), " outside [0, ", kMaxCount, "]"));
    }
    return static_cast<int>(value->integer);
  }

  absl::StatusOr<Pattern> ReadString(const JsonValue& schema, const std::string& path) {
    ASSIGN_OR_RETURN(const int min, Count(schema, "minLength", 0, path));
    ASSIGN_OR_RETURN(const int max, Count(schema, "maxLength", Pattern::kUnbounded, path));
    if (max != Pattern::kUnbounded && max < min) return Error(path, "maxLength below minLength");
    const JsonValue* pattern = schema.Find("pattern");
    if (pattern == nullptr) return String(min, max);
    if (schema.Find("minLength") != nullptr || schema.Find("maxLength") != nullptr) {
      return Error(path, "pattern beside a length is not supported: put the length into the pattern");
    }
    if (!pattern->is(Type::kString)) return Error(path + "/pattern", "is no string");
    absl::StatusOr<Pattern> inner = ParseRegex(pattern->string, {.search = true, .excluded = NotPlainInString()});
    if (!inner.ok()) return Error(path + "/pattern", std::string(inner.status().message()));
    return Pattern::Concat({Text("\""), *std::move(inner), Text("\"")});
  }

  // A bound of an integer; outside what `Integer` writes it is no bound.
  static absl::Status Bound(const JsonValue& schema, const char* key, int64_t step, std::optional<int64_t>& bound,
                            const std::string& path) {
    const JsonValue* value = schema.Find(key);
    if (value == nullptr) return absl::OkStatus();
    constexpr int64_t kLargest = 999'999'999'999'999;
    if (!value->is(Type::kInt) || value->integer < -kLargest || value->integer > kLargest) {
      return Error(absl::StrCat(path, "/", key), absl::StrCat(value->Describe(), " is no integer of 15 digits"));
    }
    const int64_t candidate = value->integer + step;
    const bool is_lower = step > 0 || std::string_view(key) == "minimum";
    bound = !bound.has_value() ? candidate : is_lower ? std::max(*bound, candidate) : std::min(*bound, candidate);
    return absl::OkStatus();
  }

  absl::StatusOr<Pattern> ReadInteger(const JsonValue& schema, const std::string& path) {
    std::optional<int64_t> low, high;
    RETURN_IF_ERROR(Bound(schema, "minimum", 0, low, path));
    RETURN_IF_ERROR(Bound(schema, "exclusiveMinimum", 1, low, path));
    RETURN_IF_ERROR(Bound(schema, "maximum", 0, high, path));
    RETURN_IF_ERROR(Bound(schema, "exclusiveMaximum", -1, high, path));
    if (!low.has_value() && !high.has_value()) return Integer();
    constexpr int64_t kLargest = 999'999'999'999'999;
    if (low.value_or(-kLargest) > high.value_or(kLargest)) return Error(path, "no integer is in the range");
    return IntegerRange(low.value_or(-kLargest), high.value_or(kLargest));
  }

  absl::StatusOr<Pattern> ReadArray(const JsonValue& schema, const std::string& path) {
    ASSIGN_OR_RETURN(const int min, Count(schema, "minItems", 0, path));
    ASSIGN_OR_RETURN(const int max, Count(schema, "maxItems", Pattern::kUnbounded, path));
    if (max != Pattern::kUnbounded && max < min) return Error(path, "maxItems below minItems");
    const JsonValue* items = schema.Find("items");
    if (items == nullptr) return List("[", Any(kAnyDepth - 1), min, max, "]");
    ASSIGN_OR_RETURN(const Pattern item, Read(*items, path + "/items"));
    return List("[", item, min, max, "]");
  }

  absl::StatusOr<Pattern> ReadObject(const JsonValue& schema, const std::string& path) {
    std::vector<std::string> required;
    if (const JsonValue* list = schema.Find("required"); list != nullptr) {
      if (!list->is(Type::kArray)) return Error(path + "/required", "is no list");
      for (const JsonValue& name : list->items) {
        if (!name.is(Type::kString)) return Error(path + "/required", "holds no name");
        required.push_back(name.string);
      }
    }
    const JsonValue* properties = schema.Find("properties");
    if (properties != nullptr && !properties->is(Type::kObject)) return Error(path + "/properties", "is no object");
    const JsonValue* additional = schema.Find("additionalProperties");
    const bool is_closed = additional != nullptr && additional->is(Type::kBool) && !additional->boolean;
    const bool has_properties = properties != nullptr && !properties->items.empty();
    if (!has_properties && required.empty()) {
      if (is_closed) return Text("{}");
      if (additional == nullptr) return Map(Any(kAnyDepth - 1));
      ASSIGN_OR_RETURN(const Pattern value, Read(*additional, path + "/additionalProperties"));
      return Map(value);
    }
    std::vector<std::pair<Pattern, bool>> members;
    for (size_t i = 0; has_properties && i < properties->items.size(); ++i) {
      const std::string& name = properties->keys[i];
      ASSIGN_OR_RETURN(Pattern value, Read(properties->items[i], absl::StrCat(path, "/properties/", name)));
      const auto found = std::find(required.begin(), required.end(), name);
      members.emplace_back(Pattern::Concat({Text(Quote(name)), Colon(), std::move(value)}), found != required.end());
      required.erase(std::remove(required.begin(), required.end(), name), required.end());
    }
    for (const std::string& name : required) {
      if (additional != nullptr) return Error(path, absl::StrCat("\"", name, "\" is required but no property"));
      members.emplace_back(Pattern::Concat({Text(Quote(name)), Colon(), Any(kAnyDepth - 1)}), true);
    }
    return Pattern::Concat({Text("{"), Pattern::Separated(members, Comma()), Text("}")});
  }

  const JsonValue& root_;
  int num_refs_ = 0;
};

}  // namespace

absl::StatusOr<Pattern> ParseJsonSchema(std::string_view text) {
  JsonValue schema;
  std::string error;
  engine::JsonLimits limits;
  limits.max_values = 10'000;
  limits.max_depth = 32;
  if (!engine::ParseJson(text.data(), static_cast<int64_t>(text.size()), limits, &schema, &error)) {
    return absl::InvalidArgumentError(absl::StrCat("is not JSON: ", error));
  }
  return SchemaReader(schema).Read(schema, "");
}

Pattern AnyJsonObject() { return Map(Any(kAnyDepth)); }

}  // namespace minitron::server::constraint
