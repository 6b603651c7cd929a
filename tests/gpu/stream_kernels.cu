#include "tests/bench/random_value.h"
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

constexpr int kFillThreads = 256;
constexpr int kFillBlocks = 4096;  // the rest in a loop

KERNEL(kFillThreads) FillBf16Kernel(uint64_t seed, int64_t count, float scale, Bf16* out) {
  const int64_t stride = static_cast<int64_t>(GridDim().x) * kFillThreads * 8;
  for (int64_t i = (static_cast<int64_t>(BlockIndex().x) * kFillThreads + ThreadIndex().x) * 8; i < count;
       i += stride) {
    Vector16 vector;
    UNROLL
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = bench::RandomBf16Value(seed, i + 2 * j, scale);
      vector.words[j] = low | static_cast<uint32_t>(bench::RandomBf16Value(seed, i + 2 * j + 1, scale)) << 16;
    }
    if (i + 8 <= count) {
      Store16(out + i, vector);
    } else {
      for (int64_t j = i; j < count; ++j) {
        out[j] = Bf16{static_cast<uint16_t>(vector.words[(j - i) / 2] >> ((j - i) % 2 * 16))};
      }
    }
  }
}

KERNEL(kFillThreads) FillFloatKernel(uint64_t seed, int64_t count, float scale, float* out) {
  const int64_t stride = static_cast<int64_t>(GridDim().x) * kFillThreads;
  for (int64_t i = static_cast<int64_t>(BlockIndex().x) * kFillThreads + ThreadIndex().x; i < count; i += stride) {
    out[i] = BitsToFloat(static_cast<uint32_t>(bench::RandomBf16Value(seed, i, scale)) << 16);
  }
}

unsigned FillBlocks(int64_t count, int per_block) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < kFillBlocks ? blocks : kFillBlocks);
}

}  // namespace

cudaError_t FillRandom(uint64_t seed, int64_t count, float scale, Bf16* out, cudaStream_t stream) {
  return Launch(&FillBf16Kernel, {FillBlocks(count, kFillThreads * 8)}, {kFillThreads}, 0, stream, seed, count, scale,
                out);
}
cudaError_t FillRandom(uint64_t seed, int64_t count, float scale, float* out, cudaStream_t stream) {
  return Launch(&FillFloatKernel, {FillBlocks(count, kFillThreads)}, {kFillThreads}, 0, stream, seed, count, scale,
                out);
}

cudaError_t ReadAll(const unsigned char* data, int64_t num_bytes, uint32_t* result, int num_blocks,
                    cudaStream_t stream) {
  return Launch(&ReadKernel, {static_cast<unsigned>(num_blocks)}, {kReadThreads}, 0, stream, data, num_bytes / 16,
                result);
}

}  // namespace minitron::gpu
