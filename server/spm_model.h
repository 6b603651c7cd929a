// SpmModel: a std-only wall around sentencepiece, whose header cannot be compiled beside abseil's string headers.
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

  // Reads a tokenizer.model file. On failure returns null and sets *error to one line naming the file and the cause.
  static std::unique_ptr<SpmModel> Load(const std::string& path, std::string* error);
  ~SpmModel();

  const Flags& flags() const;
  int vocab_size() const;
  // Ids of one text, without BOS. `text` should be valid UTF-8; invalid bytes are replaced as sentencepiece does.
  std::vector<int> Encode(std::string_view text) const;
  // The id of an exact piece, or -1.
  int PieceToId(std::string_view piece) const;
  // Requires: 0 <= id < vocab_size().
  const std::string& Piece(int id) const;
  PieceType Type(int id) const;
  int bos_id() const;  // -1 when the file has none
  int eos_id() const;
  int unk_id() const;
  int pad_id() const;
  // sentencepiece's own decode; for tests of ours.
  std::string ReferenceDecode(const std::vector<int>& ids) const;

 private:
  struct Impl;
  explicit SpmModel(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace minitron::server
