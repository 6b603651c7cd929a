// The panel kernels in AMX, Intel's 16 x 16 tiles: the same panels, several times the arithmetic of vectors.
#pragma once

#include <cstdint>

#include "engine/cpu/panel_matmul.h"

namespace minitron::engine::cpu {

// True when this processor has AMX for int8 and bf16, the kernel lets the process use it (asked for once), the program
// was built with it, Highway's choice of instruction set is not restricted to less, and AllowAmx(false) was not called.
bool AmxUsable();

// For tests and benchmarks of the other kernels. Not during a product.
void AllowAmx(bool allowed);

// Rows in AMX's arrangement (QuantizedRows::for_amx):
//   int8   the 64 int16 of a group of one row, 128 bytes, become in place 64 high (signed) and 64 low (unsigned) bytes,
//          in the order of the inputs in a panel's quads. `count` such groups follow each other.
void SplitWideRows(int16_t* groups, int64_t count);
//   bf16   `count` (<= 32) floats become three bf16 parts of 32 inputs each whose sum is the float exactly; zeros from
//          `count` on. 192 bytes. (Rounded rows are one part, in their own order.)
void SplitFloats(const float* x, int64_t count, uint16_t* parts);

// PanelRange (panel_matmul.h) of rows in that arrangement. Requires: AmxUsable().
void AmxPanelRange(const PanelJob& job, int64_t begin, int64_t end);

}  // namespace minitron::engine::cpu
