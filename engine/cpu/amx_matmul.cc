// One tile is 16 rows of 64 bytes. A (activations) has a row per row of the batch, B (weights) a row per 4 bytes of
// inputs of 16 outputs, C 16 x 16 sums. A panel's layout is B's already: int8 and bf16 weights go from memory to the
// tile as they are, nibbles through a kilobyte of scratch. bf16 keeps its sums in tiles over the whole depth, so that
// 16 rows cost little more than one. int8 and int4 have to take them to vector registers group by group, for the
// scales: that pays from some rows on (quantize_rows.cc).
//
// Bits: int8 and int4 sums of a group are exact, so they are those of the vector kernels. bf16 is AMX's own order, a
// function of the depth alone: panel_matmul.h.
#include "engine/cpu/amx_matmul.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "engine/base/check.h"
#include "engine/cpu/panel_format.h"
#include "hwy/targets.h"

// Other compilers would need their own way to enable instructions for a part of a file.
#if HWY_COMPILER_GCC_ACTUAL >= 1100 && defined(__x86_64__) && defined(__linux__)
#define MINITRON_AMX 1
#include <cpuid.h>
// GCC 12 warns of the deliberately undefined operands in its own header.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#include <sys/syscall.h>
#include <unistd.h>
#else
#define MINITRON_AMX 0
#endif

namespace minitron::engine::cpu {
namespace {

std::atomic<bool> amx_allowed{true};

}  // namespace

void AllowAmx(bool allowed) { amx_allowed.store(allowed); }

#if MINITRON_AMX

namespace {

// The processor's bits, and the kernel's permission for the 8 KiB of tile state, which lasts for the process.
bool AskForAmx() {
  constexpr unsigned kBf16 = 1U << 22, kTiles = 1U << 24, kInt8 = 1U << 25;
  constexpr unsigned kNeeded = kBf16 | kTiles | kInt8;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kNeeded) != kNeeded) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool AmxUsable() {
  static const bool has_amx = AskForAmx();
  return has_amx && amx_allowed.load(std::memory_order_relaxed) && (hwy::SupportedTargets() & HWY_AVX3_DL) != 0;
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8,amx-bf16")

namespace {

constexpr int64_t kRowBlock = 128;  // rows that pass over a panel at a time
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileInputs = 32;  // bf16 inputs of a tile
constexpr int64_t kExactParts = 3;   // bf16 parts of a float
constexpr int64_t kPrefetchBytes = 4096;

// Tile registers: sums 0 to 3, activations 4 and 5, weights 6 and 7.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct Scratch {
  alignas(64) float sums[(kRowBlock + kTileRows) * kPanelOuts];  // with room for the rows a last tile has too many
  alignas(64) int32_t products[4 * kTileRows * 16];
  alignas(64) uint8_t weights[2 * kTileBytes];
};

// Tiles of equal height for a block of rows. The last may reach past the end: it reads what lies there (there is room:
// QuantizedRowsBuffer), and what it computes from that is dropped.
struct RowTiles {
  int64_t count, height;
};

RowTiles TilesFor(int64_t rows) {
  const int64_t count = CeilDiv(rows, kTileRows);
  return {count, CeilDiv(rows, count)};
}

void Configure(const RowTiles& tiles, DType dtype) {
  TileConfig config;
  const int64_t depth_bytes = dtype == DType::kInt4Panels ? kInt4Group : 64;
  for (int tile = 0; tile < 8; ++tile) {
    const bool weights = tile >= 6, activations = tile == 4 || tile == 5;
    config.row_bytes[tile] = static_cast<uint16_t>(activations ? depth_bytes : 64);
    config.rows[tile] = static_cast<uint8_t>(weights ? depth_bytes / 4 : tiles.height);
  }
  _tile_loadconfig(&config);
}

inline void Prefetch(const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(from + kPrefetchBytes + i), _MM_HINT_T0);
  }
}

inline __m512 LoadScales(const uint8_t* scales) {
  const __m256i narrow = _mm256_load_si256(reinterpret_cast<const __m256i*>(scales));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

// ---- int8: a group's products with the high and with the low bytes of the activations ----

void Int8Rows(const PanelJob& job, const uint8_t* panel, int64_t first_row, int64_t rows, const RowTiles& tiles,
              Scratch& scratch) {
  const auto* x = reinterpret_cast<const uint8_t*>(job.quantized.wide + first_row * kInt8Group);
  const int64_t x_stride = job.quantized.rows * kInt8Group * 2;
  int32_t* products = scratch.products;
  for (int64_t i = 0; i < job.w.cols; i += kInt8Group, panel += kInt8BlockBytes, x += x_stride) {
    if (first_row == 0) Prefetch(panel, kInt8BlockBytes);
    _tile_loadd(6, panel, 64);
    _tile_loadd(7, panel + kTileBytes, 64);
    const __m512 scale0 = LoadScales(panel + 2 * kTileBytes), scale1 = LoadScales(panel + 2 * kTileBytes + 32);
    for (int64_t t = 0, first = 0; t < tiles.count; ++t, first += tiles.height) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      _tile_loadd(4, x + first * 128, 128);
      _tile_loadd(5, x + first * 128 + 64, 128);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
      _tile_stored(0, products, 64);
      _tile_stored(1, products + 256, 64);
      _tile_stored(2, products + 512, 64);
      _tile_stored(3, products + 768, 64);
      float* sum = scratch.sums + first * kPanelOuts;
      const int64_t count = std::min(tiles.height, rows - first);
      for (int64_t r = 0; r < count; ++r, sum += kPanelOuts) {
        const int32_t* row = products + r * 16;
        const __m512i exact0 =
            _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(row), 8), _mm512_load_si512(row + 512));
        const __m512i exact1 =
            _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(row + 256), 8), _mm512_load_si512(row + 768));
        _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact0), scale0, _mm512_load_ps(sum)));
        _mm512_store_ps(sum + 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact1), scale1, _mm512_load_ps(sum + 16)));
      }
    }
  }
}

