#include "server/spm_model.h"

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <queue>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "engine/base/check.h"
#include "server/spm_normalizer.h"
#include "server/spm_proto.h"
#include "server/utf8.h"

namespace minitron::server {
namespace {

constexpr std::string_view kSpaceSymbol = "\xE2\x96\x81";

// A maximal part of the text merged so far. Parts form a doubly linked list; a part swallowed by its left neighbour is
// empty.
struct Symbol {
  int previous;
  int next;
  std::string_view text;
};

// A merge that was possible when it was found.
struct Merge {
  float score;
  int left;
  int right;
  size_t size;  // bytes of both; a symbol that changed since has another size
};

// Highest score first, then leftmost.
struct MergeOrder {
  bool operator()(const Merge& a, const Merge& b) const {
    return a.score < b.score || (a.score == b.score && a.left > b.left);
  }
};

SpmModel::PieceType TypeOf(int proto_type) {
  switch (proto_type) {
    case SpmProto::kUnknown:
      return SpmModel::PieceType::kUnknown;
    case SpmProto::kControl:
      return SpmModel::PieceType::kControl;
    case SpmProto::kUserDefined:
      return SpmModel::PieceType::kUserDefined;
    case SpmProto::kUnused:
      return SpmModel::PieceType::kUnused;
    case SpmProto::kByte:
      return SpmModel::PieceType::kByte;
    default:
      return SpmModel::PieceType::kNormal;
  }
}

}  // namespace

struct SpmModel::Impl {
  Impl(SpmProto model, std::string* error) : proto(std::move(model)), normalizer(proto.normalizer, error), byte_ids{} {
    ids.reserve(proto.pieces.size());
    for (size_t i = 0; i < proto.pieces.size(); ++i) {
      const SpmProto::Piece& piece = proto.pieces[i];
      const int id = static_cast<int>(i);
      ids.emplace(piece.text, id);
      if (piece.type == SpmProto::kUnknown) unk_id = id;
      // What an unused piece is taken apart into depends on the whole text, as in sentencepiece.
      if (piece.type == SpmProto::kUnused) splits_at_spaces = false;
      if (piece.type == SpmProto::kNormal) NoteSpaces(piece.text);
      if (piece.type == SpmProto::kByte) byte_ids[std::stoul(piece.text.substr(3, 2), nullptr, 16)] = id;
    }
    flags = {proto.normalizer.add_dummy_prefix, proto.normalizer.remove_extra_whitespaces,
             proto.normalizer.escape_whitespaces, proto.trainer.byte_fallback, proto.normalizer.name};
  }

  // Records each character that stands before a space symbol inside `text`.
  void NoteSpaces(std::string_view text) {
    std::string_view last;
    while (!text.empty()) {
      if (!last.empty() && text.starts_with(kSpaceSymbol)) joins_space.insert(last);
      last = text.substr(0, NextUtf8(text).length);
      text.remove_prefix(last.size());
    }
  }

  // The id of a piece that merging may give, or -1. Unused pieces are steps on the way to others.
  int MergeableId(std::string_view text) const {
    const auto found = ids.find(text);
    if (found == ids.end()) return -1;
    const int type = proto.pieces[found->second].type;
    return type == SpmProto::kNormal || type == SpmProto::kUnused ? found->second : -1;
  }

  int ControlId(const std::string& piece) const {
    const auto found = ids.find(piece);
    return found != ids.end() && proto.pieces[found->second].type == SpmProto::kControl ? found->second : -1;
  }

  SpmProto proto;
  SpmNormalizer normalizer;
  std::unordered_map<std::string_view, int> ids;  // keys point into proto.pieces
  std::array<int, 256> byte_ids;
  std::unordered_set<std::string_view> joins_space;  // characters that some piece has before a space symbol
  bool splits_at_spaces = true;
  int unk_id = -1;
  Flags flags;
};

namespace {

// Byte-pair encoding of a normalized text, one segment after the other.
template <typename Model>
class BpeRun {
 public:
  explicit BpeRun(const Model& model) : model_(model) {}

