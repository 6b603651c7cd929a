// Matrix products with weights packed in panels.
#pragma once

#include "absl/types/span.h"
#include "engine/cpu/quantize_rows.h"
#include "engine/cpu/thread_pool.h"
#include "engine/tensor.h"

namespace minitron::engine::cpu {

// out[t, o] = sum_i x[t, i] * w[o, i].   x [T, in] fp32, w panels of panel_format.h, out [T, out] fp32
// Each (t, o) is summed in one order whatever T, the tile, the thread or the width of the vectors:
//   bf16  one chain of fused multiply-adds over i = 1, 0, 3, 2, ..
//   int8  a group's products sum exactly in integers; one chain over the groups, sum = fma(group, w scale, sum); times
//         the row's scale at the end
//   int4  the same with sum = fma(group, w scale * x scale, sum)
// Targets without fused multiply-add (SSE) round the product first. AMX (amx_matmul.h), where the machine has it, gives
// the same bits for int8 and int4. bf16 it sums in its own order: x is three bf16 parts, high to low, that add up to it
// exactly, or rounded to one; per 32 inputs and part, sum += (chain over even inputs) + (chain over odd inputs),
// subnormals as zero. `workspace` holds the rearranged rows and says whether they are rounded to bf16 for bf16 weights;
// it must be large enough for x. Rounded rows have the same bits whether the vector kernels multiply bf16 or fp32, as
// long as no value is subnormal.
// Several products of the same rows are one loop over all their panels, and x is rearranged once. Requires: w of one
// type and depth.
struct PanelProduct {
  WeightView w;
  MatrixView<float> out;
};
void PanelMatMul(ThreadPool& pool, MatrixView<const float> x, absl::Span<const PanelProduct> products,
                 QuantizedRowsBuffer& workspace);

// Whether the vector kernels multiply rounded rows as bf16 (AVX-512 BF16), twice as many numbers a cycle as in fp32.
// False if Highway's choice of instruction set is restricted to less.
bool Bf16ProductsUsable();

// The kernel behind it, for panels [begin, end) on the calling thread. Benchmarks use it to time one thread.
struct PanelJob {
  WeightView w;
  MatrixView<const float> x;
  QuantizedRows quantized;  // x as the kernels of w read it
  MatrixView<float> out;
};
void PanelRange(const PanelJob& job, int64_t begin, int64_t end);

}  // namespace minitron::engine::cpu
