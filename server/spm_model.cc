#include "server/spm_model.h"

#include <sentencepiece_processor.h>

#include <exception>
#include <unordered_map>
#include <utility>

#include "engine/base/check.h"
#include "server/spm_proto.h"
#include "server/utf8.h"

// Exported by the library, but in no header that it installs.
namespace sentencepiece::logging {
void SetMinLogLevel(int level);
}

namespace minitron::server {
namespace {

using sentencepiece::SentencePieceProcessor;

// Above every message of the library: what goes wrong comes back as a status, and we log the flags ourselves.
constexpr int kSilent = 3;

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

// Why the library refuses `model`; empty when it does not.
std::string LoadInto(SentencePieceProcessor& processor, const std::string& model) {
  sentencepiece::logging::SetMinLogLevel(kSilent);
  try {
    const sentencepiece::util::Status status = processor.LoadFromSerializedProto(model);
    return status.ok() ? "" : "refused by sentencepiece: " + std::string(status.error_message());
  } catch (const std::exception& error) {  // of the trie that it builds
    return std::string("refused by sentencepiece: ") + error.what();
  }
}

}  // namespace

struct SpmModel::Impl {
  explicit Impl(SpmProto model) : proto(std::move(model)) {
    ids.reserve(proto.pieces.size());
    for (size_t i = 0; i < proto.pieces.size(); ++i) {
      ids.emplace(proto.pieces[i].text, static_cast<int>(i));
      if (proto.pieces[i].type == SpmProto::kUnknown) unk_id = static_cast<int>(i);
    }
    flags = {proto.normalizer.add_dummy_prefix, proto.normalizer.remove_extra_whitespaces,
             proto.normalizer.escape_whitespaces, proto.trainer.byte_fallback, proto.normalizer.name};
  }

  // Loads the processors from `proto`. Returns an empty string, or why the library refuses.
  std::string LoadProcessors() {
    std::string error = LoadInto(at_start, SerializeSpmProto(proto, /*add_dummy_prefix=*/true));
    if (!error.empty() || !flags.add_dummy_prefix) return error;
    in_the_middle = std::make_unique<SentencePieceProcessor>();
    return LoadInto(*in_the_middle, SerializeSpmProto(proto, /*add_dummy_prefix=*/false));
  }

  int ControlId(const std::string& piece) const {
    const auto found = ids.find(piece);
    return found != ids.end() && proto.pieces[found->second].type == SpmProto::kControl ? found->second : -1;
  }

  SpmProto proto;
  std::unordered_map<std::string_view, int> ids;  // keys point into proto.pieces
  SentencePieceProcessor at_start;
  std::unique_ptr<SentencePieceProcessor> in_the_middle;  // without the dummy prefix; null when there is none
  int unk_id = -1;
  Flags flags;
};

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
  if (proto.trainer.model_type < 1 || proto.trainer.model_type > 4) {
    *error = "model type " + std::to_string(proto.trainer.model_type) + " outside [1, 4]";
  } else if (proto.trainer.treat_whitespace_as_suffix) {
    *error = "treat_whitespace_as_suffix is not supported";
  } else if (!proto.denormalizer.precompiled_charsmap.empty()) {
    *error = "a denormalizer is not supported";
  } else if (!IsValidUtf8(proto.trainer.unk_surface)) {
    *error = "unk_surface is not valid UTF-8";
  }
  if (!error->empty()) return nullptr;
  auto impl = std::make_unique<Impl>(std::move(proto));
  *error = impl->LoadProcessors();
  if (!error->empty()) return nullptr;
  return std::unique_ptr<SpmModel>(new SpmModel(std::move(impl)));
}

std::vector<int> SpmModel::Encode(std::string_view text, bool at_text_start) const {
  const bool plain = at_text_start || impl_->in_the_middle == nullptr;
  return (plain ? impl_->at_start : *impl_->in_the_middle).EncodeAsIds(text);
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
