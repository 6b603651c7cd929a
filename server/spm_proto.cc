#include "server/spm_proto.h"

#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <unordered_set>

#include "server/utf8.h"

namespace minitron::server {
namespace {

// One field of a protobuf message: its number and its value, by wire type.
struct Field {
  uint32_t number = 0;
  uint32_t wire_type = 0;
  uint64_t varint = 0;     // wire types 0, 1 and 5
  std::string_view bytes;  // wire type 2
};

constexpr uint32_t kVarint = 0;
constexpr uint32_t kFixed64 = 1;
constexpr uint32_t kBytes = 2;
constexpr uint32_t kFixed32 = 5;

// How the names of pieces begin that no text shall become: more than one character, so that the library, which looks up
// what is left of a text after its merges, finds them for none.
const std::string kUnspellable = "\xEF\xBF\xBFspecial ";

// Walks the fields of one message. Never reads outside the view it was given, never recurses.
class WireReader {
 public:
  explicit WireReader(std::string_view data) : data_(data) {}

  // False at the end of the message or at the first malformed byte; see ok().
  bool Next(Field* field) {
    if (data_.empty() || !ok_) return false;
    uint64_t tag = 0;
    ok_ = ReadVarint(&tag) && (tag >> 3) >= 1 && (tag >> 3) < (1u << 29);
    if (!ok_) return false;
    field->number = static_cast<uint32_t>(tag >> 3);
    field->wire_type = static_cast<uint32_t>(tag & 7);
    switch (field->wire_type) {
      case kVarint:
        ok_ = ReadVarint(&field->varint);
        break;
      case kFixed64:
        ok_ = ReadFixed(8, &field->varint);
        break;
      case kFixed32:
        ok_ = ReadFixed(4, &field->varint);
        break;
      case kBytes: {
        uint64_t length = 0;
        ok_ = ReadVarint(&length) && length <= data_.size();
        if (ok_) {
          field->bytes = data_.substr(0, length);
          data_.remove_prefix(length);
        }
        break;
      }
      default:
        ok_ = false;
    }
    return ok_;
  }

  bool ok() const { return ok_; }

 private:
  bool ReadVarint(uint64_t* value) {
    *value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (data_.empty()) return false;
      const auto byte = static_cast<uint8_t>(data_[0]);
      data_.remove_prefix(1);
      *value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }

  bool ReadFixed(size_t size, uint64_t* value) {
    if (data_.size() < size) return false;
    *value = 0;
    for (size_t i = 0; i < size; ++i) *value |= static_cast<uint64_t>(static_cast<uint8_t>(data_[i])) << (8 * i);
    data_.remove_prefix(size);
    return true;
  }

