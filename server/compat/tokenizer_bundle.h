// The tokenizer's files as gateways fetch them: one zip archive. Pure but for reading the files.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace minitron::server::compat {

// What an archive may be: the largest tokenizer of this family has 23 MB, and gateways stop reading at 200 MiB.
inline constexpr int64_t kMaxTokenizerBundleBytes = 128 << 20;

struct TokenizerBundle {
  std::string zip;
  std::string sha256;  // of `zip`, 64 lower-case hexadecimal digits
};

// The bytes of a zip archive of (name, content), in this order, stored without compression and without times: the same
// files give the same bytes. Require: names are plain file names; together less than 4 GiB.
std::string MakeZip(const std::vector<std::pair<std::string, std::string>>& files);

// Those of the known tokenizer and configuration files that are in the model's folder.
// Errors, naming the file but not the folder: FAILED_PRECONDITION when there is none, when one is no regular file or
// cannot be read, or when they are longer than `max_bytes` together.
absl::StatusOr<TokenizerBundle> ReadTokenizerBundle(const std::string& model_dir,
                                                    int64_t max_bytes = kMaxTokenizerBundleBytes);

}  // namespace minitron::server::compat
