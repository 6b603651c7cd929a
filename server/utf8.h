// UTF-8 after the Unicode Standard, chapter 3.9 (tables 3-7 and 3-8). Pure functions.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace minitron::server {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

enum class Utf8Kind { kValid, kInvalid, kIncomplete };

// What stands at the start of a text.
struct Utf8Unit {
  Utf8Kind kind;
  size_t length;  // bytes of the character, of the maximal ill-formed part, or of the incomplete rest (1 to 4)
};

// Requires: `text` is not empty. kIncomplete: the text ends inside a character that could still become valid.
Utf8Unit NextUtf8(std::string_view text);

bool IsValidUtf8(std::string_view text);

// Appends to `out` what is certain of held + bytes as valid UTF-8 (U+FFFD for each maximal ill-formed part) and leaves
// an incomplete character (at most 3 bytes) in `held`.
void AppendUtf8(std::string& held, std::string_view bytes, std::string& out);

}  // namespace minitron::server