// ---- int4: nibbles become signed bytes once for all rows ----

inline void UnpackInt4Block(const uint8_t* block, uint8_t* weights) {
  const __m512i nibble = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
  for (int64_t i = 0; i < kPanelOuts * kInt4Group / 2; i += 64) {
    const __m512i octets = _mm512_load_si512(block + i);
    const __m512i low = _mm512_and_si512(octets, nibble);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi32(octets, 4), nibble);
    _mm512_store_si512(weights + 2 * i, _mm512_sub_epi8(low, eight));
    _mm512_store_si512(weights + 2 * i + 64, _mm512_sub_epi8(high, eight));
  }
}

void Int4Rows(const PanelJob& job, const uint8_t* panel, int64_t first_row, int64_t rows, const RowTiles& tiles,
              Scratch& scratch) {
  int32_t* products = scratch.products;
  int64_t at = first_row;
  for (int64_t i = 0; i < job.w.cols; i += kInt4Group, panel += kInt4BlockBytes, at += job.quantized.rows) {
    if (first_row == 0) Prefetch(panel, kInt4BlockBytes);
    UnpackInt4Block(panel, scratch.weights);
    _tile_loadd(6, scratch.weights, 64);
    _tile_loadd(7, scratch.weights + kTileBytes / 2, 64);
    const uint8_t* scales = panel + kPanelOuts * kInt4Group / 2;
    const __m512 scale0 = LoadScales(scales), scale1 = LoadScales(scales + 32);
    for (int64_t t = 0, first = 0; t < tiles.count; ++t, first += tiles.height) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_loadd(4, job.quantized.narrow + (at + first) * kInt4Group, kInt4Group);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_stored(0, products, 64);
      _tile_stored(1, products + 256, 64);
      float* sum = scratch.sums + first * kPanelOuts;
      const float* row_scales = job.quantized.group_scales + at + first;
      const int64_t count = std::min(tiles.height, rows - first);
      for (int64_t r = 0; r < count; ++r, sum += kPanelOuts) {
        const __m512 row_scale = _mm512_set1_ps(row_scales[r]);
        const __m512 exact0 = _mm512_cvtepi32_ps(_mm512_load_si512(products + r * 16));
        const __m512 exact1 = _mm512_cvtepi32_ps(_mm512_load_si512(products + r * 16 + 256));
        _mm512_store_ps(sum, _mm512_fmadd_ps(exact0, _mm512_mul_ps(scale0, row_scale), _mm512_load_ps(sum)));
        _mm512_store_ps(sum + 16, _mm512_fmadd_ps(exact1, _mm512_mul_ps(scale1, row_scale), _mm512_load_ps(sum + 16)));
      }
    }
  }
}

// ---- bf16: the sums stay in tiles over the whole depth ----

