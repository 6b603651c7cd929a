// Owners of what CUDA hands out, and errors as absl::Status. Every call's result goes through here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cuda/runtime.h"

namespace minitron::engine::cuda {

// OK, or what failed with CUDA's name and text. RESOURCE_EXHAUSTED: out of memory. FAILED_PRECONDITION: no device, or
// none this build runs on. INTERNAL: everything else; most of these stay until the process ends.
absl::Status ToStatus(cudaError_t error, const char* what);

// `count` elements of device memory. Empty when default-constructed.
template <typename T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  static absl::StatusOr<DeviceBuffer> Allocate(int64_t count) {
    void* memory = nullptr;
    const absl::Status status = ToStatus(cudaMalloc(&memory, static_cast<size_t>(count) * sizeof(T)), "cudaMalloc");
    if (!status.ok()) return status;
    return DeviceBuffer(static_cast<T*>(memory), count);
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) cudaFree(data_);  // nothing to do about an error here: the device is gone
  }

  T* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  DeviceBuffer(T* data, int64_t size) : data_(data), size_(size) {}
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// Page-locked host memory, which copies can read and write while the host goes on.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  static absl::StatusOr<PinnedBuffer> Allocate(int64_t num_bytes);
  PinnedBuffer(PinnedBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~PinnedBuffer();

  unsigned char* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  unsigned char* data_ = nullptr;
  int64_t size_ = 0;
};

// A CUDA object with a create and a destroy function.
template <typename Handle, cudaError_t (*kDestroy)(Handle)>
class Owned {
 public:
  Owned() = default;
  explicit Owned(Handle handle) : handle_(handle) {}
  Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, Handle{})) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_ != Handle{}) kDestroy(handle_);
  }
  Handle get() const { return handle_; }

 private:
  Handle handle_{};
};
using Stream = Owned<cudaStream_t, &cudaStreamDestroy>;
using Event = Owned<cudaEvent_t, &cudaEventDestroy>;
using Graph = Owned<cudaGraph_t, &cudaGraphDestroy>;
using GraphExec = Owned<cudaGraphExec_t, &cudaGraphExecDestroy>;

absl::StatusOr<Stream> CreateStream();
absl::StatusOr<Event> CreateEvent();  // without timing

}  // namespace minitron::engine::cuda
