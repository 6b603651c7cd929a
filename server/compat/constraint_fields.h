// What JSON protocols say of the form of the output, read into the native constraint: OpenAI's response_format, and
// vLLM's guided_json, guided_regex, guided_grammar and guided_choice, also inside structured_outputs. Pure.
#pragma once

#include <minitron/v1/generation.pb.h>

#include <string>

#include "absl/status/statusor.h"
#include "engine/checkpoint/json.h"

namespace minitron::server::compat {

// As ReadSamplingField. Errors: INVALID_ARGUMENT, also for a second constraint.
absl::StatusOr<bool> ReadConstraintField(const std::string& key, const engine::JsonValue& value,
                                         v1::GenerationTask& task);

}  // namespace minitron::server::compat
