// Activations as the panel kernels read them: rearranged or quantised once per matrix product, shared by all outputs.
#pragma once

#include <cstdint>

#include "engine/cpu/aligned_buffer.h"
#include "engine/cpu/thread_pool.h"
#include "engine/tensor.h"

namespace minitron::engine::cpu {

// Rows of activations, group-major, so that the rows of one group of inputs are one contiguous slab. Inputs past the
// depth are zero. A row with a value that is not finite gets a NaN scale (int4: its group does), so its outputs are
// NaN.
//   for bf16 weights: the values themselves, or rounded to bf16 (to nearest, ties to even), in slices of 128 inputs.
//                     (Rows a power of two apart would share one set of the L1 cache.) As floats in the order 1, 0, 3,
//                     2, .. in which the kernels add; as bf16 in their own order.
//   for int8 weights: int16, scale = max|x| / 32767 of the whole row. Products of a group sum exactly in 32 bits:
//                     64 * 127 * 32767 < 2^31.
//   for int4 weights: int8, scale = max|x| / 127 of each group of 32. `offsets` are -8 * sum(q) of the group, which
//                     undoes the plus 8 of the stored weights; where the kernels sum in halves of 16 bits
//                     (panel_tiles-inl.h), the same of the first and of the last two inputs of each quad.
struct QuantizedRows {
  int64_t rows = 0;
  bool for_amx = false;           // arranged for amx_matmul.h
  const float* floats = nullptr;  // [slices, rows, kFloatSlice]
  // Instead of floats, where the processor multiplies bf16:
  uint16_t* pairs = nullptr;      // [slices, rows, kFloatSlice] bf16
  uint16_t* parts = nullptr;      // for AMX: [tiles of 32 inputs, rows, num_parts, 32 inputs] bf16
  int64_t num_parts = 0;          // 1, or 3 that add up to the float exactly
  int16_t* wide = nullptr;        // [groups, rows, kInt8Group]; for AMX bytes
  float* row_scales = nullptr;    // [rows]
  int8_t* narrow = nullptr;       // [groups, rows, kInt4Group]
  float* group_scales = nullptr;  // [groups, rows]
  int32_t* offsets = nullptr;     // [groups, rows]
};

inline constexpr int64_t kFloatSlice = 128;

// Memory for QuantizedRows of up to max_rows x max_depth, rounded to bf16 for bf16 weights if `round`. Engine thread
// only.
class QuantizedRowsBuffer {
 public:
  QuantizedRowsBuffer() = default;
  QuantizedRowsBuffer(int64_t max_rows, int64_t max_depth, bool round = false);

  // Arranges x [rows, depth] for panels of `dtype`. The result lives until the next call.
  // Each row's result is a function of that row alone. Requires: within the maxima.
  QuantizedRows Quantize(ThreadPool& pool, MatrixView<const float> x, DType dtype);

 private:
  void ArrangeForBf16(ThreadPool& pool, const MatrixView<const float>& x, QuantizedRows& rows);

  bool round_ = false;
  AlignedBuffer<float> values_;  // of any width
  AlignedBuffer<float> scales_;
  AlignedBuffer<int32_t> offsets_;
};

}  // namespace minitron::engine::cpu
