// The intrinsics of device.h when a kernel is compiled for the emulation. What touches the kernel's memory is in this
// header, so that it is instrumented with the kernel and sanitizers name the kernel's line.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "engine/cuda/emulation/block.h"
#include "engine/cuda/runtime.h"

#define DEVICE inline
#define KERNEL(...) void
#define HOST_DEVICE
#define UNROLL
#define UNROLL_BY(n)

namespace minitron::engine::cuda {

using emulation::Where;

inline Dim3 ThreadIndex() { return emulation::ThreadIndex(); }
inline Dim3 BlockIndex() { return emulation::BlockIndex(); }
inline Dim3 BlockDim() { return emulation::BlockDim(); }
inline Dim3 GridDim() { return emulation::GridDim(); }
inline unsigned char* SharedMemory() { return emulation::SharedMemory(); }

inline void BeginKernel() { emulation::BeginThread(); }

inline void SyncThreads(const Where& where = Where::Current()) { emulation::BlockBarrier(where); }
inline void SyncWarp(const Where& where = Where::Current()) { emulation::WarpCollective(nullptr, 0, nullptr, where); }

template <typename T>
T Shuffle(T value, int source_lane, const Where& where = Where::Current()) {
  const emulation::Slot* slots = emulation::WarpCollective(&value, sizeof(T), nullptr, where);
  T result;
  std::memcpy(&result, slots[source_lane & 31].bytes, sizeof(T));
  return result;
}
template <typename T>
T ShuffleXor(T value, int lane_mask, const Where& where = Where::Current()) {
  return Shuffle(value, static_cast<int>(emulation::LaneIndex()) ^ lane_mask, where);
}
// The value `delta` lanes below; the own value in the first `delta` lanes.
template <typename T>
T ShuffleUp(T value, int delta, const Where& where = Where::Current()) {
  const int lane = static_cast<int>(emulation::LaneIndex());
  return Shuffle(value, lane >= delta ? lane - delta : lane, where);
}
inline uint32_t Ballot(bool predicate, const Where& where = Where::Current()) {
  const unsigned char vote = predicate ? 1 : 0;
  const emulation::Slot* slots = emulation::WarpCollective(&vote, 1, nullptr, where);
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < emulation::kWarpSize; ++lane) votes |= uint32_t{slots[lane].bytes[0]} << lane;
  return votes;
}
inline bool Any(bool predicate, const Where& where = Where::Current()) { return Ballot(predicate, where) != 0; }

inline void CheckAligned(const void* pointer, size_t alignment, const char* what, const Where& where) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) emulation::Die(what, where);
}

// 16 bytes as one access, as the compiler emits it for an aligned vector type.
struct alignas(16) Vector16 {
  uint32_t words[4];
};
inline Vector16 Load16(const void* source, const Where& where = Where::Current()) {
  CheckAligned(source, 16, "misaligned 16-byte load", where);
  return *static_cast<const Vector16*>(source);
}
inline void Store16(void* destination, const Vector16& value, const Where& where = Where::Current()) {
  CheckAligned(destination, 16, "misaligned 16-byte store", where);
  *static_cast<Vector16*>(destination) = value;
}

inline void CpAsync16(void* shared, const void* global, bool valid, const Where& where = Where::Current()) {
  CheckAligned(shared, 16, "misaligned cp.async destination", where);
  CheckAligned(global, 16, "misaligned cp.async source", where);
  emulation::PushCopy({shared, global, valid});
}
inline void CpAsyncCommit() { emulation::CommitCopies(); }
template <int kGroupsLeft>
void CpAsyncWait() {
  emulation::PendingCopy copy;
  while (emulation::PopCopy(kGroupsLeft, copy)) {
    *static_cast<Vector16*>(copy.destination) =
        copy.valid ? *static_cast<const Vector16*>(copy.source) : Vector16{{0, 0, 0, 0}};
  }
}