  std::vector<int> Run(std::string_view text) {
    while (!text.empty()) {
      const size_t length = SegmentLength(text);
      EncodeSegment(text.substr(0, length));
      text.remove_prefix(length);
    }
    return std::move(ids_);
  }

 private:
  // Bytes up to the first space symbol that no piece can contain after the character before it: no merge crosses that
  // border, so both sides are encoded independently, and the work stays linear in the text for any ordinary model.
  size_t SegmentLength(std::string_view text) const {
    size_t last = 0;
    for (size_t i = NextUtf8(text).length; i < text.size();) {
      const std::string_view rest = text.substr(i);
      if (model_.splits_at_spaces && rest.starts_with(kSpaceSymbol) &&
          model_.joins_space.count(text.substr(last, i - last)) == 0) {
        return i;
      }
      last = i;
      i += NextUtf8(rest).length;
    }
    return text.size();
  }

  void EncodeSegment(std::string_view text) {
    symbols_.clear();
    while (!text.empty()) {
      const size_t length = NextUtf8(text).length;  // valid, hence whole characters
      const int index = static_cast<int>(symbols_.size());
      symbols_.push_back({index - 1, index + 1, text.substr(0, length)});
      text.remove_prefix(length);
    }
    symbols_.back().next = -1;
    for (int i = 1; i < static_cast<int>(symbols_.size()); ++i) Consider(i - 1, i);
    while (!agenda_.empty()) {
      const Merge merge = agenda_.top();
      agenda_.pop();
      Symbol& left = symbols_[merge.left];
      Symbol& right = symbols_[merge.right];
      if (left.text.empty() || right.text.empty() || left.text.size() + right.text.size() != merge.size) continue;
      left.text = {left.text.data(), merge.size};
      left.next = right.next;
      if (right.next >= 0) symbols_[right.next].previous = merge.left;
      right.text = {};
      Consider(left.previous, merge.left);
      Consider(merge.left, left.next);
    }
    for (int i = 0; i != -1; i = symbols_[i].next) Emit(symbols_[i].text);
  }

  void Consider(int left, int right) {
    if (left == -1 || right == -1) return;
    const std::string_view a = symbols_[left].text;
    const std::string_view b = symbols_[right].text;
    const std::string_view joined(a.data(), a.size() + b.size());
    const int id = model_.MergeableId(joined);
    if (id == -1) return;
    const SpmProto::Piece& piece = model_.proto.pieces[id];
    agenda_.push({piece.score, left, right, joined.size()});
    if (piece.type == SpmProto::kUnused) unused_parts_[joined] = {a, b};
  }

  // Appends the ids of one symbol: an unused piece is taken apart again, unknown text becomes bytes or one unknown id.
  void Emit(std::string_view symbol) {
    std::vector<std::string_view> stack = {symbol};
    while (!stack.empty()) {
      const std::string_view text = stack.back();
      stack.pop_back();
      const int id = model_.MergeableId(text);
      if (id != -1 && model_.proto.pieces[id].type == SpmProto::kUnused) {
        if (const auto parts = unused_parts_.find(text); parts != unused_parts_.end()) {
          stack.push_back(parts->second.second);
          stack.push_back(parts->second.first);
          continue;
        }
      }
      if (id != -1) {
        ids_.push_back(id);
      } else if (model_.proto.trainer.byte_fallback) {
        for (const char c : text) ids_.push_back(model_.byte_ids[static_cast<unsigned char>(c)]);
      } else if (ids_.empty() || ids_.back() != model_.unk_id) {
        ids_.push_back(model_.unk_id);  // a run of unknown text is one id
      }
    }
  }

