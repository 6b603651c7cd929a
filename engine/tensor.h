// Views of arrays: pointer and shape, never owning. Row-major.
#pragma once

#include <cstdint>

#include "engine/base/check.h"

namespace minitron::engine {

// Types of weights. The first four are element types on disk, row-major; E4M3 has a scale for each row. The others are
// whole layouts that a backend packs them into at load and that only it reads: panels the CPU's
// (engine/cpu/panel_format.h), tiles the CUDA backend's (engine/cuda/quantized_weights.h).
enum class DType {
  kBf16,
  kF16,
  kF32,
  kE4m3,
  kBf16Panels,
  kInt8Panels,
  kInt4Panels,
  kInt8Tiles,
  kInt4Tiles,
  kE4m3Tiles
};

constexpr bool IsPanels(DType dtype) { return dtype >= DType::kBf16Panels && dtype <= DType::kInt4Panels; }
constexpr bool IsTiles(DType dtype) { return dtype >= DType::kInt8Tiles; }

// Bytes of one element. Requires: a type on disk.
constexpr int64_t DTypeBytes(DType dtype) {
  DCHECK(!IsPanels(dtype) && !IsTiles(dtype));
  return dtype == DType::kF32 ? 4 : dtype == DType::kE4m3 ? 1 : 2;
}
constexpr const char* DTypeName(DType dtype) {
  constexpr const char* kNames[] = {"bf16", "f16", "f32", "fp8", "bf16", "int8", "int4", "int8", "int4", "fp8"};
  return kNames[static_cast<int>(dtype)];
}

// A weight as loaded: typed at run time, memory-mapped or owned by the Checkpoint. Data is aligned to its element.
struct WeightView {
  const void* data = nullptr;
  DType dtype = DType::kBf16;
  int64_t rows = 0;  // outputs; 1 for a vector
  int64_t cols = 0;  // inputs
  // kE4m3: [rows]; an element is its code's value times its row's scale.
  const float* scales = nullptr;
  int64_t size() const { return rows * cols; }
  int64_t bytes() const { return size() * DTypeBytes(dtype); }  // requires: a type on disk
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
