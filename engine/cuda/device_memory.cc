#include "engine/cuda/device_memory.h"

#include "absl/strings/str_cat.h"

namespace minitron::engine::cuda {

absl::Status ToStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string message =
      absl::StrCat("cuda: ", what, ": ", cudaGetErrorName(error), " (", cudaGetErrorString(error), ")");
  switch (error) {
    case cudaErrorMemoryAllocation:
      return absl::ResourceExhaustedError(message);
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorNoKernelImageForDevice:
      return absl::FailedPreconditionError(message);
    default:
      return absl::InternalError(message);
  }
}

absl::StatusOr<PinnedBuffer> PinnedBuffer::Allocate(int64_t num_bytes) {
  void* memory = nullptr;
  const absl::Status status = ToStatus(cudaMallocHost(&memory, static_cast<size_t>(num_bytes)), "cudaMallocHost");
  if (!status.ok()) return status;
  PinnedBuffer buffer;
  buffer.data_ = static_cast<unsigned char*>(memory);
  buffer.size_ = num_bytes;
  return buffer;
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ != nullptr) cudaFreeHost(data_);
}

absl::StatusOr<Stream> CreateStream() {
  cudaStream_t stream = nullptr;
  const absl::Status status = ToStatus(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  if (!status.ok()) return status;
  return Stream(stream);
}

absl::StatusOr<Event> CreateEvent() {
  cudaEvent_t event = nullptr;
  const absl::Status status = ToStatus(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  if (!status.ok()) return status;
  return Event(event);
}

}  // namespace minitron::engine::cuda