  std::string_view data_;
  bool ok_ = true;
};

void WriteRawVarint(uint64_t value, std::string* out) {
  for (; value >= 0x80; value >>= 7) out->push_back(static_cast<char>(value | 0x80));
  out->push_back(static_cast<char>(value));
}

void WriteVarint(uint32_t number, uint64_t value, std::string* out) {
  WriteRawVarint(number << 3 | kVarint, out);
  WriteRawVarint(value, out);
}

void WriteBytes(uint32_t number, std::string_view bytes, std::string* out) {
  WriteRawVarint(number << 3 | kBytes, out);
  WriteRawVarint(bytes.size(), out);
  out->append(bytes);
}

void WriteFloat(uint32_t number, float value, std::string* out) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  WriteRawVarint(number << 3 | kFixed32, out);
  for (int shift = 0; shift < 32; shift += 8) out->push_back(static_cast<char>(bits >> shift));
}

// A field with a wire type that is not its own is skipped, as protobuf does with unknown fields.
void Set(const Field& field, bool* value) {
  if (field.wire_type == kVarint) *value = field.varint != 0;
}

void Set(const Field& field, uint64_t* value) {
  if (field.wire_type == kVarint) *value = field.varint;
}

void Set(const Field& field, std::string* value) {
  if (field.wire_type == kBytes) value->assign(field.bytes);
}

bool ParsePiece(std::string_view data, SpmProto::Piece* piece) {
  WireReader reader(data);
  Field field;
  while (reader.Next(&field)) {
    if (field.number == 1) Set(field, &piece->text);
    if (field.number == 2 && field.wire_type == kFixed32) {
      const auto bits = static_cast<uint32_t>(field.varint);
      std::memcpy(&piece->score, &bits, sizeof(bits));
    }
    if (field.number == 3 && field.wire_type == kVarint) {
      piece->type = field.varint <= SpmProto::kByte ? static_cast<int>(field.varint) : 0;
    }
  }
  return reader.ok();
}

bool ParseTrainer(std::string_view data, SpmProto::Trainer* trainer) {
  WireReader reader(data);
  Field field;
  while (reader.Next(&field)) {
    if (field.number == 3) Set(field, &trainer->model_type);
    if (field.number == 24) Set(field, &trainer->treat_whitespace_as_suffix);
    if (field.number == 35) Set(field, &trainer->byte_fallback);
    if (field.number == 44) Set(field, &trainer->unk_surface);
    if (field.number == 46) Set(field, &trainer->bos_piece);
    if (field.number == 47) Set(field, &trainer->eos_piece);
    if (field.number == 48) Set(field, &trainer->pad_piece);
  }
  return reader.ok();
}

bool ParseNormalizer(std::string_view data, SpmProto::Normalizer* normalizer) {
  WireReader reader(data);
  Field field;
  while (reader.Next(&field)) {
    if (field.number == 1) Set(field, &normalizer->name);
    if (field.number == 2) Set(field, &normalizer->precompiled_charsmap);
    if (field.number == 3) Set(field, &normalizer->add_dummy_prefix);
    if (field.number == 4) Set(field, &normalizer->remove_extra_whitespaces);
    if (field.number == 5) Set(field, &normalizer->escape_whitespaces);
  }
  return reader.ok();
}

// A unit of the character map's double array (the format of darts-clone, which the file embeds).
bool IsValue(uint32_t unit) { return unit >> 31 != 0; }
bool HasLeaf(uint32_t unit) { return (unit >> 8 & 1) != 0; }
uint32_t Offset(uint32_t unit) { return unit >> 10 << ((unit & 1u << 9) >> 6); }

// The map is the trie's size in bytes, the trie, and NUL-terminated replacements that the trie's values point to. A
// walk goes from unit i to (i ^ offset) ^ byte, so it stays inside if every block of 256 units that a unit leads to
// does.
std::string CheckCharacterMap(std::string_view map) {
  if (map.empty()) return "";
  const auto word = [&](size_t offset) {
    uint32_t value = 0;
    for (size_t i = 0; i < 4; ++i) value |= static_cast<uint32_t>(static_cast<uint8_t>(map[offset + i])) << (8 * i);
    return value;
  };
  const std::string size = "character map of " + std::to_string(map.size()) + " bytes ";
  if (map.size() < 8) return size + "is too short";
  const size_t trie_bytes = word(0);
  if (trie_bytes == 0 || trie_bytes % 1024 != 0 || trie_bytes > map.size() - 4) {
    return size + "has a trie of " + std::to_string(trie_bytes);
  }
  const std::string_view replacements = map.substr(4 + trie_bytes);
  if (replacements.empty() || replacements.back() != '\0' || !IsValidUtf8(replacements)) {
    return "character map's replacements are not NUL-terminated UTF-8";
  }
  const auto unit_at = [&](size_t i) { return word(4 + 4 * i); };
  for (size_t i = 0; i < trie_bytes / 4; ++i) {
    const uint32_t unit = unit_at(i);
    if (IsValue(unit) && i > 0) continue;  // no walk goes on from here, except from the root
    const size_t base = i ^ Offset(unit);
    if (base >= trie_bytes / 4)
      return "character map's trie leads outside its " + std::to_string(trie_bytes) + " bytes";
    if (!HasLeaf(unit)) continue;
    const size_t value = unit_at(base) & 0x7FFFFFFFu;
    if (value >= replacements.size() || (static_cast<uint8_t>(replacements[value]) & 0xC0) == 0x80) {
      return "character map's trie names the replacement at " + std::to_string(value) + " of " +
             std::to_string(replacements.size()) + " bytes";
    }
  }
  return "";
}

std::string PieceError(size_t id, const std::string& what) { return "piece " + std::to_string(id) + " " + what; }

std::string CheckPieces(const SpmProto& proto) {
  std::unordered_set<std::string_view> texts;
  std::array<bool, 256> bytes{};
  size_t num_unknown = 0;
  size_t num_bytes = 0;
  for (size_t id = 0; id < proto.pieces.size(); ++id) {
    const SpmProto::Piece& piece = proto.pieces[id];
    if (piece.text.empty()) return PieceError(id, "is empty");
    if (piece.text.size() > kMaxSpmPieceBytes) {
      return PieceError(id, "has " + std::to_string(piece.text.size()) + " bytes, limit 4096");
    }
    if (!IsValidUtf8(piece.text)) return PieceError(id, "is not valid UTF-8");
    if (piece.text.starts_with(kUnspellable)) return PieceError(id, "has a name that the server needs");
    if (piece.text.find('\0') != std::string::npos) return PieceError(id, "contains NUL");
    if (!std::isfinite(piece.score)) return PieceError(id, "has a score that is not finite");
    if (piece.type < SpmProto::kNormal || piece.type > SpmProto::kByte) return PieceError(id, "has an unknown type");
    if (!texts.insert(piece.text).second) return PieceError(id, "has the text of an earlier piece");
    num_unknown += piece.type == SpmProto::kUnknown;
    if (piece.type == SpmProto::kByte) {
      unsigned value = 0;
      char spelled[8] = "";
      if (std::sscanf(piece.text.c_str(), "<0x%2X>", &value) == 1) {
        std::snprintf(spelled, sizeof(spelled), "<0x%02X>", value & 0xFF);
      }
      if (piece.text != spelled) return PieceError(id, "is a byte piece but not spelled <0xNN>");
      num_bytes += !bytes[value];
      bytes[value] = true;
    }
  }
  if (num_unknown != 1) return std::to_string(num_unknown) + " unknown pieces, exactly 1 needed";
  if (proto.trainer.byte_fallback && num_bytes != 256) {
    return "byte_fallback is on but " + std::to_string(num_bytes) + " of 256 byte pieces are there";
  }
  if (!proto.trainer.byte_fallback && num_bytes != 0) return "byte pieces are there but byte_fallback is off";
  return "";
}

}  // namespace

