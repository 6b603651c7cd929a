// 64-bit size arithmetic on numbers that come from a file: every product, sum and range is checked. std only.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace minitron::engine {

// Product of non-negative dims (1 for rank 0); nullopt when a dim is negative or the product exceeds 2^63 - 1.
inline std::optional<int64_t> CheckedProduct(const std::vector<int64_t>& dims) {
  // A zero dim must not hide that the others overflow: products are taken of the dims as if zeros were ones.
  int64_t product = 1;
  bool has_zero = false;
  for (const int64_t dim : dims) {
    if (dim < 0) return std::nullopt;
    has_zero = has_zero || dim == 0;
    if (__builtin_mul_overflow(product, dim == 0 ? int64_t{1} : dim, &product)) return std::nullopt;
  }
  return has_zero ? 0 : product;
}

// a * b; nullopt when it does not fit.
inline std::optional<int64_t> CheckedMul(int64_t a, int64_t b) {
  int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

// Whether [offset, offset + length) lies in [0, size), without computing the sum.
constexpr bool InRange(uint64_t offset, uint64_t length, uint64_t size) {
  return offset <= size && length <= size - offset;
}

}  // namespace minitron::engine