// Two tiles of rows, or one, over a panel.
template <bool kTwo, int64_t kParts>
void Bf16Tiles(const uint16_t* x, int64_t x_stride, int64_t height, const uint8_t* panel, int64_t depth, bool fetch,
               uint8_t* tail, float* sums) {
  const uint16_t* second = x + height * kParts * kTileInputs;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < depth; i += kTileInputs, panel += 2 * kTileBytes, x += x_stride, second += x_stride) {
    const uint8_t* weights = panel;
    if (depth - i < kTileInputs) {  // the panel ends within the tile
      std::memset(tail, 0, 2 * kTileBytes);
      std::memcpy(tail, panel, CeilDiv(depth - i, 2) * kBf16PairBytes);
      weights = tail;
    } else if (fetch) {
      Prefetch(panel, 2 * kTileBytes);
    }
    _tile_loadd(6, weights, kBf16PairBytes);
    _tile_loadd(7, weights + 64, kBf16PairBytes);
    for (int64_t part = 0; part < kParts; ++part) {
      _tile_loadd(4, x + part * kTileInputs, kParts * kTileInputs * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTwo) {
        _tile_loadd(5, second + part * kTileInputs, kParts * kTileInputs * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, kPanelOuts * 4);
  _tile_stored(1, sums + 16, kPanelOuts * 4);
  if constexpr (kTwo) {
    _tile_stored(2, sums + height * kPanelOuts, kPanelOuts * 4);
    _tile_stored(3, sums + height * kPanelOuts + 16, kPanelOuts * 4);
  }
}

template <int64_t kParts>
void Bf16Rows(const PanelJob& job, const uint8_t* panel, int64_t first_row, const RowTiles& tiles, Scratch& scratch) {
  const int64_t x_stride = job.quantized.rows * kParts * kTileInputs;
  for (int64_t t = 0; t < tiles.count; t += 2) {
    const int64_t first = t * tiles.height;
    const uint16_t* x = job.quantized.parts + (first_row + first) * kParts * kTileInputs;
    float* sums = scratch.sums + first * kPanelOuts;
    const bool fetch = first_row + first == 0;
    if (t + 1 < tiles.count) {
      Bf16Tiles<true, kParts>(x, x_stride, tiles.height, panel, job.w.cols, fetch, scratch.weights, sums);
    } else {
      Bf16Tiles<false, kParts>(x, x_stride, tiles.height, panel, job.w.cols, fetch, scratch.weights, sums);
    }
  }
}

}  // namespace

void SplitWideRows(int16_t* groups, int64_t count) {
  // Of four int16: bytes of the first, third, second, fourth.
  const __m512i order = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0F0E0B0A0D0C0908, 0x0706030205040100));
  for (int64_t g = 0; g < count; ++g, groups += kInt8Group) {
    const __m512i first = _mm512_shuffle_epi8(_mm512_load_si512(groups), order);
    const __m512i second = _mm512_shuffle_epi8(_mm512_load_si512(groups + 32), order);
    auto* bytes = reinterpret_cast<__m256i*>(groups);
    _mm256_store_si256(bytes, _mm512_cvtepi16_epi8(_mm512_srli_epi16(first, 8)));
    _mm256_store_si256(bytes + 1, _mm512_cvtepi16_epi8(_mm512_srli_epi16(second, 8)));
    _mm256_store_si256(bytes + 2, _mm512_cvtepi16_epi8(first));
    _mm256_store_si256(bytes + 3, _mm512_cvtepi16_epi8(second));
  }
}

void SplitFloats(const float* x, int64_t count, uint16_t* parts) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  for (int64_t i = 0; i < kTileInputs; i += 16) {
    const int64_t lanes = std::clamp<int64_t>(count - i, 0, 16);
    __m512 rest = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1U << lanes) - 1), x + i);
    for (int64_t part = 0; part < kExactParts; ++part) {
      const __m512i bits = _mm512_castps_si512(rest);
      _mm256_store_si256(reinterpret_cast<__m256i*>(parts + part * kTileInputs + i),
                         _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
      rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(_mm512_and_si512(bits, upper)));
    }
  }
}

void AmxPanelRange(const PanelJob& job, int64_t begin, int64_t end) {
  Scratch scratch;
  const DType dtype = job.w.dtype;
  const int64_t panel_bytes = PanelBytes(dtype, job.w.cols);
  int64_t height = 0;
  for (int64_t panel = begin; panel < end; ++panel) {
    const uint8_t* data = static_cast<const uint8_t*>(job.w.data) + panel * panel_bytes;
    const int64_t first_out = panel * kPanelOuts;
    const int64_t outs = std::min(kPanelOuts, job.w.rows - first_out);
    const auto mask = static_cast<uint32_t>((uint64_t{1} << outs) - 1);
    for (int64_t first = 0; first < job.x.rows; first += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, job.x.rows - first);
      const RowTiles tiles = TilesFor(rows);
      if (tiles.height != height) Configure(tiles, dtype);
      height = tiles.height;
      if (dtype == DType::kBf16Panels) {
        (job.quantized.num_parts == 1 ? Bf16Rows<1> : Bf16Rows<kExactParts>)(job, data, first, tiles, scratch);
      } else {
        std::fill_n(scratch.sums, rows * kPanelOuts, 0.0f);
        (dtype == DType::kInt8Panels ? Int8Rows : Int4Rows)(job, data, first, rows, tiles, scratch);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const float* sum = scratch.sums + r * kPanelOuts;
        float* out = job.out.row(first + r) + first_out;
        const __m512 scale = _mm512_set1_ps(dtype == DType::kInt8Panels ? job.quantized.row_scales[first + r] : 1.0f);
        _mm512_mask_storeu_ps(out, static_cast<__mmask16>(mask), _mm512_mul_ps(_mm512_load_ps(sum), scale));
        _mm512_mask_storeu_ps(out + 16, static_cast<__mmask16>(mask >> 16),
                              _mm512_mul_ps(_mm512_load_ps(sum + 16), scale));
      }
    }
  }
  _tile_release();
}

#pragma GCC pop_options

#else

bool AmxUsable() { return false; }
void SplitWideRows(int16_t*, int64_t) { CHECK(false); }
void SplitFloats(const float*, int64_t, uint16_t*) { CHECK(false); }
void AmxPanelRange(const PanelJob&, int64_t, int64_t) { CHECK(false); }

#endif  // MINITRON_AMX

}  // namespace minitron::engine::cpu
