#include "tests/gpu/stream_kernels.h"

namespace minitron::gpu {
namespace {

using namespace engine::cuda;  // NOLINT: the device's intrinsics

constexpr int kReadThreads = 256;
constexpr int kUnroll = 8;  // loads under way per thread

KERNEL(kReadThreads) ReadKernel(const unsigned char* data, int64_t num_vectors, uint32_t* result) {
  const int64_t stride = static_cast<int64_t>(GridDim().x) * kReadThreads;
  int64_t i = static_cast<int64_t>(BlockIndex().x) * kReadThreads + ThreadIndex().x;
  uint32_t sum = 0;
  for (; i + (kUnroll - 1) * stride < num_vectors; i += kUnroll * stride) {
    Vector16 vectors[kUnroll];
    UNROLL
    for (int u = 0; u < kUnroll; ++u) vectors[u] = Load16(data + (i + u * stride) * 16);
    UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      sum ^= vectors[u].words[0] ^ vectors[u].words[1] ^ vectors[u].words[2] ^ vectors[u].words[3];
    }
  }
  for (; i < num_vectors; i += stride) {
    const Vector16 vector = Load16(data + i * 16);
    sum ^= vector.words[0] ^ vector.words[1] ^ vector.words[2] ^ vector.words[3];
  }
  UNROLL
  for (int mask = 16; mask > 0; mask /= 2) sum ^= ShuffleXor(sum, mask);
  if (Lane() == 0) AtomicOr(result, sum);
}

}  // namespace

cudaError_t ReadAll(const unsigned char* data, int64_t num_bytes, uint32_t* result, int num_blocks,
                    cudaStream_t stream) {
  return Launch(&ReadKernel, {static_cast<unsigned>(num_blocks)}, {kReadThreads}, 0, stream, data, num_bytes / 16,
                result);
}

}  // namespace minitron::gpu
