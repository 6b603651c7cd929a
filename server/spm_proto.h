// The fields of a sentencepiece ModelProto that matter at run time, read from the file's bytes, checked, and written
// again for the library. std only: this is what stands between an untrusted file and sentencepiece.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace minitron::server {

// Limits of a tokenizer.model file. The real Nemotron tokenizer is 4.55 MB with 256,000 pieces of at most 128 bytes.
inline constexpr size_t kMaxSpmFileBytes = 64u << 20;
inline constexpr size_t kMaxSpmPieces = 1u << 20;
inline constexpr size_t kMaxSpmPieceBytes = 4096;

struct SpmProto {
  // Numbers of ModelProto.SentencePiece.Type.
  enum Type { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

  struct Piece {
    std::string text;
    float score = 0;
    int type = kNormal;
  };

  // Defaults are those of sentencepiece_model.proto.
  struct Trainer {
    uint64_t model_type = 1;  // 1 unigram, 2 BPE, 3 word, 4 char
    bool treat_whitespace_as_suffix = false;
    bool byte_fallback = false;
    std::string unk_surface = " \xE2\x81\x87 ";
    std::string bos_piece = "<s>";
    std::string eos_piece = "</s>";
    std::string pad_piece = "<pad>";
  };

  struct Normalizer {
    std::string name;
    std::string precompiled_charsmap;
    bool add_dummy_prefix = true;
    bool remove_extra_whitespaces = true;
    bool escape_whitespaces = true;
  };

  std::vector<Piece> pieces;
  Trainer trainer;
  Normalizer normalizer;
  Normalizer denormalizer;
};

// Parses `data` and checks every piece: count, type, finite score, non-empty valid UTF-8 text without NUL, no text
// twice, exactly one unknown piece, byte pieces complete with byte_fallback and absent without; and that no text can
// lead the character map's trie outside its arrays. Unknown fields are skipped; groups are refused. Returns an empty
// string, or one line that says what is wrong.
std::string ParseSpmProto(std::string_view data, SpmProto* proto);

// The bytes of a ModelProto for the library: what ParseSpmProto has checked and nothing else. Control and user-defined
// pieces get names that no text can spell, so the library gives them for no text. `add_dummy_prefix`: whether a text
// may get the prefix, if the file wants one at all.
std::string SerializeSpmProto(const SpmProto& proto, bool add_dummy_prefix);

}  // namespace minitron::server
