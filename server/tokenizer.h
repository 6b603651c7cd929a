// Tokenizer: text to token ids and back, with the project's rules for BOS, special tokens and bytes.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/sampling_params.h"
#include "server/spm_model.h"

namespace minitron::server {

using engine::TokenId;

struct EncodeOptions {
  bool add_bos = false;
  // Turn the spelling of control and user-defined pieces ("</s>", "<extra_id_1>") into those tokens. Off: control
  // pieces stay plain text. (sentencepiece itself always matches user-defined pieces when off too? No: they stay text
  // as well.)
  bool parse_special = false;
};

struct DecodeOptions {
  bool skip_special = true;  // leave control and user-defined pieces out
  // The ids start a text: drop the one leading space the model's dummy prefix put there. Generated text continues a
  // prompt, so it is decoded with false.
  bool at_text_start = false;
};

// Immutable after Load; thread-safe.
class Tokenizer {
 public:
  // Loads `model_dir`/tokenizer.model and logs its flags.
  // Errors: NOT_FOUND, INVALID_ARGUMENT (unreadable; or more pieces than `vocab_size`, the model's).
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& model_dir, int vocab_size);

  std::vector<TokenId> Encode(std::string_view text, const EncodeOptions& options) const;

  // The whole text at once; invalid UTF-8 becomes U+FFFD, one per maximal ill-formed part (Unicode 3.9, table 3-8).
  std::string Decode(const std::vector<TokenId>& ids, const DecodeOptions& options) const;

  // The bytes a token stands for inside a text: "▁" is a space, a byte piece its byte, a special piece its spelling
  // (empty with skip_special). Ids past the tokenizer's pieces (padding of the embedding) are empty.
  std::string TokenBytes(TokenId id, bool skip_special) const;

  bool IsSpecial(TokenId id) const;
  int num_pieces() const;  // of the tokenizer; the model's vocabulary may be padded beyond it
  int vocab_size() const;  // of the model
  bool add_dummy_prefix() const;
  TokenId bos_id() const;  // -1 when there is none
  const SpmModel& spm() const;

 private:
  Tokenizer(std::unique_ptr<SpmModel> spm, int vocab_size);
  std::unique_ptr<SpmModel> spm_;
  int vocab_size_;
  // Spellings of special pieces with ids, longest first, for parse_special.
  std::vector<std::pair<std::string, TokenId>> special_pieces_;
};

}  // namespace minitron::server
