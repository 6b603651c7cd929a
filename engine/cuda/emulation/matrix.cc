// The arithmetic of the warp collectives on matrices, over all lanes' registers at once. Not instrumented, as block.cc.
#include <bit>
#include <cstring>

#include "engine/cuda/emulation/block.h"

namespace minitron::engine::cuda::emulation {
namespace {

uint32_t Register(const Slot* slots, unsigned lane, unsigned index) {
  uint32_t value;
  std::memcpy(&value, slots[lane].bytes + size_t{4} * index, sizeof(value));
  return value;
}
void SetRegister(Slot* slots, unsigned lane, unsigned index, uint32_t value) {
  std::memcpy(slots[lane].bytes + size_t{4} * index, &value, sizeof(value));
}
float HalfOf(uint32_t value, unsigned half) {
  return std::bit_cast<float>(half != 0 ? value & 0xFFFF0000u : value << 16);
}

// Matrix m is the rows held by lanes 8m .. 8m+7; lane 4i+j receives the elements (i, 2j) and (i, 2j+1) of each.
void LoadMatrix(Slot* slots, bool transposed) {
  uint16_t rows[4][8][8];
  for (unsigned lane = 0; lane < kWarpSize; ++lane) std::memcpy(rows[lane / 8][lane % 8], slots[lane].bytes, 16);
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const unsigned i = lane / 4, j = 2 * (lane % 4);
    for (unsigned m = 0; m < 4; ++m) {
      const uint32_t low = transposed ? rows[m][j][i] : rows[m][i][j];
      const uint32_t high = transposed ? rows[m][j + 1][i] : rows[m][i][j + 1];
      SetRegister(slots, lane, m, low | high << 16);
    }
  }
}

}  // namespace

void ComputeLoadMatrix(Slot* slots) { LoadMatrix(slots, false); }
void ComputeLoadMatrixTransposed(Slot* slots) { LoadMatrix(slots, true); }

void ComputeTransposeMatrix(Slot* slots) {
  uint16_t matrix[8][8];
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    std::memcpy(&matrix[lane / 4][size_t{2} * (lane % 4)], slots[lane].bytes, 4);
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const unsigned i = lane / 4, j = 2 * (lane % 4);
    SetRegister(slots, lane, 0, matrix[j][i] | static_cast<uint32_t>(matrix[j + 1][i]) << 16);
  }
}

// Fragments as in the PTX manual, "Matrix Fragments for mma.m16n8k16 with floating point type":
//   a[0], a[1]: rows lane/4 and lane/4 + 8, columns 2*(lane%4) + {0, 1};  a[2], a[3]: the same, columns + 8
//   b[0], b[1]: rows 2*(lane%4) + {0, 1} and + 8, column lane/4
//   c[0..3]:    rows lane/4 (c[0], c[1]) and lane/4 + 8 (c[2], c[3]), columns 2*(lane%4) + {0, 1}
// The sum over k runs in order, in fp32; hardware sums in its own order.
void ComputeMmaBf16(Slot* slots) {
  float a[16][16], b[16][8];
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const unsigned row = lane / 4, column = 2 * (lane % 4);
    for (unsigned half = 0; half < 2; ++half) {
      a[row][column + half] = HalfOf(Register(slots, lane, 0), half);
      a[row + 8][column + half] = HalfOf(Register(slots, lane, 1), half);
      a[row][column + 8 + half] = HalfOf(Register(slots, lane, 2), half);
      a[row + 8][column + 8 + half] = HalfOf(Register(slots, lane, 3), half);
      b[column + half][row] = HalfOf(Register(slots, lane, 4), half);
      b[column + 8 + half][row] = HalfOf(Register(slots, lane, 5), half);
    }
  }
  float product[16][8] = {};
  for (unsigned row = 0; row < 16; ++row) {
    for (unsigned k = 0; k < 16; ++k) {
      for (unsigned column = 0; column < 8; ++column) product[row][column] += a[row][k] * b[k][column];
    }
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    for (unsigned i = 0; i < 4; ++i) {
      const float c = std::bit_cast<float>(Register(slots, lane, 6 + i));
      const float sum = c + product[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
      SetRegister(slots, lane, i, std::bit_cast<uint32_t>(sum));
    }
  }
}

}  // namespace minitron::engine::cuda::emulation
