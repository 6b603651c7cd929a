#include "server/utf8.h"

#include <cstdint>

namespace minitron::server {

Utf8Unit NextUtf8(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {Utf8Kind::kValid, 1};
  if (lead < 0xC2 || lead > 0xF4) return {Utf8Kind::kInvalid, 1};
  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // Only the second byte has a narrower range: no overlong forms, no surrogates, nothing above U+10FFFF.
  uint8_t low = 0x80;
  uint8_t high = 0xBF;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  for (size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {Utf8Kind::kIncomplete, i};
    if (byte(i) < low || byte(i) > high) return {Utf8Kind::kInvalid, i};
    low = 0x80;
    high = 0xBF;
  }
  return {Utf8Kind::kValid, length};
}

bool IsValidUtf8(std::string_view text) {
  while (!text.empty()) {
    const Utf8Unit unit = NextUtf8(text);
    if (unit.kind != Utf8Kind::kValid) return false;
    text.remove_prefix(unit.length);
  }
  return true;
}

void AppendUtf8(std::string& held, std::string_view bytes, std::string& out) {
  std::string joined;
  if (!held.empty()) {
    joined.reserve(held.size() + bytes.size());
    joined.append(held).append(bytes);
    held.clear();
    bytes = joined;
  }
  while (!bytes.empty()) {
    const Utf8Unit unit = NextUtf8(bytes);
    if (unit.kind == Utf8Kind::kIncomplete) {
      held.assign(bytes);
      return;
    }
    out.append(unit.kind == Utf8Kind::kValid ? bytes.substr(0, unit.length) : kReplacementCharacter);
    bytes.remove_prefix(unit.length);
  }
}

}  // namespace minitron::server
