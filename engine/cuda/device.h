// The device side of every kernel: a small set of intrinsics, and the only inline PTX. Under nvcc they are
// instructions; under a C++ compiler they run in the emulation, where one kernel source is tested without a GPU.
//
// A kernel may use: KERNEL, DEVICE, Launch, the functions below and plain C++. Not: inline asm, <<<>>>, static
// __shared__ arrays, threadIdx and the other built-in variables, warp functions of CUDA headers, lanes that leave a
// collective or a barrier early.
//
//   KERNEL(n[, b]) Name(...)   a kernel for at most n threads per block, at least b blocks per processor
//   HOST_DEVICE                before a constexpr function both sides call
//   UNROLL                     before a loop over registers: indices must be constants
//   UNROLL_BY(n)               the same, n steps at a time: fewer values are alive at once
//   BeginKernel()              every thread's first call in a kernel that may start early (LaunchStream)
//   SharedMemory()             the block's dynamic shared memory, 128-byte aligned
//   CpAsync16(s, g, valid)     16 bytes global -> shared, zeros if not valid; visible to this thread after CpAsyncWait
//                              of its group, to others after a barrier behind that
//   LoadMatrix4                four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l
//   / 8 MmaBf16(c, a, b0, b1)      c[16x8] += a[16x16] * b[16x8], bf16 in, fp32 sums TransposeMatrix(f)         an 8x8
//   matrix of 16-bit elements, transposed across the warp
#pragma once

#if defined(MINITRON_CUDA_EMULATION)
#include "engine/cuda/emulation/intrinsics.h"
#elif !defined(__CUDACC__)  // host code of a real build: the types, no intrinsics

#include <cstdint>

#include "engine/cuda/runtime.h"

#define HOST_DEVICE

#else

#include <cuda_runtime.h>

#include <cstdint>

#include "engine/cuda/runtime.h"

#define DEVICE __device__ __forceinline__
#define KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define HOST_DEVICE __host__ __device__
#define UNROLL _Pragma("unroll")
#define UNROLL_PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(n) UNROLL_PRAGMA(unroll n)

namespace minitron::engine::cuda {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

DEVICE Dim3 ThreadIndex() { return {threadIdx.x, threadIdx.y, threadIdx.z}; }
DEVICE Dim3 BlockIndex() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
DEVICE Dim3 BlockDim() { return {blockDim.x, blockDim.y, blockDim.z}; }
DEVICE Dim3 GridDim() { return {gridDim.x, gridDim.y, gridDim.z}; }
DEVICE unsigned char* SharedMemory() {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return shared_memory;
}

// Waits until the kernels in front are done and what they wrote is there, then lets the next one's blocks start.
DEVICE void BeginKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE void SyncThreads() { __syncthreads(); }
DEVICE void SyncWarp() { __syncwarp(); }

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;
template <typename T>
DEVICE T Shuffle(T value, int source_lane) {
  return __shfl_sync(kAllLanes, value, source_lane);
}
template <typename T>
DEVICE T ShuffleXor(T value, int lane_mask) {
  return __shfl_xor_sync(kAllLanes, value, lane_mask);
}
template <typename T>
DEVICE T ShuffleUp(T value, int delta) {
  return __shfl_up_sync(kAllLanes, value, delta);
}
DEVICE uint32_t Ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }
DEVICE bool Any(bool predicate) { return __any_sync(kAllLanes, predicate) != 0; }

struct alignas(16) Vector16 {
  uint32_t words[4];
};
DEVICE Vector16 Load16(const void* source) { return *static_cast<const Vector16*>(source); }
DEVICE void Store16(void* destination, const Vector16& value) { *static_cast<Vector16*>(destination) = value; }

DEVICE uint32_t SharedAddress(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

DEVICE void CpAsync16(void* shared, const void* global, bool valid) {
  const int source_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)), "l"(global),
               "r"(source_bytes)
               : "memory");
}
DEVICE void CpAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
DEVICE void CpAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

DEVICE void LoadMatrix4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}
DEVICE void LoadMatrix4Transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}
DEVICE uint32_t TransposeMatrix(uint32_t fragment) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(fragment));
  return result;
}
DEVICE void MmaBf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 64-bit integers are `unsigned long long` to CUDA's atomics and `unsigned long` to <cstdint>: the same bits.
DEVICE uint32_t AtomicAdd(uint32_t* address, uint32_t value) { return atomicAdd(address, value); }
DEVICE uint64_t AtomicAdd(uint64_t* address, uint64_t value) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}
DEVICE uint32_t AtomicOr(uint32_t* address, uint32_t bits) { return atomicOr(address, bits); }
DEVICE uint64_t AtomicMax(uint64_t* address, uint64_t value) {
  return atomicMax(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}

DEVICE float FusedMultiplyAdd(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float Exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// Within one unit in the last place; not for sums that must round correctly.
DEVICE float Reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
DEVICE float Exp(float x) { return expf(x); }
DEVICE float Log(double x) { return static_cast<float>(log(x)); }
DEVICE float ReciprocalSqrt(float x) { return 1.0f / sqrtf(x); }

DEVICE uint32_t FloatBits(float x) { return __float_as_uint(x); }
DEVICE float BitsToFloat(uint32_t bits) { return __uint_as_float(bits); }

DEVICE uint32_t PackBf16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// a * b + c of two bf16 each, rounded to nearest even; subnormal numbers count. The emulation rounds twice, so use it
// where the result is exact.
DEVICE uint32_t FmaBf16Pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

// Enqueues a kernel; see the emulation's twin. Shared memory above 48 KiB has to be asked for.
template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), Dim3 grid, Dim3 block, size_t shared_bytes, LaunchStream stream,
                   const Arguments&... arguments) {
  constexpr size_t kDefaultSharedBytes = 48 << 10;
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(block.x, block.y, block.z);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream.stream;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = stream.early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace minitron::engine::cuda

#endif

// What all worlds share.
namespace minitron::engine::cuda {

// A bfloat16 as it lies in memory: the upper half of an fp32.
struct Bf16 {
  uint16_t bits;
};

#if defined(DEVICE)

DEVICE float ToFloat(Bf16 x) { return BitsToFloat(static_cast<uint32_t>(x.bits) << 16); }
DEVICE Bf16 ToBf16(float x) { return {static_cast<uint16_t>(PackBf16(x, 0.0f))}; }
DEVICE float LowHalf(uint32_t pair) { return BitsToFloat(pair << 16); }
DEVICE float HighHalf(uint32_t pair) { return BitsToFloat(pair & 0xFFFF0000u); }

DEVICE uint32_t MultiplyBf16Pair(uint32_t a, uint32_t b) { return FmaBf16Pair(a, b, 0x80008000u); }  // plus -0

DEVICE int Lane() { return static_cast<int>(ThreadIndex().x % 32); }
DEVICE int WarpIndex() { return static_cast<int>(ThreadIndex().x / 32); }

// Whether NaN or infinite.
DEVICE bool NotFinite(float x) { return (FloatBits(x) & 0x7F800000u) == 0x7F800000u; }

#endif  // DEVICE

}  // namespace minitron::engine::cuda
