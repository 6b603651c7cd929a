// SpmModel: a sentencepiece model (tokenizer.model): its pieces and flags, and text to ids. std only: the wall around
// the library, whose header does not compile beside abseil's.
//
// The library sees nothing of a file but what spm_proto has checked and written anew (its own loader crashes on hostile
// files, CVE-2026-1260), with the special pieces under names that no text can spell.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace minitron::server {

// Immutable after Load; thread-safe.
class SpmModel {
 public:
  enum class PieceType { kNormal, kUnknown, kControl, kUserDefined, kByte, kUnused };

  // The flags of the file that change what text becomes. Logged at start.
  struct Flags {
    bool add_dummy_prefix = false;
    bool remove_extra_whitespaces = false;
    bool escape_whitespaces = true;
    bool byte_fallback = false;
    std::string normalizer;  // "identity", "nmt_nfkc", ...
  };

  // Reads the bytes of a tokenizer.model file: at most 64 MiB, of any of the four model types (unigram, BPE, word,
  // character), checked as ParseSpmProto says. On failure returns null and sets *error to one line with the cause.
  static std::unique_ptr<SpmModel> Parse(std::string_view data, std::string* error);
  ~SpmModel();

  const Flags& flags() const;
  int vocab_size() const;
  // Ids of one text, without BOS. Never gives a control or user-defined piece, whatever the text spells: the result is
  // what sentencepiece gives for the same model with its user-defined pieces declared control. Invalid UTF-8 becomes
  // U+FFFD per byte, as in sentencepiece. `at_text_start` false: no dummy prefix (a part in the middle of a text).
  // n log n in the text. Empty when the library fails, which it does for no model that Parse accepts.
  std::vector<int> Encode(std::string_view text, bool at_text_start = true) const;
  // The id of an exact piece of any type, or -1.
  int PieceToId(std::string_view piece) const;
  // Require: 0 <= id < vocab_size().
  const std::string& Piece(int id) const;
  PieceType Type(int id) const;
  // What the unknown piece reads as in decoded text; " U+2047 " unless the file says otherwise.
  const std::string& unk_surface() const;
  int bos_id() const;  // -1 when the file has none
  int eos_id() const;
  int unk_id() const;
  int pad_id() const;

 private:
  struct Impl;
  explicit SpmModel(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace minitron::server
