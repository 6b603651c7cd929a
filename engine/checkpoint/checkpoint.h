// Checkpoint: one read-only view over the weight files of a model folder, whatever their format.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/tensor.h"

namespace minitron::engine {

// A tensor in a checkpoint: shape as stored, data mapped or owned by the Checkpoint.
struct TensorEntry {
  DType dtype = DType::kBf16;
  std::vector<int64_t> shape;
  const void* data = nullptr;  // aligned to its element
  int64_t num_bytes = 0;
};

// Immutable after Open; thread-safe. Keeps the files mapped.
class Checkpoint {
 public:
  virtual ~Checkpoint() = default;

  // Maps the files; reads little more than their headers. Opens, in this order of preference, model.safetensors,
  // model.safetensors.index.json with its shards, or pytorch_model.bin. Files are opened beneath `model_dir` only,
  // regular files only; nothing in them is executed. Errors: NOT_FOUND (none of them is there), INVALID_ARGUMENT
  // (malformed: file, tensor, value and limit).
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& model_dir);

  // What follows is about files; a checkpoint without any has nothing to do.

  // Reads large files into memory and maps their pages before the first request needs them; see mapped_file.h.
  virtual void Prefault(bool /*show_progress*/) const {}

  // Of all files: the same as long as nobody has written to them or put others in their place.
  virtual uint64_t identity() const { return 0; }

  // Reads [data, data + num_bytes) of a tensor into memory and maps its pages. Pages that could not be read are read at
  // their first use.
  virtual void MapIn(const void* /*data*/, int64_t /*num_bytes*/) const {}

  // Hints about [data, data + num_bytes) of a tensor: it will be read soon; it will not be read again, and its pages
  // need not stay mapped. They never change what is read.
  virtual void WillNeed(const void* /*data*/, int64_t /*num_bytes*/) const {}
  virtual void DoneWith(const void* /*data*/, int64_t /*num_bytes*/) const {}

  const std::map<std::string, TensorEntry>& tensors() const { return tensors_; }

 protected:
  std::map<std::string, TensorEntry> tensors_;
};

}  // namespace minitron::engine
