#include "server/spm_normalizer.h"

#include <cstring>

#include "server/utf8.h"

namespace minitron::server {
namespace {

constexpr std::string_view kSpaceSymbol = "\xE2\x96\x81";

// A unit of the double array (the format of darts-clone, which the file embeds).
bool HasLeaf(uint32_t unit) { return (unit >> 8) & 1; }
uint32_t Value(uint32_t unit) { return unit & 0x7FFFFFFFu; }
uint32_t Label(uint32_t unit) { return unit & 0x800000FFu; }
uint32_t Offset(uint32_t unit) { return (unit >> 10) << ((unit & (1u << 9)) >> 6); }

}  // namespace

SpmNormalizer::SpmNormalizer(const SpmProto::Normalizer& spec, std::string* error)
    : add_dummy_prefix_(spec.add_dummy_prefix),
      remove_extra_whitespaces_(spec.remove_extra_whitespaces),
      escape_whitespaces_(spec.escape_whitespaces) {
  const std::string& map = spec.precompiled_charsmap;
  if (map.empty()) return;
  const auto word = [&](size_t offset) {
    uint32_t value = 0;
    for (size_t i = 0; i < 4; ++i) value |= static_cast<uint32_t>(static_cast<uint8_t>(map[offset + i])) << (8 * i);
    return value;
  };
  if (map.size() < 8) {
    *error = "character map has " + std::to_string(map.size()) + " bytes, at least 8 needed";
    return;
  }
  const size_t trie_bytes = word(0);
  if (trie_bytes == 0 || trie_bytes % 4 != 0 || trie_bytes > map.size() - 4) {
    *error = "character map of " + std::to_string(map.size()) + " bytes has a trie of " + std::to_string(trie_bytes);
    return;
  }
  trie_.resize(trie_bytes / 4);
  for (size_t i = 0; i < trie_.size(); ++i) trie_[i] = word(4 + 4 * i);
  replacements_ = map.substr(4 + trie_bytes);
  if (replacements_.empty() || replacements_.back() != '\0' || !IsValidUtf8(replacements_)) {
    *error = "character map's replacements are not NUL-terminated UTF-8";
  }
}

SpmNormalizer::Replacement SpmNormalizer::NextReplacement(std::string_view text) const {
  Replacement longest{{}, 0};
  // Positions outside the array end the walk: the file is not trusted to be consistent.
  size_t position = trie_.empty() ? 0 : Offset(trie_[0]);
  for (size_t i = 0; !trie_.empty() && i < text.size(); ++i) {
    const auto byte = static_cast<uint8_t>(text[i]);
    position ^= byte;
    if (position >= trie_.size() || Label(trie_[position]) != byte) break;
    const uint32_t unit = trie_[position];
    position ^= Offset(unit);
    if (position >= trie_.size()) break;
    if (!HasLeaf(unit)) continue;
    const size_t value = Value(trie_[position]);
    if (value < replacements_.size()) longest = {replacements_.c_str() + value, i + 1};
  }
  if (longest.consumed > 0) return longest;
  const Utf8Unit unit = NextUtf8(text);
  // One U+FFFD per byte here, as in sentencepiece; Decode counts maximal parts.
  if (unit.kind != Utf8Kind::kValid) return {kReplacementCharacter, 1};
  return {text.substr(0, unit.length), unit.length};
}

std::string SpmNormalizer::Normalize(std::string_view text, bool add_dummy_prefix) const {
  const std::string_view space = escape_whitespaces_ ? kSpaceSymbol : std::string_view(" ");
  while (remove_extra_whitespaces_ && !text.empty()) {
    const Replacement next = NextReplacement(text);
    if (next.text != " ") break;
    text.remove_prefix(next.consumed);
  }
  std::string out;
  if (text.empty()) return out;
  out.reserve(text.size() * 3 / 2 + space.size());
  if (add_dummy_prefix && add_dummy_prefix_) out.append(space);

  bool after_space = remove_extra_whitespaces_;
  while (!text.empty()) {
    const Replacement next = NextReplacement(text);
    std::string_view piece = next.text;
    while (after_space && !piece.empty() && piece.front() == ' ') piece.remove_prefix(1);
    for (const char c : piece) {
      if (c == ' ') {
        out.append(space);
      } else {
        out.push_back(c);
      }
    }
    if (!piece.empty()) after_space = remove_extra_whitespaces_ && piece.back() == ' ';
    text.remove_prefix(next.consumed);
  }
  while (remove_extra_whitespaces_ && out.size() >= space.size() && std::string_view(out).ends_with(space)) {
    out.erase(out.size() - space.size());
  }
  return out;
}

}  // namespace minitron::server
