// Views of arrays: pointer and shape, never owning. Row-major.
#pragma once

#include <cstdint>

#include "engine/base/check.h"

namespace minitron::engine {

// Element types of weights on disk.
enum class DType { kBf16, kF16, kF32 };

constexpr int64_t DTypeBytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }
constexpr const char* DTypeName(DType dtype) {
  return dtype == DType::kBf16 ? "bf16" : dtype == DType::kF16 ? "f16" : "f32";
}

// A weight as loaded: typed at run time, memory-mapped or owned by the Checkpoint. Data is aligned to its element.
struct WeightView {
  const void* data = nullptr;
  DType dtype = DType::kBf16;
  int64_t rows = 0;  // outputs; 1 for a vector
  int64_t cols = 0;  // inputs
  int64_t size() const { return rows * cols; }
};

// A [rows, cols] matrix of T whose rows are `cols` apart.
template <typename T>
struct MatrixView {
  T* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;

  T* row(int64_t r) const {
    DCHECK(r >= 0 && r < rows);
    return data + r * cols;
  }
};

}  // namespace minitron::engine
