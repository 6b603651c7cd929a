// Reader of pytorch_model.bin: the zip-pickle format of torch.save since 1.6, for a state_dict of dense tensors.
// Nothing in the file is executed: the unpickler knows three kinds of globals and refuses every other by name.
// Sources: pytorch/pytorch:caffe2/serialize/inline_container.h (zip layout), torch/_utils.py (_rebuild_tensor_v2).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/checkpoint/safetensors.h"

namespace minitron::engine {

// Reads a file of `size` bytes at `data`: tensors in the order of the dict. Tensors may share a storage; strided
// (non-contiguous) ones are refused. Error: INVALID_ARGUMENT (`file`, what was found, limit).
absl::StatusOr<std::vector<StoredTensor>> ParseTorchCheckpoint(const uint8_t* data, int64_t size,
                                                               const std::string& file);

// A tensor as the pickle describes it, before its storage has been looked up in the zip.
struct PickledTensor {
  std::string name;
  std::string storage_key;  // file <prefix>/data/<key>
  DType dtype = DType::kBf16;
  int64_t storage_elements = 0;
  int64_t storage_offset = 0;  // elements
  std::vector<int64_t> shape;  // at most kMaxRank dims, each >= 0
};

// Runs data.pkl (protocol 2), which must yield a dict of string -> contiguous tensor. Exposed for tests.
// Error: INVALID_ARGUMENT (byte position, opcode or global).
absl::StatusOr<std::vector<PickledTensor>> ParseTorchPickle(const uint8_t* data, int64_t size);

}  // namespace minitron::engine
