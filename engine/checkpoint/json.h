// A JSON reader for untrusted files: bounded, no duplicate keys, no exceptions. std only; the library behind it
// (nlohmann-json, through its non-recursive SAX interface) stays in json.cc.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace minitron::engine {

// One value. Of the payload fields only those of `type` mean anything.
struct JsonValue {
  enum class Type { kNull, kBool, kInt, kNumber, kString, kArray, kObject };

  Type type = Type::kNull;
  bool boolean = false;
  int64_t integer = 0;            // kInt: written without point or exponent, and fits
  double number = 0.0;            // kInt and kNumber; always finite
  std::string string;             // valid UTF-8; may hold NUL
  std::vector<std::string> keys;  // kObject: keys[i] names items[i], in file order, all different
  std::vector<JsonValue> items;   // kArray and kObject

  bool is(Type t) const { return type == t; }

  // The member `key` of an object; null when there is none or this is no object. Linear in the members.
  const JsonValue* Find(const std::string& key) const;

  // For error messages: the value as JSON, containers and long strings abridged.
  std::string Describe() const;
};

struct JsonLimits {
  int64_t max_bytes = 1 << 20;
  int64_t max_values = 100'000;  // scalars and containers together; one takes about 120 bytes
  int max_depth = 64;            // of nested containers
};

// Parses one JSON text with nothing but white space around it. False, with a one-line `error`, on malformed text,
// invalid UTF-8, NUL bytes, numbers outside double, duplicate keys, or a limit passed.
bool ParseJson(const char* text, int64_t num_bytes, const JsonLimits& limits, JsonValue* value, std::string* error);

// The value as compact JSON text; numbers so that they read back the same.
std::string WriteJson(const JsonValue& value);

}  // namespace minitron::engine
