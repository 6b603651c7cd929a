#include "engine/cuda/emulation/runtime_api.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "engine/base/check.h"
#include "engine/cuda/emulation/fiber.h"

using minitron::engine::cuda::emulation::kMaxSharedBytes;
using minitron::engine::cuda::emulation::LiveObjects;

using Work = std::function<void()>;

struct EmulatedGraph {
  std::vector<Work> nodes;
};
struct EmulatedGraphExec {
  std::shared_ptr<const std::vector<Work>> nodes;
};
struct EmulatedStream {
  std::deque<Work> queue;
  uint64_t num_enqueued = 0, num_done = 0;
  EmulatedGraph* capturing = nullptr;
};
struct EmulatedEvent {
  EmulatedStream* stream = nullptr;  // null until recorded
  uint64_t position = 0;             // work of the stream in front of it
};

namespace {

constexpr size_t kAlignment = 256;  // what cudaMalloc promises
constexpr size_t kGuardBytes = 256;
constexpr unsigned char kGuardByte = 0xA5;

struct Allocation {
  size_t num_bytes;
  unsigned char* block;  // guard, data, guard
};

// The device and everything created on it. One lock: host threads may come from anywhere.
struct Device {
  std::recursive_mutex mutex;
  std::map<uintptr_t, Allocation> memory;
  std::vector<EmulatedStream*> streams;
  LiveObjects live;
  size_t total_bytes = size_t{1} << 40;
  size_t used_bytes = 0;
  int num_devices = 1;
  int num_calls = 0;
  int failing_call = 0;
  bool sticky = false;
  cudaError_t failure = cudaSuccess;
};

Device& TheDevice() {
  static Device device;
  return device;
}

using Lock = std::lock_guard<std::recursive_mutex>;

// Counts a call; what it has to fail with, if anything.
cudaError_t Count() {
  Device& device = TheDevice();
  ++device.num_calls;
  if (device.failing_call == 0) return cudaSuccess;
  const bool fails =
      device.num_calls == device.failing_call || (device.sticky && device.num_calls > device.failing_call);
  return fails ? device.failure : cudaSuccess;
}

#define RETURN_IF_PLANTED()     \
  Lock lock(TheDevice().mutex); \
  if (const cudaError_t planted = Count(); planted != cudaSuccess) return planted

// The allocation that holds [pointer, pointer + num_bytes), or null.
const Allocation* FindAllocation(const void* pointer, size_t num_bytes) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto next = TheDevice().memory.upper_bound(address);
  if (next == TheDevice().memory.begin()) return nullptr;
  --next;
  return address + num_bytes <= next->first + next->second.num_bytes ? &next->second : nullptr;
}

