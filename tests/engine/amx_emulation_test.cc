// The emulation of AMX that amx_emulated_panel_matmul_test runs on.
#include <cstdint>
#include <cstring>
#include <vector>

#include "engine/cpu/amx_matmul.h"
#include "gtest/gtest.h"
#include "hwy/targets.h"
// Last: it defines names of the system anew.
#include "tests/engine/amx_emulation.h"

namespace minitron::engine::amx_emulation {
namespace {

struct Shape {
  int tile, rows, row_bytes;
};

void Configure(const std::vector<Shape>& shapes) {
  uint8_t config[64] = {1};
  for (const Shape& shape : shapes) {
    config[16 + 2 * shape.tile] = static_cast<uint8_t>(shape.row_bytes);
    config[48 + shape.tile] = static_cast<uint8_t>(shape.rows);
  }
  LoadConfig(config);
}

// 2 x 1 sums of one row of 4 bytes each.
template <typename Sum>
std::vector<Sum> DotRows(void (*dot)(int, int, int), const void* a, const void* b) {
  Configure({{0, 2, 4}, {4, 2, 4}, {6, 1, 4}});
  Zero(0);
  Load(4, a, 4);
  Load(6, b, 4);
  dot(0, 4, 6);
  std::vector<Sum> sums(2);
  Store(0, sums.data(), 4);
  return sums;
}

TEST(AmxEmulationTest, TakesThePlaceOfAmxWhereverThereIsAvx512) {
  EXPECT_EQ(cpu::AmxUsable(), (hwy::SupportedTargets() & HWY_AVX3_DL) != 0);
}

TEST(AmxEmulationTest, MultipliesBytesWithAndWithoutSign) {
  const uint8_t a[8] = {1, 255, 0, 2, 128, 0, 0, 0};
  const int8_t b[4] = {3, -1, 100, -128};
  EXPECT_EQ(DotRows<int32_t>(DotInt8<int8_t>, a, b), (std::vector<int32_t>{3 + 1 - 256, -128 * 3}));
  EXPECT_EQ(DotRows<int32_t>(DotInt8<uint8_t>, a, b), (std::vector<int32_t>{3 - 255 - 256, 128 * 3}));
}

TEST(AmxEmulationTest, MultipliesBf16AndTakesSubnormalsForZero) {
  const uint16_t a[4] = {0x3F80, 0x4000, 0x0001, 0xBF80};  // 1, 2; a subnormal, -1
  const uint16_t b[2] = {0x4040, 0x3F00};                  // 3, 0.5
  EXPECT_EQ(DotRows<float>(DotBf16, a, b), (std::vector<float>{4.0f, -0.5f}));
}

TEST(AmxEmulationDeathTest, EndsWhatTheProcessorWouldFault) {
  const uint8_t bytes[1024] = {};
  EXPECT_DEATH(
      {
        Release();
        Load(0, bytes, 64);
      },
      "not configured");
  EXPECT_DEATH(Configure({{0, 17, 64}}), "no tile has");
  EXPECT_DEATH(
      {
        Configure({{0, 2, 4}, {4, 2, 8}, {6, 1, 4}});
        DotInt8<int8_t>(0, 4, 6);
      },
      "do not fit");
}

}  // namespace
}  // namespace minitron::engine::amx_emulation
