// The host API's first half: the device, its memory, its errors, and what tests ask of it.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "engine/cuda/emulation/device_state.h"
#include "engine/cuda/emulation/fiber.h"

namespace minitron::engine::cuda::emulation {
namespace {

constexpr size_t kAlignment = 256;  // what cudaMalloc promises
constexpr size_t kGuardBytes = 256;
constexpr unsigned char kGuardByte = 0xA5;

struct ErrorText {
  cudaError_t error;
  const char* name;
  const char* text;
};
constexpr ErrorText kErrorTexts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver", "driver is older than the runtime"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no device was found"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device number"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice", "not built for this device"},
    {cudaErrorECCUncorrectable, "cudaErrorECCUncorrectable", "uncorrectable memory error"},
    {cudaErrorNotReady, "cudaErrorNotReady", "not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "illegal memory access"},
    {cudaErrorLaunchTimeout, "cudaErrorLaunchTimeout", "the kernel took too long"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "the kernel failed"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported", "not permitted while capturing"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

const ErrorText& TextOf(cudaError_t error) {
  for (const ErrorText& entry : kErrorTexts) {
    if (entry.error == error) return entry;
  }
  return kErrorTexts[std::size(kErrorTexts) - 1];
}

}  // namespace

Device& TheDevice() {
  static Device device;
  return device;
}

cudaError_t Count() {
  Device& device = TheDevice();
  ++device.num_calls;
  if (device.failing_call == 0) return cudaSuccess;
  const bool fails =
      device.num_calls == device.failing_call || (device.sticky && device.num_calls > device.failing_call);
  return fails ? device.failure : cudaSuccess;
}

const Allocation* FindAllocation(const void* pointer, size_t num_bytes) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto next = TheDevice().memory.upper_bound(address);
  if (next == TheDevice().memory.begin()) return nullptr;
  --next;
  return address + num_bytes <= next->first + next->second.num_bytes ? &next->second : nullptr;
}

void CheckGuards(const Allocation& allocation) {
  unsigned char* end = allocation.block + kGuardBytes + allocation.num_bytes;
  const auto check = [](unsigned char* guard, const char* where) {
    Unpoison(guard, kGuardBytes);
    for (size_t i = 0; i < kGuardBytes; ++i) {
      if (guard[i] != kGuardByte) {
        std::fprintf(stderr, "emulation: device memory was written %s an allocation\n", where);
        std::abort();
      }
    }
    Poison(guard, kGuardBytes);
  };
  check(allocation.block, "in front of");
  check(end, "behind");
}

void FailCall(int number, cudaError_t error, bool sticky) {
  Lock lock(TheDevice().mutex);
  TheDevice().num_calls = 0;
  TheDevice().failing_call = number;
  TheDevice().failure = error;
  TheDevice().sticky = sticky;
}

std::vector<cudaError_t> AllErrors() {
  std::vector<cudaError_t> errors;
  for (const ErrorText& entry : kErrorTexts) {
    if (entry.error != cudaSuccess) errors.push_back(entry.error);
  }
  return errors;
}

void SkipKernels(bool skip) {
  Lock lock(TheDevice().mutex);
  TheDevice().skip_kernels = skip;
}

int NumCalls() {
  Lock lock(TheDevice().mutex);
  return TheDevice().num_calls;
}

int NumEarlyKernels() {
  Lock lock(TheDevice().mutex);
  return TheDevice().num_early_kernels;
}

LiveObjects CountLiveObjects() {
  Lock lock(TheDevice().mutex);
  return TheDevice().live;
}

void SetDevice(size_t total_bytes, int num_devices, int compute_capability) {
  Lock lock(TheDevice().mutex);
  TheDevice().total_bytes = total_bytes;
  TheDevice().num_devices = num_devices;
  TheDevice().compute_capability = compute_capability;
  TheDevice().num_calls = 0;
}

}  // namespace minitron::engine::cuda::emulation

using namespace minitron::engine::cuda::emulation;  // NOLINT: CUDA's names are global

// NOLINTBEGIN: CUDA's names and signatures.
cudaError_t cudaGetDeviceCount(int* count) {
  RETURN_IF_PLANTED();
  *count = TheDevice().num_devices;
  return *count == 0 ? cudaErrorNoDevice : cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  RETURN_IF_PLANTED();
  return device >= 0 && device < TheDevice().num_devices ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  RETURN_IF_PLANTED();
  if (device < 0 || device >= TheDevice().num_devices) return cudaErrorInvalidDevice;
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "emulation");
  properties->totalGlobalMem = TheDevice().total_bytes;
  properties->major = TheDevice().compute_capability / 10;
  properties->minor = TheDevice().compute_capability % 10;
  properties->multiProcessorCount = 2;
  properties->sharedMemPerBlockOptin = kMaxSharedBytes;
  properties->l2CacheSize = 1 << 20;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  RETURN_IF_PLANTED();
  *total_bytes = TheDevice().total_bytes;
  *free_bytes = TheDevice().total_bytes - TheDevice().used_bytes;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, size_t num_bytes) {
  RETURN_IF_PLANTED();
  Device& device = TheDevice();
  if (num_bytes == 0) return cudaErrorInvalidValue;
  if (num_bytes > device.total_bytes - device.used_bytes) return cudaErrorMemoryAllocation;
  void* block = nullptr;
  if (posix_memalign(&block, kAlignment, num_bytes + 2 * kGuardBytes) != 0) return cudaErrorMemoryAllocation;
  auto* bytes = static_cast<unsigned char*>(block);
  std::memset(bytes, kGuardByte, kGuardBytes);
  std::memset(bytes + kGuardBytes, 0xFF, num_bytes);  // NaN as fp32 and as bf16
  std::memset(bytes + kGuardBytes + num_bytes, kGuardByte, kGuardBytes);
  Poison(bytes, kGuardBytes);
  Poison(bytes + kGuardBytes + num_bytes, kGuardBytes);
  device.memory[reinterpret_cast<uintptr_t>(bytes + kGuardBytes)] = {num_bytes, bytes};
  device.used_bytes += num_bytes;
  ++device.live.device_allocations;
  *pointer = bytes + kGuardBytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  Lock lock(TheDevice().mutex);
  const cudaError_t planted = Count();
  if (pointer == nullptr) return planted;
  Device& device = TheDevice();
  const auto found = device.memory.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == device.memory.end()) return cudaErrorInvalidValue;
  for (EmulatedStream* stream : device.streams) RunUntil(*stream, stream->num_enqueued);  // cudaFree synchronises
  CheckGuards(found->second);
  Unpoison(found->second.block, found->second.num_bytes + 2 * kGuardBytes);
  std::free(found->second.block);
  device.used_bytes -= found->second.num_bytes;
  device.memory.erase(found);
  --device.live.device_allocations;
  return planted;
}

cudaError_t cudaMallocHost(void** pointer, size_t num_bytes) {
  RETURN_IF_PLANTED();
  if (posix_memalign(pointer, kAlignment, std::max<size_t>(num_bytes, 1)) != 0) return cudaErrorMemoryAllocation;
  ++TheDevice().live.host_allocations;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* pointer) {
  Lock lock(TheDevice().mutex);
  const cudaError_t planted = Count();
  if (pointer == nullptr) return planted;
  for (EmulatedStream* stream : TheDevice().streams) RunUntil(*stream, stream->num_enqueued);
  std::free(pointer);
  --TheDevice().live.host_allocations;
  return planted;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) { return TextOf(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return TextOf(error).text; }
// NOLINTEND
