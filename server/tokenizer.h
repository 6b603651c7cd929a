// Tokenizer: text to token ids and back, with the project's rules for BOS, special tokens and bytes.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/sampling_params.h"
#include "server/spm_model.h"

namespace minitron::server {

using engine::TokenId;

struct EncodeOptions {
  // Put the BOS token in front, if the model has one. Off by default: Minitron is trained and evaluated without.
  bool add_bos = false;
  // On: the spelling of a control or user-defined piece ("</s>", "<extra_id_1>") becomes that one token, the longest
  // spelling first. The text between is encoded part by part, and only a plain part at the very start of the text gets
  // the dummy prefix. Off: such spellings are plain text and become the tokens of their characters, so a prompt cannot
  // forge a turn or an end of sequence.
  bool parse_special = false;
};

struct DecodeOptions {
  bool skip_special = true;  // leave control and user-defined pieces out
  // The ids start a text: drop the one leading space the model's dummy prefix put there. Generated text continues a
  // prompt, so it is decoded with false.
  bool at_text_start = false;
};

// The bytes of `model_dir`/tokenizer.model and their SHA-256 in hex.
struct TokenizerFile {
  std::string path;
  std::string bytes;
  std::string sha256;
};

// Errors: NOT_FOUND; INVALID_ARGUMENT (no regular file, longer than 64 MiB); FAILED_PRECONDITION, naming the flag, when
// `sha256` is not empty and not the file's.
absl::StatusOr<TokenizerFile> ReadTokenizerFile(const std::string& model_dir, const std::string& sha256);

// Immutable after Load; thread-safe.
class Tokenizer {
 public:
  // Loads `model_dir`/tokenizer.model and logs its flags and hash. With a `sha256` (64 lower-case hex digits) nothing
  // looks at the bytes before they have it.
  // Errors: as ReadTokenizerFile's; INVALID_ARGUMENT (no sentencepiece model that SpmModel takes, or more pieces than
  // `vocab_size`, the model's).
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& model_dir, int vocab_size,
                                                         const std::string& sha256 = "");

  // `text` should be valid UTF-8; invalid bytes become U+FFFD each. At most n log n in the text; the caller bounds its
  // length.
  std::vector<TokenId> Encode(std::string_view text, const EncodeOptions& options) const;

  // The whole text at once; invalid UTF-8 becomes U+FFFD, one per maximal ill-formed part (Unicode 3.9, table 3-8).
  std::string Decode(const std::vector<TokenId>& ids, const DecodeOptions& options) const;

  // The bytes a token stands for inside a text: "▁" is a space, a byte piece its byte, a special piece its spelling
  // (empty with skip_special), the unknown piece " ⁇ " as in sentencepiece. Ids past the tokenizer's pieces (padding of
  // the embedding) and negative ids are empty.
  std::string TokenBytes(TokenId id, bool skip_special) const;

  // TokenBytes without the space of the dummy prefix when `at_start` is true. Clears `at_start` at the first token that
  // stands for text. The step of Decode and Detokenizer.
  std::string NextBytes(TokenId id, bool skip_special, bool& at_start) const;

  // Control or user-defined.
  bool IsSpecial(TokenId id) const;
  int num_pieces() const;  // of the tokenizer; the model's vocabulary may be padded beyond it
  int vocab_size() const;  // of the model
  bool add_dummy_prefix() const;
  TokenId bos_id() const;  // -1 when there is none
  const SpmModel& spm() const;

 private:
  Tokenizer(std::unique_ptr<SpmModel> spm, int vocab_size);

  // The special piece spelled at the start of `text`: its length in bytes and id; 0 and -1 when there is none.
  std::pair<size_t, TokenId> SpecialAt(std::string_view text) const;

  std::unique_ptr<SpmModel> spm_;
  int vocab_size_;
  // Spellings of special pieces; keys live in spm_. Found by length, so that a text full of "<" costs one look-up per
  // distinct length and position, not one per piece.
  std::unordered_map<std::string_view, TokenId> special_ids_;
  std::vector<size_t> special_lengths_;  // distinct, longest first
  std::array<bool, 256> special_first_byte_{};
};

}  // namespace minitron::server
