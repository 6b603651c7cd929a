// Kernels of the benchmark alone: one that only reads, to know how fast reading can be, and those that make weights.
#pragma once

#include <cstdint>

#include "engine/cuda/device.h"
#include "engine/cuda/kernels.h"

namespace minitron::gpu {

// Reads `num_bytes` (a multiple of 16) and writes one number that depends on all of them.
cudaError_t ReadAll(const unsigned char* data, int64_t num_bytes, uint32_t* result, int num_blocks,
                    cudaStream_t stream);

// out[i] = bench::RandomBf16Value(seed, i, scale), as bf16 or widened; the bits of a checkpoint made on the host.
// `out` is aligned to 16 bytes.
cudaError_t FillRandom(uint64_t seed, int64_t count, float scale, engine::cuda::Bf16* out, cudaStream_t stream);
cudaError_t FillRandom(uint64_t seed, int64_t count, float scale, float* out, cudaStream_t stream);

}  // namespace minitron::gpu
