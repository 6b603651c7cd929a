// The sampling fields of protocols that speak JSON (vLLM's and OpenAI's names), read into the native task. Only types
// are checked here; ranges are the request builder's. Pure.
#pragma once

#include <minitron/v1/generation.pb.h>

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/checkpoint/json.h"

namespace minitron::server::compat {

// How strictly values are typed.
enum class JsonTyping {
  kStrict,
  kStringsAllowed,  // "128" is 128 and "true" is true: some clients write all values as strings
};

// Typed reads of one value; an error names `field`.
absl::StatusOr<double> ReadNumber(const std::string& field, const engine::JsonValue& value, JsonTyping typing);
absl::StatusOr<int64_t> ReadInteger(const std::string& field, const engine::JsonValue& value, JsonTyping typing);
absl::StatusOr<uint32_t> ReadUint32(const std::string& field, const engine::JsonValue& value, JsonTyping typing);
absl::StatusOr<bool> ReadBool(const std::string& field, const engine::JsonValue& value, JsonTyping typing);
absl::StatusOr<std::string> ReadString(const std::string& field, const engine::JsonValue& value);
// One string or a list of strings.
absl::StatusOr<std::vector<std::string>> ReadStrings(const std::string& field, const engine::JsonValue& value);
absl::StatusOr<std::vector<uint32_t>> ReadTokenIds(const std::string& field, const engine::JsonValue& value,
                                                   JsonTyping typing);

// Reads the field `key` into `task`. Null leaves it unset. Returns whether `key` is a sampling field at all.
// Errors: INVALID_ARGUMENT with the field for a wrong type, or for a value that would need what this server has not
// (beam search).
absl::StatusOr<bool> ReadSamplingField(const std::string& key, const engine::JsonValue& value, JsonTyping typing,
                                       v1::GenerationTask& task);

// INVALID_ARGUMENT: `field` is not known.
absl::Status UnknownField(const std::string& field);

}  // namespace minitron::server::compat
