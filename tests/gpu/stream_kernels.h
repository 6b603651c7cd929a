// A kernel that only reads, to know how fast reading can be.
#pragma once

#include <cstdint>

#include "engine/cuda/device.h"

namespace minitron::gpu {

// Reads `num_bytes` (a multiple of 16) and writes one number that depends on all of them.
cudaError_t ReadAll(const unsigned char* data, int64_t num_bytes, uint32_t* result, int num_blocks,
                    cudaStream_t stream);

}  // namespace minitron::gpu