std::string ParseSpmProto(std::string_view data, SpmProto* proto) {
  WireReader reader(data);
  Field field;
  bool ok = true;
  while (ok && reader.Next(&field)) {
    if (field.wire_type != kBytes) continue;
    if (field.number == 1) {
      if (proto->pieces.size() == kMaxSpmPieces) return "more than 1048576 pieces";
      ok = ParsePiece(field.bytes, &proto->pieces.emplace_back());
    }
    if (field.number == 2) ok = ParseTrainer(field.bytes, &proto->trainer);
    if (field.number == 3) ok = ParseNormalizer(field.bytes, &proto->normalizer);
    if (field.number == 5) ok = ParseNormalizer(field.bytes, &proto->denormalizer);
  }
  if (!ok || !reader.ok()) return "not a sentencepiece model (malformed protobuf)";
  if (proto->pieces.empty()) return "not a sentencepiece model (no pieces)";
  const std::string error = CheckPieces(*proto);
  return error.empty() ? CheckCharacterMap(proto->normalizer.precompiled_charsmap) : error;
}

std::string SerializeSpmProto(const SpmProto& proto, bool add_dummy_prefix) {
  std::string model;
  for (size_t id = 0; id < proto.pieces.size(); ++id) {
    const SpmProto::Piece& piece = proto.pieces[id];
    const bool special = piece.type == SpmProto::kControl || piece.type == SpmProto::kUserDefined;
    std::string body;
    WriteBytes(1, special ? kUnspellable + std::to_string(id) : piece.text, &body);
    WriteFloat(2, piece.score, &body);
    WriteVarint(3, static_cast<uint64_t>(special ? SpmProto::kControl : piece.type), &body);
    WriteBytes(1, body, &model);
  }
  std::string trainer;
  WriteVarint(3, proto.trainer.model_type, &trainer);
  WriteVarint(35, proto.trainer.byte_fallback ? 1 : 0, &trainer);
  WriteBytes(2, trainer, &model);
  std::string normalizer;
  WriteBytes(1, proto.normalizer.name, &normalizer);
  WriteBytes(2, proto.normalizer.precompiled_charsmap, &normalizer);
  WriteVarint(3, proto.normalizer.add_dummy_prefix && add_dummy_prefix ? 1 : 0, &normalizer);
  WriteVarint(4, proto.normalizer.remove_extra_whitespaces ? 1 : 0, &normalizer);
  WriteVarint(5, proto.normalizer.escape_whitespaces ? 1 : 0, &normalizer);
  WriteBytes(3, normalizer, &model);
  return model;
}

}  // namespace minitron::server
