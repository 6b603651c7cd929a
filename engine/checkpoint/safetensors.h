// The safetensors format: u64 header length, JSON header, tensor bytes.
// Source: huggingface/safetensors:README.md ("Format").
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/tensor.h"

namespace minitron::engine {

// Where a tensor lies in a file: num_bytes == product(shape) * DTypeBytes(dtype), row-major, little-endian,
// at [offset, offset + num_bytes) of the file, in bounds. `offset` need not be aligned.
struct StoredTensor {
  std::string name;
  DType dtype = DType::kBf16;
  std::vector<int64_t> shape;
  int64_t offset = 0;
  int64_t num_bytes = 0;
};

// Limits shared by all formats.
inline constexpr int64_t kMaxTensors = 100'000;
inline constexpr size_t kMaxTensorNameBytes = 4096;
inline constexpr int64_t kMaxRank = 8;
inline constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit

// A tensor name worth printing: not empty, at most kMaxTensorNameBytes, no NUL.
bool IsTensorName(const std::string& name);

// Reads the header of a file of `size` bytes at `data`. Everything is checked before anything is allocated by its size:
// tensors tile the buffer without hole or overlap and end at the end of the file.
// Error: INVALID_ARGUMENT (`file`, tensor, value and limit).
absl::StatusOr<std::vector<StoredTensor>> ParseSafetensors(const uint8_t* data, int64_t size, const std::string& file);

}  // namespace minitron::engine
