// JSON Schema as a pattern over JSON text: compact, at most one space after "," and ":", properties in the schema's
// order. What is generated always validates; a keyword that could not be kept is refused by name.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "server/constraint/pattern.h"

namespace minitron::server::constraint {

// type, enum, const, properties, required, additionalProperties, items, minItems, maxItems, minLength, maxLength,
// pattern, minimum and maximum (of integers, also exclusive), anyOf, oneOf (of different types), $ref into $defs
// (not recursive). Errors: INVALID_ARGUMENT naming the place in the schema.
absl::StatusOr<Pattern> ParseJsonSchema(std::string_view text);

// Any JSON object, containers nested at most three deep.
Pattern AnyJsonObject();

}  // namespace minitron::server::constraint
