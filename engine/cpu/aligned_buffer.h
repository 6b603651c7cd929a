// AlignedBuffer: owned memory aligned to a cache line, zeroed by the kernel and committed on first touch.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <utility>

#include "engine/base/check.h"

namespace minitron::engine::cpu {

// For tests: what every byte of fresh memory is. 0xFF makes every float a NaN, so that a result shows whether anything
// was read before it was written.
inline std::atomic<unsigned char> fresh_byte_for_testing{0};

// An anonymous mapping of `size` elements. Pages cost memory only once they are touched, so an oversized buffer is
// free.
template <typename T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // Aborts if the address space is exhausted; how much may be asked for is checked by the factory.
  explicit AlignedBuffer(int64_t size) : size_(size) {
    if (size == 0) return;
    void* memory =
        mmap(nullptr, num_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(memory != MAP_FAILED);
    if (const unsigned char fresh = fresh_byte_for_testing.load(); fresh != 0) std::memset(memory, fresh, num_bytes());
    data_ = static_cast<T*>(memory);
  }
  AlignedBuffer(AlignedBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~AlignedBuffer() {
    if (data_ != nullptr) munmap(data_, num_bytes());
  }

  T* data() const { return data_; }
  int64_t size() const { return size_; }
  size_t num_bytes() const { return static_cast<size_t>(size_) * sizeof(T); }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace minitron::engine::cpu
