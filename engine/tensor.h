// Views of arrays: pointer and shape, never owning. Row-major.
#pragma once

#include <cstdint>

#include "engine/base/check.h"

namespace minitron::engine {

// Types of weights. The first three are element types on disk, row-major; the others are whole layouts that the CPU
// backend packs them into at load (engine/cpu/panel_format.h) and that only it reads.
enum class DType { kBf16, kF16, kF32, kBf16Panels, kInt8Panels, kInt4Panels };

constexpr bool IsPanels(DType dtype) { return dtype >= DType::kBf16Panels; }

// Bytes of one element. Requires: a type on disk.
constexpr int64_t DTypeBytes(DType dtype) {
  DCHECK(!IsPanels(dtype));
  return dtype == DType::kF32 ? 4 : 2;
}
constexpr const char* DTypeName(DType dtype) {
  constexpr const char* kNames[] = {"bf16", "f16", "f32", "bf16", "int8", "int4"};
  return kNames[static_cast<int>(dtype)];
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
