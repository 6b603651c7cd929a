// The host API's second half: streams, events, graphs, and the work on them.
#include <cstring>
#include <utility>

#include "engine/cuda/emulation/device_state.h"

namespace minitron::engine::cuda::emulation {

void RunUntil(EmulatedStream& stream, uint64_t position) {
  EmulatedStream* before = std::exchange(TheDevice().running, &stream);  // work may run another stream's
  while (stream.num_done < position) {
    const Work work = std::move(stream.queue.front());
    stream.queue.pop_front();
    work();
    ++stream.num_done;
  }
  TheDevice().running = before;
  for (const auto& [address, allocation] : TheDevice().memory) CheckGuards(allocation);
}

namespace {

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

}  // namespace

void PassTime(float milliseconds) {
  EmulatedStream& stream = *TheDevice().running;
  stream.passed.emplace_back(stream.num_done, milliseconds);
}

cudaError_t EnqueueKernel(cudaStream_t stream, const GridShape& shape, std::function<void()> run) {
  RETURN_IF_PLANTED();
  const Dim3 grid = shape.grid, block = shape.block;
  const uint64_t num_threads = uint64_t{block.x} * block.y * block.z;
  const bool fits = num_threads > 0 && num_threads <= kMaxThreadsPerBlock && shape.shared_bytes <= kMaxSharedBytes &&
                    grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.y <= 65535 && grid.z <= 65535 && block.z <= 64;
  if (!fits) return cudaErrorInvalidConfiguration;
  TheDevice().num_early_kernels += shape.early ? 1 : 0;
  return Enqueue(stream, TheDevice().skip_kernels ? [] {} : std::move(run));
}

}  // namespace minitron::engine::cuda::emulation

using namespace minitron::engine::cuda::emulation;  // NOLINT: CUDA's names are global

// NOLINTBEGIN: CUDA's names and signatures.
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

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

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

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  RETURN_IF_PLANTED();
  if (ms == nullptr || begin == nullptr || end == nullptr) return cudaErrorInvalidValue;
  if (begin->stream == nullptr || begin->stream != end->stream) return cudaErrorInvalidValue;
  if (begin->stream->num_done < end->position || begin->stream->num_done < begin->position) return cudaErrorNotReady;
  *ms = 1e-3f * static_cast<float>(static_cast<int64_t>(end->position - begin->position));
  for (const auto& [position, passed] : begin->stream->passed) {
    if (position >= begin->position && position < end->position) *ms += passed;
  }
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  RETURN_IF_PLANTED();
  if (stream == nullptr || event == nullptr) return cudaErrorInvalidValue;
  if (event->stream == nullptr) return cudaSuccess;
  const EmulatedEvent recorded = *event;
  return Enqueue(stream, [recorded] { RunUntil(*recorded.stream, recorded.position); });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  RETURN_IF_PLANTED();
  if (stream == nullptr) return cudaErrorInvalidValue;
  *status = stream->capturing != nullptr ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
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
// NOLINTEND
