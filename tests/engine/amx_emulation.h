// AMX in plain C++: read ahead of engine/cpu/amx_matmul.cc (-include), it takes the place of the tile instructions, so
// that machines without AMX run its kernels, under a sanitizer too. The vector instructions around them stay, so the
// processor still needs AVX-512. What would fault (a tile that is not configured, shapes that do not fit) ends the
// process.
//
// Sums are those of Intel's manual: int8 exact; bf16 per instruction in two chains of fused multiply-adds, over the
// even and over the odd inputs, whose sum is added; subnormals are zero.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#include <cpuid.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "engine/cpu/panel_matmul.h"  // and what it includes, which makes system calls of its own

namespace minitron::engine::amx_emulation {

struct Tile {
  int rows = 0;       // 0: not configured
  int row_bytes = 0;  // a multiple of 4
  uint8_t bytes[16][64] = {};
};

inline thread_local Tile tiles[8];

inline void Require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}

inline Tile& Configured(int tile) {
  Require(tiles[tile].rows > 0, "a tile that is not configured");
  return tiles[tile];
}

inline void Release() {
  for (Tile& tile : tiles) tile = Tile();
}

// 64 bytes: palette, start row, 14 of zero, bytes per row of 16 tiles (16 bits each), rows of 16 tiles (8 bits each).
inline void LoadConfig(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  Require(bytes[0] == 1 && bytes[1] == 0, "a palette or start row other than 1 and 0");
  Release();
  for (int t = 0; t < 8; ++t) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * t, 2);
    Require(row_bytes <= 64 && row_bytes % 4 == 0 && bytes[48 + t] <= 16, "a shape that no tile has");
    tiles[t].row_bytes = row_bytes;
    tiles[t].rows = bytes[48 + t];
  }
}

inline void Load(int tile, const void* from, int64_t stride) {
  Tile& t = Configured(tile);
  std::memset(t.bytes, 0, sizeof(t.bytes));
  for (int r = 0; r < t.rows; ++r) std::memcpy(t.bytes[r], static_cast<const uint8_t*>(from) + r * stride, t.row_bytes);
}

inline void Store(int tile, void* to, int64_t stride) {
  const Tile& t = Configured(tile);
  for (int r = 0; r < t.rows; ++r) std::memcpy(static_cast<uint8_t*>(to) + r * stride, t.bytes[r], t.row_bytes);
}

inline void Zero(int tile) { std::memset(Configured(tile).bytes, 0, sizeof(Tile::bytes)); }

// Calls add(sum, four bytes of a, four bytes of b, k) for every sum and, innermost, every k.
template <typename Sum, class Begin, class Add, class End>
void ForSums(int sum_tile, int a_tile, int b_tile, const Begin& begin, const Add& add, const End& end) {
  Tile& c = Configured(sum_tile);
  const Tile &a = Configured(a_tile), &b = Configured(b_tile);
  Require(a.rows == c.rows && a.row_bytes == 4 * b.rows && b.row_bytes == c.row_bytes, "shapes that do not fit");
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.row_bytes; n += 4) {
      Sum sum;
      std::memcpy(&sum, &c.bytes[m][n], 4);
      begin();
      for (int k = 0; k < b.rows; ++k) add(sum, &a.bytes[m][4 * k], &b.bytes[k][n]);
      end(sum);
      std::memcpy(&c.bytes[m][n], &sum, 4);
    }
  }
}

// A: int8_t or uint8_t, what the bytes of the activations are.
template <typename A>
void DotInt8(int sum_tile, int a_tile, int b_tile) {
  ForSums<int32_t>(
      sum_tile, a_tile, b_tile, [] {},
      [](int32_t& sum, const uint8_t* a, const uint8_t* b) {
        for (int i = 0; i < 4; ++i) sum += static_cast<A>(a[i]) * static_cast<int8_t>(b[i]);
      },
      [](int32_t&) {});
}

inline float Bf16At(const uint8_t* bytes) {
  uint16_t half;
  std::memcpy(&half, bytes, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return std::fpclassify(value) == FP_SUBNORMAL ? 0.0f : value;
}

inline float Flushed(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? 0.0f : value; }

inline void DotBf16(int sum_tile, int a_tile, int b_tile) {
  float chains[2];
  ForSums<float>(
      sum_tile, a_tile, b_tile, [&] { chains[0] = chains[1] = 0.0f; },
      [&](float&, const uint8_t* a, const uint8_t* b) {
        for (int i = 0; i < 2; ++i) chains[i] = Flushed(std::fma(Bf16At(a + 2 * i), Bf16At(b + 2 * i), chains[i]));
      },
      [&](float& sum) { sum = Flushed(sum + Flushed(chains[0] + chains[1])); });
}

// What asks whether there is AMX hears yes: from the processor,
inline int Cpuid(unsigned /*leaf*/, unsigned /*subleaf*/, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  *a = *b = *c = *d = ~0U;
  return 1;
}

// and from the kernel.
inline int64_t Syscall(int64_t /*number*/, int64_t /*request*/, int64_t /*feature*/) { return 0; }

}  // namespace minitron::engine::amx_emulation

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ::minitron::engine::amx_emulation::LoadConfig(config)
#define _tile_release() ::minitron::engine::amx_emulation::Release()
#define _tile_loadd(tile, from, stride) ::minitron::engine::amx_emulation::Load(tile, from, stride)
#define _tile_stored(tile, to, stride) ::minitron::engine::amx_emulation::Store(tile, to, stride)
#define _tile_zero(tile) ::minitron::engine::amx_emulation::Zero(tile)
#define _tile_dpbssd(sum, a, b) ::minitron::engine::amx_emulation::DotInt8<int8_t>(sum, a, b)
#define _tile_dpbusd(sum, a, b) ::minitron::engine::amx_emulation::DotInt8<uint8_t>(sum, a, b)
#define _tile_dpbf16ps(sum, a, b) ::minitron::engine::amx_emulation::DotBf16(sum, a, b)
#define __get_cpuid_count(...) ::minitron::engine::amx_emulation::Cpuid(__VA_ARGS__)
#define syscall(...) ::minitron::engine::amx_emulation::Syscall(__VA_ARGS__)
