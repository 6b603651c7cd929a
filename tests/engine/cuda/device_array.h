// Helpers of the kernel tests: arrays on the device, and repetition over the emulation's fiber orders.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "engine/base/check.h"
#include "engine/cuda/device.h"

namespace minitron::engine::cuda {

// The stream of the tests of one binary.
inline cudaStream_t TestStream() {
  static cudaStream_t stream = [] {
    cudaStream_t created = nullptr;
    CHECK(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking) == cudaSuccess);
    return created;
  }();
  return stream;
}

// An array in device memory. Fresh memory holds NaN in the emulation.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t size) : size_(size) {
    void* memory = nullptr;
    CHECK(cudaMalloc(&memory, num_bytes()) == cudaSuccess);
    data_ = static_cast<T*>(memory);
    // What nobody writes is NaN, on a device too.
    CHECK(cudaMemsetAsync(data_, 0xFF, num_bytes(), TestStream()) == cudaSuccess);
    CHECK(cudaStreamSynchronize(TestStream()) == cudaSuccess);
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(static_cast<int64_t>(values.size())) { Set(values); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  T* data() const { return data_; }
  int64_t size() const { return size_; }
  void Set(const std::vector<T>& values) {
    CHECK(static_cast<int64_t>(values.size()) == size_);
    CHECK(cudaMemcpyAsync(data_, values.data(), num_bytes(), cudaMemcpyHostToDevice, TestStream()) == cudaSuccess);
    CHECK(cudaStreamSynchronize(TestStream()) == cudaSuccess);
  }
  // Waits for the stream.
  std::vector<T> Get() const {
    std::vector<T> values(size_);
    CHECK(cudaMemcpyAsync(values.data(), data_, num_bytes(), cudaMemcpyDeviceToHost, TestStream()) == cudaSuccess);
    CHECK(cudaStreamSynchronize(TestStream()) == cudaSuccess);
    return values;
  }

 private:
  size_t num_bytes() const { return static_cast<size_t>(size_) * sizeof(T); }
  T* data_ = nullptr;
  int64_t size_;
};

// Calls `test` in forward, reverse and random order of threads and blocks.
template <typename Test>
void ForEachOrder(const Test& test) {
#if defined(MINITRON_CUDA_EMULATION)
  for (const auto order : {emulation::Order::kForward, emulation::Order::kReverse, emulation::Order::kRandom}) {
    emulation::SetOrder(order, 17);
    test();
  }
  emulation::SetOrder(emulation::Order::kForward);
#else
  test();
#endif
}

// bf16 on the host, rounded to nearest even.
inline Bf16 HostBf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline float HostFloat(Bf16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

// E4M3 on the host, by the definition of the format.
inline double HostE4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}
// A row of the fp8 cache: the codes nearest to row * 2^-exponent (ties to the even code), found by trying all.
struct HostFp8Row {
  std::vector<uint8_t> codes;
  int8_t exponent = 0;
  double Value(size_t i) const { return std::ldexp(HostE4m3(codes[i]), exponent); }
};
inline HostFp8Row EncodeFp8Row(const std::vector<double>& row) {
  double largest = 0.0;
  for (const double x : row) largest = std::max(largest, std::abs(x));
  HostFp8Row encoded;
  encoded.exponent = -100;
  while (std::ldexp(largest, -encoded.exponent) > 448.0 && encoded.exponent < 7) ++encoded.exponent;
  for (const double x : row) {
    const double scaled = std::ldexp(std::abs(x), -encoded.exponent);
    uint8_t best = 0;
    for (uint8_t code = 1; code < 0x7F; ++code) {
      const double nearer = std::abs(HostE4m3(best) - scaled) - std::abs(HostE4m3(code) - scaled);
      if (nearer > 0.0 || (nearer == 0.0 && code % 2 == 0)) best = code;
    }
    encoded.codes.push_back(static_cast<uint8_t>(best | (std::signbit(x) ? 0x80 : 0)));
  }
  return encoded;
}

// Normally distributed bf16 values.
inline std::vector<Bf16> RandomBf16(std::mt19937_64& random, int64_t count, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<Bf16> values(count);
  for (Bf16& x : values) x = HostBf16(normal(random));
  return values;
}

}  // namespace minitron::engine::cuda
