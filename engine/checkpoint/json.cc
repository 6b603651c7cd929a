#include "engine/checkpoint/json.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

namespace minitron::engine {
namespace {

constexpr size_t kMaxDescribedBytes = 64;

// Builds a JsonValue tree from SAX events. The parser keeps its own state in a heap vector, so nesting costs no stack;
// the depth limit bounds the recursion of ~JsonValue.
class TreeBuilder {
 public:
  TreeBuilder(const JsonLimits& limits, JsonValue* root, std::string* error)
      : limits_(limits), root_(root), error_(error) {}

  bool null() { return Add(JsonValue::Type::kNull) != nullptr; }
  bool boolean(bool b) {
    JsonValue* value = Add(JsonValue::Type::kBool);
    if (value != nullptr) value->boolean = b;
    return value != nullptr;
  }
  bool number_integer(int64_t i) {
    JsonValue* value = Add(JsonValue::Type::kInt);
    if (value == nullptr) return false;
    value->integer = i;
    value->number = static_cast<double>(i);
    return true;
  }
  bool number_unsigned(uint64_t u) {
    if (u > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return AddNumber(static_cast<double>(u));
    return number_integer(static_cast<int64_t>(u));
  }
  bool number_float(double d, const std::string&) { return AddNumber(d); }
  bool string(std::string& s) {
    JsonValue* value = Add(JsonValue::Type::kString);
    if (value != nullptr) value->string = std::move(s);
    return value != nullptr;
  }
  bool binary(nlohmann::json::binary_t&) { return Fail("binary value"); }

  bool start_object(size_t) { return Open(JsonValue::Type::kObject); }
  bool start_array(size_t) { return Open(JsonValue::Type::kArray); }
  bool key(std::string& k) {
    open_.back()->keys.push_back(std::move(k));
    return true;
  }
  bool end_object() {
    const JsonValue* object = open_.back();
    open_.pop_back();
    std::vector<const std::string*> sorted;
    sorted.reserve(object->keys.size());
    for (const std::string& k : object->keys) sorted.push_back(&k);
    std::sort(sorted.begin(), sorted.end(), [](const auto* a, const auto* b) { return *a < *b; });
    const auto twin =
        std::adjacent_find(sorted.begin(), sorted.end(), [](const auto* a, const auto* b) { return *a == *b; });
    return twin == sorted.end() || Fail("duplicate key \"" + (*twin)->substr(0, kMaxDescribedBytes) + "\"");
  }
  bool end_array() {
    open_.pop_back();
    return true;
  }
  bool parse_error(size_t position, const std::string&, const nlohmann::json::exception&) {
    return Fail("not valid JSON at byte " + std::to_string(position));
  }

 private:
  bool Fail(const std::string& message) {
    *error_ = message;
    return false;
  }

  // The slot for the next value. Only the innermost open container grows, so the pointers in open_ stay valid.
  JsonValue* Add(JsonValue::Type type) {
    if (++num_values_ > limits_.max_values) {
      Fail("more than " + std::to_string(limits_.max_values) + " values");
      return nullptr;
    }
    JsonValue* value = root_;
    if (!open_.empty()) value = &open_.back()->items.emplace_back();
    value->type = type;
    return value;
  }
  bool AddNumber(double d) {
    JsonValue* value = Add(JsonValue::Type::kNumber);
    if (value != nullptr) value->number = d;
    return value != nullptr;
  }
  bool Open(JsonValue::Type type) {
    if (static_cast<int>(open_.size()) >= limits_.max_depth) {
      return Fail("nested deeper than " + std::to_string(limits_.max_depth));
    }
    JsonValue* value = Add(type);
    if (value == nullptr) return false;
    open_.push_back(value);
    return true;
  }

  const JsonLimits& limits_;
  JsonValue* const root_;     // the caller's
  std::string* const error_;  // the caller's
  std::vector<JsonValue*> open_;
  int64_t num_values_ = 0;
};

}  // namespace

const JsonValue* JsonValue::Find(const std::string& key) const {
  if (type != Type::kObject) return nullptr;
  const auto found = std::find(keys.begin(), keys.end(), key);
  return found == keys.end() ? nullptr : &items[found - keys.begin()];
}

std::string JsonValue::Describe() const {
  switch (type) {
    case Type::kNull:
      return "null";
    case Type::kBool:
      return boolean ? "true" : "false";
    case Type::kInt:
      return std::to_string(integer);
    case Type::kNumber: {
      char text[40];
      std::snprintf(text, sizeof(text), "%.9g", number);
      return text;
    }
    case Type::kString:
      return '"' + string.substr(0, kMaxDescribedBytes) + (string.size() > kMaxDescribedBytes ? "...\"" : "\"");
    case Type::kArray: {
      std::string text = "[";
      for (size_t i = 0; i < items.size() && text.size() < kMaxDescribedBytes; ++i) {
        const bool scalar = items[i].type != Type::kArray && items[i].type != Type::kObject;
        text += (i == 0 ? "" : ", ") + (scalar ? items[i].Describe() : "...");
      }
      return text + (text.size() < kMaxDescribedBytes ? "]" : ", ...]");
    }
    case Type::kObject:
      return items.empty() ? "{}" : "{\"" + keys[0].substr(0, kMaxDescribedBytes) + "\": ...}";
  }
  return "?";
}

bool ParseJson(const char* text, int64_t num_bytes, const JsonLimits& limits, JsonValue* value, std::string* error) {
  *value = JsonValue();
  if (num_bytes > limits.max_bytes) {
    *error = std::to_string(num_bytes) + " bytes of JSON, limit " + std::to_string(limits.max_bytes);
    return false;
  }
  // The library takes a NUL byte for the end of its input and would ignore whatever follows it.
  if (num_bytes > 0 && std::memchr(text, '\0', num_bytes) != nullptr) {
    *error = "not valid JSON: holds a NUL byte";
    return false;
  }
  TreeBuilder builder(limits, value, error);
  return nlohmann::json::sax_parse(text, text + num_bytes, &builder);
}

namespace {

std::string QuoteJson(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      result += '\\';
      result += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof(escaped), "\\u%04x", static_cast<unsigned>(c));
      result += escaped;
    } else {
      result += c;
    }
  }
  return result + '"';
}

}  // namespace

std::string WriteJson(const JsonValue& value) {
  switch (value.type) {
    case JsonValue::Type::kString:
      return QuoteJson(value.string);
    case JsonValue::Type::kNumber: {
      char text[40];
      std::snprintf(text, sizeof(text), "%.17g", value.number);
      return text;
    }
    case JsonValue::Type::kArray:
    case JsonValue::Type::kObject:
      break;
    default:
      return value.Describe();
  }
  const bool is_object = value.is(JsonValue::Type::kObject);
  std::string text = is_object ? "{" : "[";
  for (size_t i = 0; i < value.items.size(); ++i) {
    if (i > 0) text += ',';
    if (is_object) text += QuoteJson(value.keys[i]) + ':';
    text += WriteJson(value.items[i]);
  }
  return text + (is_object ? '}' : ']');
}

}  // namespace minitron::engine
