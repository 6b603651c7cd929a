// Panels: how the CPU backend lays out weight matrices, so that a thread reads one forward stream.
//
// A matrix [out, in] is cut into panels of 32 outputs. A panel holds all inputs of its outputs, in ascending input
// order, and is one contiguous range. Outputs past the end are zero, and so are inputs past the end. Little-endian
// throughout.
//
//   bf16   per pair of inputs:   [32 outputs][2 inputs] bf16                                                128 bytes
//   int8   per 64 inputs:        [2 halves of 16 outputs][16 quads of inputs][16 outputs][4 inputs] int8,
//                                the inputs of a quad in the order 0, 2, 1, 3; then [32] scales, bf16      2112 bytes
//   int4   per 32 inputs:        [2 halves of 16 outputs][4 octets of inputs][16 outputs][4 bytes]; byte j holds input
//                                j of the octet in its low and input j + 4 in its high half, each the value plus 8;
//                                then [32] scales, bf16                                                      576 bytes
//
// So a 32-bit lane of any vector is one output and 2, 4 or 8 of its inputs, and every block starts on a cache line. The
// order within an int8 quad makes the sign-extended even and odd bytes of a lane the pairs (0, 1) and (2, 3).
#pragma once

#include <cstdint>

#include "engine/base/check.h"
#include "engine/tensor.h"

namespace minitron::engine::cpu {

inline constexpr int64_t kPanelOuts = 32;
inline constexpr int64_t kPanelAlignment = 64;

inline constexpr int64_t kInt8Group = 64;  // inputs that share a scale
inline constexpr int64_t kInt8BlockBytes = kPanelOuts * kInt8Group + kPanelOuts * 2;
inline constexpr int64_t kInt4Group = 32;
inline constexpr int64_t kInt4BlockBytes = kPanelOuts * kInt4Group / 2 + kPanelOuts * 2;
inline constexpr int64_t kBf16PairBytes = kPanelOuts * 4;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t NumPanels(int64_t outs) { return CeilDiv(outs, kPanelOuts); }

// Bytes of one panel of `depth` inputs. Requires: a panel type.
constexpr int64_t PanelBytes(DType dtype, int64_t depth) {
  DCHECK(IsPanels(dtype));
  if (dtype == DType::kBf16Panels) return CeilDiv(depth, 2) * kBf16PairBytes;
  if (dtype == DType::kInt8Panels) return CeilDiv(depth, kInt8Group) * kInt8BlockBytes;
  return CeilDiv(depth, kInt4Group) * kInt4BlockBytes;
}

// Bytes of a whole matrix, a multiple of kPanelAlignment.
constexpr int64_t PackedBytes(DType dtype, int64_t outs, int64_t depth) {
  return NumPanels(outs) * PanelBytes(dtype, depth);
}

// Writes panel `panel` of `source` (a type on disk) to `destination`, PanelBytes long. A pure function of the panel's
// rows: any thread may do any panel. Rounding: pack.cc. Returns false if numbers that had to be quantised are not
// finite; those groups get a NaN scale.
bool PackPanel(const WeightView& source, DType dtype, int64_t panel, uint8_t* destination);

// The values a packed matrix stands for, [rows, cols] row-major fp32: what its kernels multiply with. For tests and the
// quality table.
void UnpackPanels(const WeightView& packed, float* destination);

}  // namespace minitron::engine::cpu
