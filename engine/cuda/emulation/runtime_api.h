// The subset of CUDA's host API the engine uses, under CUDA's names, on a device that lives in this process's memory.
//
// Streams are lazy: a copy, a fill or a kernel runs when somebody waits for it (or for something behind it), never
// when it is enqueued. So a host that reads a result too early sees the old bytes, and a host that reuses a staging
// buffer too early sends the wrong ones. Capturing records closures with their arguments by value; launching a graph
// enqueues them: what was read on the host while capturing is frozen, as on a device.
//
// The device's time is the work of the stream, a microsecond for each copy, fill, kernel or graph.
//
// Device memory is filled with NaN when allocated and lies between guard zones, which are checked when a stream has run
// and when the memory is freed. A copy or fill outside of it is refused with cudaErrorInvalidValue.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "engine/cuda/emulation/block.h"

// NOLINTBEGIN: CUDA's names and signatures.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorECCUncorrectable = 214,
  cudaErrorNotReady = 600,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchTimeout = 702,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorUnknown = 999,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem;
  int major, minor;
  int multiProcessorCount;
  size_t sharedMemPerBlockOptin;
  int l2CacheSize;
};

typedef struct EmulatedStream* cudaStream_t;
typedef struct EmulatedEvent* cudaEvent_t;
typedef struct EmulatedGraph* cudaGraph_t;
typedef struct EmulatedGraphExec* cudaGraphExec_t;

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes);
cudaError_t cudaMalloc(void** pointer, size_t num_bytes);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaMallocHost(void** pointer, size_t num_bytes);
cudaError_t cudaFreeHost(void* pointer);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, size_t num_bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
// NOLINTEND

namespace minitron::engine::cuda::emulation {

// Puts a kernel on a stream, or into the graph the stream captures. Error: cudaErrorInvalidConfiguration for a grid,
// block or shared memory no device accepts.
cudaError_t EnqueueKernel(cudaStream_t stream, const GridShape& shape, std::function<void()> run);

// --- For tests. ---

// Makes the call with this number (1 is the next one) return `error`, and every later one too if `sticky`, as a broken
// device does; calls that release something still release it. 0 turns it off. Kernel launches are calls.
void FailCall(int number, cudaError_t error, bool sticky);
// Calls made since the last FailCall or SetDevice.
int NumCalls();
// Every error there is, success not among them.
std::vector<cudaError_t> AllErrors();
// Kernels are put on streams and into graphs as ever, and do nothing: for tests of what the host makes of errors.
void SkipKernels(bool skip);

// Kernels put on a stream or into a graph so far that may start early.
int NumEarlyKernels();

// Called by work while it runs: to events it takes so much longer than its microsecond.
void PassTime(float milliseconds);

// Objects created and not destroyed.
struct LiveObjects {
  int device_allocations = 0, host_allocations = 0, streams = 0, events = 0, graphs = 0;
  friend bool operator==(const LiveObjects&, const LiveObjects&) = default;
};
LiveObjects CountLiveObjects();

// The device: memory it has, whether there is one, and ten times its compute capability.
void SetDevice(size_t total_bytes, int num_devices = 1, int compute_capability = 89);

}  // namespace minitron::engine::cuda::emulation
