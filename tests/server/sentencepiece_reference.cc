#include "tests/server/sentencepiece_reference.h"

#include <sentencepiece_processor.h>

#include <fstream>
#include <iterator>

#include "engine/base/check.h"

namespace minitron::server {

struct SentencePieceReference::Impl {
  sentencepiece::SentencePieceProcessor processor;
};

SentencePieceReference::SentencePieceReference(const std::string& data) : impl_(std::make_unique<Impl>()) {
  CHECK(impl_->processor.LoadFromSerializedProto(data).ok());
}
SentencePieceReference::~SentencePieceReference() = default;

std::vector<int> SentencePieceReference::Encode(std::string_view text) const {
  return impl_->processor.EncodeAsIds(text);
}

std::string SentencePieceReference::Decode(const std::vector<int>& ids) const {
  return impl_->processor.DecodeIds(ids);
}

std::string ReadSourceFile(const std::string& path) {
  std::ifstream file(std::string(MINITRON_SOURCE_DIR) + "/" + path, std::ios::binary);
  CHECK(file.good());
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string WithUserDefinedAsControl(std::string model) {
  // A piece ends with its score (tag 0x15, 4 bytes) and its type (tag 0x18): patch 4 to 3 after each spelling.
  const std::string spelling = "<extra_id_";
  for (size_t at = model.find(spelling); at != std::string::npos; at = model.find(spelling, at + 1)) {
    const size_t score = model.find('>', at) + 1;
    if (score + 6 < model.size() && model[score] == 0x15 && model[score + 5] == 0x18 && model[score + 6] == 4) {
      model[score + 6] = 3;
    }
  }
  return model;
}

}  // namespace minitron::server
