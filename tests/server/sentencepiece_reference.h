// sentencepiece with a file as it is, as the reference for server/spm_model, which gives it a file written anew. std
// only: its header does not compile beside abseil's.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace minitron::server {

class SentencePieceReference {
 public:
  // `data`: the bytes of a tokenizer.model. Aborts when the library refuses it.
  explicit SentencePieceReference(const std::string& data);
  ~SentencePieceReference();

  std::vector<int> Encode(std::string_view text) const;
  std::string Decode(const std::vector<int>& ids) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Bytes of a file below the source folder.
std::string ReadSourceFile(const std::string& path);

// `model` with every user-defined piece declared a control piece.
std::string WithUserDefinedAsControl(std::string model);

}  // namespace minitron::server
