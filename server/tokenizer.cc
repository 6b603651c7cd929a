#include "server/tokenizer.h"

#include <openssl/sha.h>

#include <filesystem>
#include <functional>
#include <set>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "engine/base/log.h"
#include "engine/base/status_macros.h"
#include "server/small_file.h"
#include "server/spm_proto.h"
#include "server/utf8.h"

namespace minitron::server {
namespace {

constexpr std::string_view kSpaceSymbol = "\xE2\x96\x81";

const char* OnOff(bool value) { return value ? "on" : "off"; }

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<SpmModel> spm, int vocab_size) : spm_(std::move(spm)), vocab_size_(vocab_size) {
  std::set<size_t, std::greater<>> lengths;
  for (int id = 0; id < spm_->vocab_size(); ++id) {
    if (!IsSpecial(id)) continue;
    const std::string& piece = spm_->Piece(id);
    special_ids_.emplace(piece, id);
    special_first_byte_[static_cast<uint8_t>(piece[0])] = true;
    lengths.insert(piece.size());
  }
  special_lengths_.assign(lengths.begin(), lengths.end());
}

absl::StatusOr<TokenizerFile> ReadTokenizerFile(const std::string& model_dir, const std::string& sha256) {
  TokenizerFile file;
  file.path = (std::filesystem::path(model_dir) / "tokenizer.model").string();
  ASSIGN_OR_RETURN(file.bytes, ReadSmallFile(file.path, kMaxSpmFileBytes));
  std::array<unsigned char, SHA256_DIGEST_LENGTH> digest;
  SHA256(reinterpret_cast<const unsigned char*>(file.bytes.data()), file.bytes.size(), digest.data());
  file.sha256 = absl::BytesToHexString({reinterpret_cast<const char*>(digest.data()), digest.size()});
  if (sha256.empty() || sha256 == file.sha256) return file;
  return absl::FailedPreconditionError(
      absl::StrCat("--tokenizer-sha256=", sha256, ": ", file.path, " has ", file.sha256));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& model_dir, int vocab_size,
                                                           const std::string& sha256) {
  ASSIGN_OR_RETURN(const TokenizerFile file, ReadTokenizerFile(model_dir, sha256));
  std::string error;
  std::unique_ptr<SpmModel> spm = SpmModel::Parse(file.bytes, &error);
  if (spm == nullptr) return absl::InvalidArgumentError(absl::StrCat(file.path, ": ", error));
  if (spm->vocab_size() > vocab_size) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.path, ": ", spm->vocab_size(), " pieces, but the model's vocabulary has ", vocab_size));
  }
  const SpmModel::Flags& flags = spm->flags();
  base::LogInfo(absl::StrCat("tokenizer loaded pieces=", spm->vocab_size(), " normalizer=", flags.normalizer,
                             " dummy_prefix=", OnOff(flags.add_dummy_prefix), " remove_extra_whitespaces=",
                             OnOff(flags.remove_extra_whitespaces), " byte_fallback=", OnOff(flags.byte_fallback),
                             " bos=", spm->bos_id(), " eos=", spm->eos_id(), " sha256=", file.sha256));
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(spm), vocab_size));
}

std::pair<size_t, TokenId> Tokenizer::SpecialAt(std::string_view text) const {
  if (!special_first_byte_[static_cast<uint8_t>(text[0])]) return {0, -1};
  for (const size_t length : special_lengths_) {
    if (length > text.size()) continue;
    const auto found = special_ids_.find(text.substr(0, length));
    if (found != special_ids_.end()) return {length, found->second};
  }
  return {0, -1};
}

std::vector<TokenId> Tokenizer::Encode(std::string_view text, const EncodeOptions& options) const {
  std::vector<TokenId> ids;
  if (options.add_bos && bos_id() >= 0) ids.push_back(bos_id());
  const auto append_plain = [&](size_t begin, size_t end) {
    if (begin == end) return;
    const std::vector<int> part = spm_->Encode(text.substr(begin, end - begin), /*at_text_start=*/begin == 0);
    ids.insert(ids.end(), part.begin(), part.end());
  };
  size_t plain_begin = 0;
  for (size_t i = 0; options.parse_special && i < text.size();) {
    const auto [length, id] = SpecialAt(text.substr(i));
    if (length == 0) {
      ++i;
      continue;
    }
    append_plain(plain_begin, i);
    ids.push_back(id);
    i += length;
    plain_begin = i;
  }
  append_plain(plain_begin, text.size());
  return ids;
}

std::string Tokenizer::TokenBytes(TokenId id, bool skip_special) const {
  if (id < 0 || id >= num_pieces()) return "";
  const std::string& piece = spm_->Piece(id);
  switch (spm_->Type(id)) {
    case SpmModel::PieceType::kControl:
    case SpmModel::PieceType::kUserDefined:
      return skip_special ? "" : piece;
    case SpmModel::PieceType::kUnknown:
      return spm_->unk_surface();
    case SpmModel::PieceType::kByte:  // "<0xNN>", checked at load
      return std::string(1, static_cast<char>(std::stoi(piece.substr(3, 2), nullptr, 16)));
    default:
      break;
  }
  std::string bytes;
  std::string_view rest = piece;
  while (!rest.empty()) {
    const bool space = rest.starts_with(kSpaceSymbol);
    bytes.push_back(space ? ' ' : rest[0]);
    rest.remove_prefix(space ? kSpaceSymbol.size() : 1);
  }
  return bytes;
}

std::string Tokenizer::NextBytes(TokenId id, bool skip_special, bool& at_start) const {
  std::string bytes = TokenBytes(id, skip_special);
  if (!at_start || bytes.empty()) return bytes;
  const SpmModel::PieceType type = spm_->Type(id);
  const bool text_piece = type == SpmModel::PieceType::kNormal || type == SpmModel::PieceType::kUnused;
  // As sentencepiece: with remove_extra_whitespaces a text never starts with a space, so the strip goes on until there
  // is text.
  const bool strips = spm_->flags().add_dummy_prefix || spm_->flags().remove_extra_whitespaces;
  if (text_piece && strips && bytes[0] == ' ') bytes.erase(0, 1);
  at_start = bytes.empty() && spm_->flags().remove_extra_whitespaces;
  return bytes;
}

std::string Tokenizer::Decode(const std::vector<TokenId>& ids, const DecodeOptions& options) const {
  std::string text;
  std::string held;
  bool at_start = options.at_text_start;
  for (const TokenId id : ids) AppendUtf8(held, NextBytes(id, options.skip_special, at_start), text);
  if (!held.empty()) text.append(kReplacementCharacter);
  return text;
}

bool Tokenizer::IsSpecial(TokenId id) const {
  if (id < 0 || id >= num_pieces()) return false;
  const SpmModel::PieceType type = spm_->Type(id);
  return type == SpmModel::PieceType::kControl || type == SpmModel::PieceType::kUserDefined;
}

int Tokenizer::num_pieces() const { return spm_->vocab_size(); }
int Tokenizer::vocab_size() const { return vocab_size_; }
bool Tokenizer::add_dummy_prefix() const { return spm_->flags().add_dummy_prefix; }
TokenId Tokenizer::bos_id() const { return spm_->bos_id(); }
const SpmModel& Tokenizer::spm() const { return *spm_; }

}  // namespace minitron::server