void CheckGuards(const Allocation& allocation) {
  using minitron::engine::cuda::emulation::Poison;
  using minitron::engine::cuda::emulation::Unpoison;
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

void RunUntil(EmulatedStream& stream, uint64_t position) {
  while (stream.num_done < position) {
    const Work work = std::move(stream.queue.front());
    stream.queue.pop_front();
    work();
    ++stream.num_done;
  }
  for (const auto& [address, allocation] : TheDevice().memory) CheckGuards(allocation);
}

cudaError_t Enqueue(cudaStream_t stream, Work work) {
  if (stream == nullptr) return cudaErrorInvalidValue;  // the engine uses its own streams only
  if (stream->capturing != nullptr) {
    stream->capturing->nodes.push_back(std::move(work));
  } else {
    stream->queue.push_back(std::move(work));
    ++stream->num_enqueued;
  }
  return cudaSuccess;
}

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
  properties->major = 8;
  properties->minor = 9;
  properties->multiProcessorCount = 2;
  properties->sharedMemPerBlockOptin = kMaxSharedBytes;
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
  minitron::engine::cuda::emulation::Poison(bytes, kGuardBytes);
  minitron::engine::cuda::emulation::Poison(bytes + kGuardBytes + num_bytes, kGuardBytes);
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
  minitron::engine::cuda::emulation::Unpoison(found->second.block, found->second.num_bytes + 2 * kGuardBytes);
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

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  RETURN_IF_PLANTED();
  if (kind != cudaMemcpyDeviceToHost && FindAllocation(to, num_bytes) == nullptr) return cudaErrorInvalidValue;
  if (kind != cudaMemcpyHostToDevice && FindAllocation(from, num_bytes) == nullptr) return cudaErrorInvalidValue;
  return Enqueue(stream, [=] { std::memcpy(to, from, num_bytes); });
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t num_bytes, cudaStream_t stream) {
  RETURN_IF_PLANTED();
  if (FindAllocation(to, num_bytes) == nullptr) return cudaErrorInvalidValue;
  return Enqueue(stream, [=] { std::memset(to, value, num_bytes); });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  RETURN_IF_PLANTED();
  *stream = new EmulatedStream;
  TheDevice().streams.push_back(*stream);
  ++TheDevice().live.streams;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Lock lock(TheDevice().mutex);
  const cudaError_t planted = Count();
  if (stream == nullptr) return cudaErrorInvalidValue;
  RunUntil(*stream, stream->num_enqueued);
  std::erase(TheDevice().streams, stream);
  delete stream->capturing;
  delete stream;
  --TheDevice().live.streams;
  return planted;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  RETURN_IF_PLANTED();
  if (stream == nullptr) return cudaErrorInvalidValue;
  if (stream->capturing != nullptr) return cudaErrorStreamCaptureUnsupported;
  RunUntil(*stream, stream->num_enqueued);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  RETURN_IF_PLANTED();
  *event = new EmulatedEvent;
  ++TheDevice().live.events;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Lock lock(TheDevice().mutex);
  const cudaError_t planted = Count();
  if (event == nullptr) return cudaErrorInvalidValue;
  delete event;
  --TheDevice().live.events;
  return planted;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  RETURN_IF_PLANTED();
  if (event == nullptr || stream == nullptr) return cudaErrorInvalidValue;
  *event = {stream, stream->num_enqueued};
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  RETURN_IF_PLANTED();
  if (event == nullptr) return cudaErrorInvalidValue;
  if (event->stream != nullptr) RunUntil(*event->stream, event->position);
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  RETURN_IF_PLANTED();
  if (stream == nullptr || event == nullptr) return cudaErrorInvalidValue;
  if (event->stream == nullptr) return cudaSuccess;
  const EmulatedEvent recorded = *event;
  return Enqueue(stream, [recorded] { RunUntil(*recorded.stream, recorded.position); });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  RETURN_IF_PLANTED();
  if (stream == nullptr || stream->capturing != nullptr) return cudaErrorInvalidValue;
  stream->capturing = new EmulatedGraph;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  Lock lock(TheDevice().mutex);
  const cudaError_t planted = Count();
  if (stream == nullptr || stream->capturing == nullptr) return cudaErrorInvalidValue;
  *graph = std::exchange(stream->capturing, nullptr);
  if (planted != cudaSuccess) {
    delete *graph;
    *graph = nullptr;
    return planted;
  }
  ++TheDevice().live.graphs;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  RETURN_IF_PLANTED();
  if (graph == nullptr) return cudaErrorInvalidValue;
  *executable = new EmulatedGraphExec{std::make_shared<const std::vector<Work>>(graph->nodes)};
  ++TheDevice().live.graphs;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  RETURN_IF_PLANTED();
  if (executable == nullptr) return cudaErrorInvalidValue;
  return Enqueue(stream, [nodes = executable->nodes] {
    for (const Work& node : *nodes) node();
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  Lock lock(TheDevice().mutex);
  const cudaError_t planted = Count();
  if (graph == nullptr) return cudaErrorInvalidValue;
  delete graph;
  --TheDevice().live.graphs;
  return planted;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  Lock lock(TheDevice().mutex);
  const cudaError_t planted = Count();
  if (executable == nullptr) return cudaErrorInvalidValue;
  delete executable;
  --TheDevice().live.graphs;
  return planted;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) { return TextOf(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return TextOf(error).text; }
// NOLINTEND

namespace minitron::engine::cuda::emulation {

cudaError_t EnqueueKernel(cudaStream_t stream, Dim3 grid, Dim3 block, size_t shared_bytes, std::function<void()> run) {
  RETURN_IF_PLANTED();
  const uint64_t num_threads = uint64_t{block.x} * block.y * block.z;
  const bool fits = num_threads > 0 && num_threads <= kMaxThreadsPerBlock && shared_bytes <= kMaxSharedBytes &&
                    grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.y <= 65535 && grid.z <= 65535 && block.z <= 64;
  if (!fits) return cudaErrorInvalidConfiguration;
  return Enqueue(stream, std::move(run));
}

void FailCall(int number, cudaError_t error, bool sticky) {
  Lock lock(TheDevice().mutex);
  TheDevice().num_calls = 0;
  TheDevice().failing_call = number;
  TheDevice().failure = error;
  TheDevice().sticky = sticky;
}

int NumCalls() {
  Lock lock(TheDevice().mutex);
  return TheDevice().num_calls;
}

LiveObjects CountLiveObjects() {
  Lock lock(TheDevice().mutex);
  return TheDevice().live;
}

void SetDevice(size_t total_bytes, int num_devices) {
  Lock lock(TheDevice().mutex);
  TheDevice().total_bytes = total_bytes;
  TheDevice().num_devices = num_devices;
  TheDevice().num_calls = 0;
}

}  // namespace minitron::engine::cuda::emulation
