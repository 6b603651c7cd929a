// Reading a small file whole: configuration, certificates, a tokenizer.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace minitron::server {

// Errors, naming the path: NOT_FOUND when it cannot be opened, INVALID_ARGUMENT when it is no regular file or longer
// than `max_bytes`.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path, int64_t max_bytes);

}  // namespace minitron::server
