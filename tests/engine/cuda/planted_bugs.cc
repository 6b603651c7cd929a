// A small kernel with one bug on demand. Compiled with a sanitizer; what it must report is in CMakeLists.txt.
// Usage: planted_bugs none | missing_block_barrier | missing_warp_barrier | shared_overrun | global_overrun
#include <cstdio>
#include <cstring>

#include "engine/base/check.h"
#include "engine/cuda/device.h"

namespace minitron::engine::cuda {
namespace {

enum class Bug { kNone, kMissingBlockBarrier, kMissingWarpBarrier, kSharedOverrun, kGlobalOverrun };

constexpr int kThreads = 64;

// Each thread copies 16 bytes of its warp to shared memory, its neighbour lane reads them, then the block sums up.
KERNEL(kThreads) SumNeighbours(const float* in, float* out, Bug bug) {
  float* staged = reinterpret_cast<float*>(SharedMemory());  // [threads, 4]
  float* sums = staged + kThreads * 4;                       // [threads]
  const int t = static_cast<int>(ThreadIndex().x);
  CpAsync16(staged + 4 * t, in + 4 * t, true);
  CpAsyncCommit();
  CpAsyncWait<0>();
  if (bug != Bug::kMissingWarpBarrier) SyncWarp();
  const int neighbour = (t & ~31) + (t + 1) % 32;
  float sum = 0.0f;
  for (int i = 0; i < 4; ++i) sum += staged[4 * neighbour + i];
  sums[t] = sum;
  if (bug == Bug::kSharedOverrun && t == kThreads - 1) sums[kThreads] = sum;
  if (bug != Bug::kMissingBlockBarrier) SyncThreads();
  float total = 0.0f;
  for (int i = 0; i < kThreads; ++i) total += sums[i];
  out[t] = total;
  if (bug == Bug::kGlobalOverrun && t == kThreads - 1) out[kThreads] = total;
}

int Run(Bug bug) {
  float *in = nullptr, *out = nullptr;
  cudaStream_t stream = nullptr;
  CHECK(cudaMalloc(reinterpret_cast<void**>(&in), kThreads * 16) == cudaSuccess);
  CHECK(cudaMalloc(reinterpret_cast<void**>(&out), kThreads * 4) == cudaSuccess);
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
  CHECK(cudaMemsetAsync(in, 0, kThreads * 16, stream) == cudaSuccess);
  CHECK(Launch(&SumNeighbours, {2}, {kThreads}, kThreads * 20, stream, in, out, bug) == cudaSuccess);
  CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
  CHECK(out[0] == 0.0f);
  std::printf("clean\n");
  return 0;
}

}  // namespace
}  // namespace minitron::engine::cuda

int main(int argc, char** argv) {
  using minitron::engine::cuda::Bug;
  const char* names[] = {"none", "missing_block_barrier", "missing_warp_barrier", "shared_overrun", "global_overrun"};
  for (int i = 0; i < 5; ++i) {
    if (argc == 2 && std::strcmp(argv[1], names[i]) == 0) return minitron::engine::cuda::Run(static_cast<Bug>(i));
  }
  std::fprintf(stderr, "usage: planted_bugs %s|%s|%s|%s|%s\n", names[0], names[1], names[2], names[3], names[4]);
  return 2;
}