inline void LoadMatrixRows(uint32_t (&registers)[4], const void* row, void (*compute)(emulation::Slot*),
                           const Where& where) {
  CheckAligned(row, 16, "misaligned ldmatrix row", where);
  const Vector16 own = *static_cast<const Vector16*>(row);
  const emulation::Slot* slots = emulation::WarpCollective(&own, sizeof(own), compute, where);
  std::memcpy(registers, slots[emulation::LaneIndex()].bytes, sizeof(registers));
}
inline void LoadMatrix4(uint32_t (&registers)[4], const void* row, const Where& where = Where::Current()) {
  LoadMatrixRows(registers, row, &emulation::ComputeLoadMatrix, where);
}
inline void LoadMatrix4Transposed(uint32_t (&registers)[4], const void* row, const Where& where = Where::Current()) {
  LoadMatrixRows(registers, row, &emulation::ComputeLoadMatrixTransposed, where);
}
inline uint32_t TransposeMatrix(uint32_t fragment, const Where& where = Where::Current()) {
  const emulation::Slot* slots =
      emulation::WarpCollective(&fragment, sizeof(fragment), &emulation::ComputeTransposeMatrix, where);
  uint32_t result;
  std::memcpy(&result, slots[emulation::LaneIndex()].bytes, sizeof(result));
  return result;
}
inline void MmaBf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                    const Where& where = Where::Current()) {
  uint32_t registers[10] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(registers + 6, c, sizeof(c));
  const emulation::Slot* slots =
      emulation::WarpCollective(registers, sizeof(registers), &emulation::ComputeMmaBf16, where);
  std::memcpy(c, slots[emulation::LaneIndex()].bytes, sizeof(c));
}

// Relaxed, as on the device: a counter, not a fence.
template <typename T>
T AtomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline uint32_t AtomicOr(uint32_t* address, uint32_t bits) {
  return __atomic_fetch_or(address, bits, __ATOMIC_RELAXED);
}
template <typename T>
T AtomicMax(T* address, T value) {
  T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (seen < value &&
         !__atomic_compare_exchange_n(address, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}

inline float FusedMultiplyAdd(float a, float b, float c) { return std::fma(a, b, c); }
inline float Exp2(float x) { return std::exp2(x); }
inline float Reciprocal(float x) { return 1.0f / x; }
inline float Exp(float x) { return std::exp(x); }
inline float Log(double x) { return static_cast<float>(std::log(x)); }
inline float ReciprocalSqrt(float x) { return 1.0f / std::sqrt(x); }

inline uint32_t FloatBits(float x) { return std::bit_cast<uint32_t>(x); }
inline float BitsToFloat(uint32_t bits) { return std::bit_cast<float>(bits); }

// Round to nearest even; NaN stays NaN.
inline uint32_t PackBf16(float low, float high) {
  const auto narrow = [](float x) -> uint32_t {
    const uint32_t bits = FloatBits(x);
    if (x != x) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  };
  return narrow(low) | narrow(high) << 16;
}

inline uint32_t FmaBf16Pair(uint32_t a, uint32_t b, uint32_t c) {
  const auto low = [](uint32_t pair) { return BitsToFloat(pair << 16); };
  const auto high = [](uint32_t pair) { return BitsToFloat(pair & 0xFFFF0000u); };
  return PackBf16(std::fma(low(a), low(b), low(c)), std::fma(high(a), high(b), high(c)));
}

// Enqueues kernel(arguments...) on a stream. The arguments are copied now and used when the stream runs.
template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), Dim3 grid, Dim3 block, size_t shared_bytes, LaunchStream stream,
                   const Arguments&... arguments) {
  auto body = [kernel, ... copies = static_cast<Parameters>(arguments)] { kernel(copies...); };
  using Body = decltype(body);
  const emulation::GridShape shape{grid, block, shared_bytes, stream.early};
  return emulation::EnqueueKernel(stream.stream, shape, [shape, body]() mutable {
    emulation::RunGrid(
        shape, [](void* b) { (*static_cast<Body*>(b))(); }, &body);
  });
}

}  // namespace minitron::engine::cuda
