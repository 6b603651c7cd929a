// SpmNormalizer: what sentencepiece does to a text before it is cut into pieces. std only.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "server/spm_proto.h"

namespace minitron::server {

// Immutable; thread-safe. Rules, in order: invalid bytes become U+FFFD each; the file's character map (a double-array
// trie of replacements, longest match first) is applied; with remove_extra_whitespaces runs of spaces shrink to one and
// the ends are trimmed; with add_dummy_prefix one space is put in front; with escape_whitespaces spaces become U+2581.
class SpmNormalizer {
 public:
  // On a malformed character map sets *error to one line.
  SpmNormalizer(const SpmProto::Normalizer& spec, std::string* error);

  // `add_dummy_prefix`: whether this text may get the prefix, if the file wants one at all.
  std::string Normalize(std::string_view text, bool add_dummy_prefix) const;

 private:
  struct Replacement {
    std::string_view text;
    size_t consumed;  // bytes of input
  };
  Replacement NextReplacement(std::string_view text) const;

  bool add_dummy_prefix_;
  bool remove_extra_whitespaces_;
  bool escape_whitespaces_;
  std::vector<uint32_t> trie_;  // empty: identity
  std::string replacements_;    // NUL-terminated strings the trie's values point at
};

}  // namespace minitron::server