  const Model& model_;
  std::vector<Symbol> symbols_;
  std::priority_queue<Merge, std::vector<Merge>, MergeOrder> agenda_;
  std::unordered_map<std::string_view, std::pair<std::string_view, std::string_view>> unused_parts_;
  std::vector<int> ids_;
};

}  // namespace

SpmModel::SpmModel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SpmModel::~SpmModel() = default;

std::unique_ptr<SpmModel> SpmModel::Parse(std::string_view data, std::string* error) {
  if (data.size() > kMaxSpmFileBytes) {
    *error = std::to_string(data.size()) + " bytes, limit " + std::to_string(kMaxSpmFileBytes);
    return nullptr;
  }
  SpmProto proto;
  *error = ParseSpmProto(data, &proto);
  if (!error->empty()) return nullptr;
  if (proto.trainer.model_type != 2) {
    *error = "model type " + std::to_string(proto.trainer.model_type) + ", only 2 (BPE) is supported";
  } else if (proto.trainer.treat_whitespace_as_suffix) {
    *error = "treat_whitespace_as_suffix is not supported";
  } else if (!proto.denormalizer.precompiled_charsmap.empty()) {
    *error = "a denormalizer is not supported";
  } else if (!IsValidUtf8(proto.trainer.unk_surface)) {
    *error = "unk_surface is not valid UTF-8";
  }
  if (!error->empty()) return nullptr;
  auto impl = std::make_unique<Impl>(std::move(proto), error);
  if (!error->empty()) return nullptr;
  return std::unique_ptr<SpmModel>(new SpmModel(std::move(impl)));
}

std::unique_ptr<SpmModel> SpmModel::Load(const std::string& path, std::string* error) {
  std::error_code code;
  if (!std::filesystem::is_regular_file(path, code)) {
    *error = path + ": no such file, or not a regular file";
    return nullptr;
  }
  std::ifstream file(path, std::ios::binary);
  // One byte more than allowed is enough to refuse; the size on disk is not trusted.
  std::string data;
  std::array<char, 1 << 16> chunk;
  while (file && data.size() <= kMaxSpmFileBytes) {
    file.read(chunk.data(), chunk.size());
    data.append(chunk.data(), static_cast<size_t>(file.gcount()));
  }
  if (!file.eof() && data.size() <= kMaxSpmFileBytes) {
    *error = path + ": cannot be read";
    return nullptr;
  }
  std::unique_ptr<SpmModel> model = Parse(data, error);
  if (model == nullptr) *error = path + ": " + *error;
  return model;
}

std::vector<int> SpmModel::Encode(std::string_view text, bool at_text_start) const {
  const std::string normalized = impl_->normalizer.Normalize(text, at_text_start);
  return BpeRun<Impl>(*impl_).Run(normalized);
}

int SpmModel::PieceToId(std::string_view piece) const {
  const auto found = impl_->ids.find(piece);
  return found == impl_->ids.end() ? -1 : found->second;
}

const std::string& SpmModel::Piece(int id) const {
  CHECK(id >= 0 && id < vocab_size());
  return impl_->proto.pieces[id].text;
}

SpmModel::PieceType SpmModel::Type(int id) const {
  CHECK(id >= 0 && id < vocab_size());
  return TypeOf(impl_->proto.pieces[id].type);
}

const SpmModel::Flags& SpmModel::flags() const { return impl_->flags; }
int SpmModel::vocab_size() const { return static_cast<int>(impl_->proto.pieces.size()); }
const std::string& SpmModel::unk_surface() const { return impl_->proto.trainer.unk_surface; }
int SpmModel::bos_id() const { return impl_->ControlId(impl_->proto.trainer.bos_piece); }
int SpmModel::eos_id() const { return impl_->ControlId(impl_->proto.trainer.eos_piece); }
int SpmModel::unk_id() const { return impl_->unk_id; }
int SpmModel::pad_id() const { return impl_->ControlId(impl_->proto.trainer.pad_piece); }

}  // namespace minitron::server
