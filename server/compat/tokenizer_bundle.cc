#include "server/compat/tokenizer_bundle.h"

#include <openssl/sha.h>
#include <zlib.h>

#include <filesystem>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/small_file.h"

namespace minitron::server::compat {
namespace {

// What a gateway's loaders look for, in the archive's order.
constexpr const char* kFiles[] = {"tokenizer.json",          "tokenizer_config.json", "tokenizer.model",
                                  "special_tokens_map.json", "added_tokens.json",     "chat_template.jinja",
                                  "chat_template.json",      "config.json",           "generation_config.json"};

// Fields of a zip archive, little-endian (PKWARE's APPNOTE 6.3, sections 4.3.7, 4.3.12 and 4.3.16).
void Put16(std::string& out, uint32_t value) {
  out += static_cast<char>(value & 0xFF);
  out += static_cast<char>(value >> 8 & 0xFF);
}
void Put32(std::string& out, size_t value) {
  Put16(out, static_cast<uint32_t>(value));
  Put16(out, static_cast<uint32_t>(value >> 16));
}

constexpr uint32_t kVersion = 10;         // 1.0: stored files in no folder
constexpr uint32_t kNoTime = 0x00210000;  // midnight of 1980-01-01, the first that can be said

// What a file's own header and its line in the directory have in common.
std::string MakeEntry(const std::string& name, const std::string& content) {
  std::string out;
  Put16(out, kVersion);
  Put16(out, 0);  // flags
  Put16(out, 0);  // stored
  Put32(out, kNoTime);
  Put32(out, crc32(0, reinterpret_cast<const Bytef*>(content.data()), static_cast<uInt>(content.size())));
  Put32(out, content.size());
  Put32(out, content.size());
  Put16(out, static_cast<uint32_t>(name.size()));
  Put16(out, 0);  // extra fields
  return out;
}

std::string HexSha256(const std::string& bytes) {
  std::string digest(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(),
         reinterpret_cast<unsigned char*>(digest.data()));
  return absl::BytesToHexString(digest);
}

absl::Status CannotSend(const char* name, const std::string& why) {
  return absl::FailedPreconditionError(absl::StrCat(name, " of the served model cannot be sent: ", why));
}

}  // namespace

std::string MakeZip(const std::vector<std::pair<std::string, std::string>>& files) {
  std::string out;
  std::string directory;
  for (const auto& [name, content] : files) {
    const size_t offset = out.size();
    const std::string entry = MakeEntry(name, content);
    Put32(out, 0x04034B50);
    absl::StrAppend(&out, entry, name, content);
    Put32(directory, 0x02014B50);
    Put16(directory, kVersion);
    directory += entry;
    Put16(directory, 0);  // comment
    Put16(directory, 0);  // disk
    Put16(directory, 0);  // internal attributes
    Put32(directory, 0);  // external attributes
    Put32(directory, offset);
    directory += name;
  }
  const size_t directory_offset = out.size();
  out += directory;
  Put32(out, 0x06054B50);
  Put16(out, 0);  // disk
  Put16(out, 0);  // disk of the directory
  Put16(out, static_cast<uint32_t>(files.size()));
  Put16(out, static_cast<uint32_t>(files.size()));
  Put32(out, directory.size());
  Put32(out, directory_offset);
  Put16(out, 0);  // comment
  return out;
}

absl::StatusOr<TokenizerBundle> ReadTokenizerBundle(const std::string& model_dir, int64_t max_bytes) {
  std::vector<std::pair<std::string, std::string>> files;
  int64_t bytes_left = max_bytes;
  for (const char* name : kFiles) {
    const std::filesystem::path path = std::filesystem::path(model_dir) / name;
    std::error_code error;
    if (std::filesystem::status(path, error).type() == std::filesystem::file_type::not_found) continue;
    absl::StatusOr<std::string> content = ReadSmallFile(path.string(), bytes_left);
    if (absl::IsNotFound(content.status())) return CannotSend(name, "it cannot be read");
    if (!content.ok()) {
      return CannotSend(name, absl::StrCat("no regular file, or more than ", max_bytes, " bytes with the others"));
    }
    bytes_left -= static_cast<int64_t>(content->size());
    files.emplace_back(name, *std::move(content));
  }
  if (files.empty()) return absl::FailedPreconditionError("the served model has no tokenizer files that can be sent");
  TokenizerBundle bundle;
  bundle.zip = MakeZip(files);
  bundle.sha256 = HexSha256(bundle.zip);
  return bundle;
}

}  // namespace minitron::server::compat
