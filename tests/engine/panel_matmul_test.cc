// Panel kernels against a naive loop, bit for bit, on every Highway target this machine has.
#include "engine/cpu/panel_matmul.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "engine/convert.h"
#include "engine/cpu/amx_matmul.h"
#include "engine/cpu/panel_format.h"
#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "tests/engine/random_model.h"
#include "tests/engine/targets.h"

namespace minitron::engine::cpu {
namespace {

struct Format {
  const char* name;
  DType dtype;
  bool round = false;  // rows to bf16
};
constexpr Format kFormats[] = {{"bf16", DType::kBf16Panels},
                               {"bf16_rows_in_bf16", DType::kBf16Panels, true},
                               {"int8", DType::kInt8Panels},
                               {"int4", DType::kInt4Panels}};
constexpr int64_t kMaxRows = 131;
constexpr int64_t kMaxDepth = 400;

struct Source {
  std::vector<uint16_t> bits;
  WeightView view;
};

Source RandomSource(int64_t outs, int64_t depth, uint64_t seed) {
  Source source;
  source.bits.resize(outs * depth);
  for (uint16_t& bits : source.bits) StoreElement(NextUniform(seed), DType::kBf16, &bits);
  source.view = {.data = source.bits.data(), .dtype = DType::kBf16, .rows = outs, .cols = depth};
  return source;
}

struct Packed {
  std::vector<uint8_t> storage;
  WeightView view;
};

Packed Pack(const WeightView& source, DType dtype) {
  Packed packed;
  packed.storage.resize(PackedBytes(dtype, source.rows, source.cols) + kPanelAlignment);
  auto* data = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(packed.storage.data()) + kPanelAlignment - 1) /
                                          kPanelAlignment * kPanelAlignment);
  packed.view = {.data = data, .dtype = dtype, .rows = source.rows, .cols = source.cols};
  for (int64_t panel = 0; panel < NumPanels(source.rows); ++panel) {
    PackPanel(source, dtype, panel, data + panel * PanelBytes(dtype, source.cols));
  }
  return packed;
}

std::vector<float> RandomRows(int64_t rows, int64_t depth, uint64_t seed) {
  std::vector<float> x(rows * depth);
  for (float& value : x) value = NextUniform(seed) * 3.0f;
  return x;
}

// One rounding where the target has fused multiply-adds.
float MulAdd(float a, float b, float sum, bool fused) { return fused ? std::fma(a, b, sum) : a * b + sum; }

// The scale of a group of weights and its integers, read back through UnpackPanels: value = scale * q, and the scale is
// the panel's own bf16.
float ScaleOf(const WeightView& w, int64_t o, int64_t i) {
  const bool int8 = w.dtype == DType::kInt8Panels;
  const int64_t group = int8 ? kInt8Group : kInt4Group, block_bytes = int8 ? kInt8BlockBytes : kInt4BlockBytes;
  const auto* block =
      static_cast<const uint8_t*>(w.data) + o / kPanelOuts * PanelBytes(w.dtype, w.cols) + i / group * block_bytes;
  uint16_t bits;
  std::memcpy(&bits, block + block_bytes - 2 * kPanelOuts + o % kPanelOuts * 2, 2);
  return Bf16ToFloat(bits);
}

// The bf16 order of AMX: per 32 inputs and part of x, even and odd inputs are two chains, whose sum is added.
float NaiveAmxBf16(const float* x, const float* weights, int64_t depth, int num_parts) {
  float sum = 0.0f;
  for (int64_t begin = 0; begin < depth; begin += 32) {
    std::vector<float> rest(x + begin, x + std::min(begin + 32, depth));
    for (int part = 0; part < num_parts; ++part) {
      float chains[2] = {0.0f, 0.0f};
      for (size_t i = 0; i < rest.size(); ++i) {
        uint32_t bits;
        std::memcpy(&bits, &rest[i], 4);
        const float value = Bf16ToFloat(static_cast<uint16_t>(bits >> 16));
        chains[i % 2] = std::fma(value, weights[begin + static_cast<int64_t>(i)], chains[i % 2]);
        rest[i] -= value;
      }
      sum += chains[0] + chains[1];
    }
  }
  return sum;
}

float NaiveBf16(const float* row, const float* weights, int64_t depth, bool round, bool fused) {
  std::vector<float> x(row, row + depth);
  for (float& value : x) value = round ? Bf16ToFloat(FloatToBf16(value)) : value;
  if (AmxUsable()) return NaiveAmxBf16(x.data(), weights, depth, round ? 1 : 3);
  float sum = 0.0f;
  for (int64_t i = 0; i < depth; i += 2) {
    if (i + 1 < depth) sum = MulAdd(x[i + 1], weights[i + 1], sum, fused);
    sum = MulAdd(x[i], weights[i], sum, fused);
  }
  return sum;
}

// What panel_matmul.h promises for one output, step by step.
float NaiveOutput(const float* x, const WeightView& w, bool round, const float* values, int64_t o, bool fused) {
  const float* weights = values + o * w.cols;
  if (w.dtype == DType::kBf16Panels) return NaiveBf16(x, weights, w.cols, round, fused);
  float sum = 0.0f;
  const bool int8 = w.dtype == DType::kInt8Panels;
  const int64_t group = int8 ? kInt8Group : kInt4Group;
  const auto largest = [x](int64_t begin, int64_t end) {
    float maximum = 0.0f;
    for (int64_t i = begin; i < end; ++i) maximum = std::max(maximum, std::abs(x[i]));
    return maximum;
  };
  const float row_largest = largest(0, w.cols);
  for (int64_t begin = 0; begin < w.cols; begin += group) {
    const int64_t end = std::min(begin + group, w.cols);
    const float limit = int8 ? 32767.0f : 127.0f;
    const float maximum = int8 ? row_largest : largest(begin, end);
    const float inverse = maximum > 0.0f ? limit / maximum : 0.0f;
    const float scale = ScaleOf(w, o, begin);
    int64_t exact = 0;
    for (int64_t i = begin; i < end; ++i) {
      const float q = scale == 0.0f ? 0.0f : std::nearbyint(weights[i] / scale);
      exact += static_cast<int64_t>(q) * static_cast<int64_t>(std::nearbyint(x[i] * inverse));
    }
    const float both = int8 ? scale : scale * (maximum / limit);
    sum = MulAdd(static_cast<float>(exact), both, sum, fused);
  }
  return int8 ? sum * (row_largest / 32767.0f) : sum;
}

class PanelMatMulTest : public testing::TestWithParam<Format> {
 protected:
  std::vector<float> Multiply(ThreadPool& pool, const std::vector<float>& x, int64_t rows, const WeightView& w) {
    std::vector<float> out(rows * w.rows, -7.0f);
    PanelMatMul(pool, {x.data(), rows, w.cols}, {{.w = w, .out = {out.data(), rows, w.rows}}}, workspace_);
    return out;
  }

  const DType dtype_ = GetParam().dtype;
  QuantizedRowsBuffer workspace_{kMaxRows, kMaxDepth, GetParam().round};
};

INSTANTIATE_TEST_SUITE_P(AllFormats, PanelMatMulTest, testing::ValuesIn(kFormats),
                         [](const auto& format) { return format.param.name; });

TEST_P(PanelMatMulTest, EqualsTheNaiveLoopBitForBitAtEveryEdge) {
  ThreadPool pool(2);
  ForEachTarget([&](int64_t target) {
    const bool fused = target != HWY_SSSE3 && target != HWY_SSE4 && target != HWY_SCALAR;
    // Around pairs, quads, octets, groups of 32 and 64, slices of 128, panels of 32 outputs.
    for (const int64_t depth : {1, 2, 3, 4, 7, 8, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 257, 400}) {
      for (const int64_t outs : {1, 15, 31, 32, 33, 65}) {
        const Source source = RandomSource(outs, depth, 1000 * depth + outs);
        const Packed packed = Pack(source.view, dtype_);
        std::vector<float> values(outs * depth);
        UnpackPanels(packed.view, values.data());
        const int64_t rows = AmxUsable() ? 17 : 3;  // AMX takes quantised weights from 9 rows on
        const std::vector<float> x = RandomRows(rows, depth, depth);
        const std::vector<float> out = Multiply(pool, x, rows, packed.view);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t o = 0; o < outs; ++o) {
            ASSERT_EQ(out[r * outs + o],
                      NaiveOutput(&x[r * depth], packed.view, GetParam().round, values.data(), o, fused))
                << "depth " << depth << " outs " << outs << " row " << r << " out " << o;
          }
        }
      }
    }
  });
}

TEST_P(PanelMatMulTest, RowsHaveTheSameBitsInAnyBatchAndAtAnyThreadCount) {
  ThreadPool one(1), three(3);
  ForEachTarget([&](int64_t) {
    const int64_t depth = 330, outs = 333;
    const Source source = RandomSource(outs, depth, 5);
    const Packed packed = Pack(source.view, dtype_);
    const std::vector<float> x = RandomRows(kMaxRows, depth, 6);
    std::vector<float> alone(kMaxRows * outs);
    for (int64_t r = 0; r < kMaxRows; ++r) {
      const std::vector<float> row(x.begin() + r * depth, x.begin() + (r + 1) * depth);
      const std::vector<float> out = Multiply(one, row, 1, packed.view);
      std::copy(out.begin(), out.end(), alone.begin() + r * outs);
    }
    std::vector<int64_t> all_rows(40);
    for (int64_t r = 0; r < 40; ++r) all_rows[r] = r + 1;  // every tile plan
    all_rows.insert(all_rows.end(), {63, 64, 65, 66, 127, 128, 129, kMaxRows});
    for (const int64_t rows : all_rows) {
      const std::vector<float> together = Multiply(rows % 2 == 0 ? one : three, x, rows, packed.view);
      ASSERT_EQ(std::memcmp(together.data(), alone.data(), together.size() * sizeof(float)), 0) << rows << " rows";
    }
  });
}

TEST_P(PanelMatMulTest, SeveralProductsInOneLoopEqualEachAlone) {
  ThreadPool one(1), three(3);
  const int64_t depth = 200, rows = 5;
  const std::vector<float> x = RandomRows(rows, depth, 16);
  std::vector<Packed> packed;
  std::vector<std::vector<float>> outs;
  for (const int64_t count : {1, 33, 96, 31, 257}) {
    packed.push_back(Pack(RandomSource(count, depth, 17 + count).view, dtype_));
    outs.emplace_back(rows * count, -7.0f);
  }
  std::vector<PanelProduct> products;
  for (size_t i = 0; i < packed.size(); ++i) {
    products.push_back({.w = packed[i].view, .out = {outs[i].data(), rows, packed[i].view.rows}});
  }
  PanelMatMul(three, {x.data(), rows, depth}, products, workspace_);
  for (size_t i = 0; i < packed.size(); ++i) ASSERT_EQ(outs[i], Multiply(one, x, rows, packed[i].view)) << i;
}

TEST_P(PanelMatMulTest, StaysCloseToTheUnquantisedProduct) {
  ThreadPool pool(2);
  const int64_t depth = 400, outs = 70, rows = 9;
  const Source source = RandomSource(outs, depth, 8);
  const Packed packed = Pack(source.view, dtype_);
  const std::vector<float> x = RandomRows(rows, depth, 9);
  const std::vector<float> out = Multiply(pool, x, rows, packed.view);
  // Rounding errors are uniform and independent, so n products are off by about sqrt(n) * |x| * step / sqrt(12):
  // steps are 1/127 (int8) and about 2/15 (int4) of the largest weight, |x| is 1.7 rms; 5 sigma of that. Rows in bf16
  // are off by up to 1/256 of a value.
  const double step = GetParam().round               ? 1.0 / 256
                      : dtype_ == DType::kBf16Panels ? 1e-6
                      : dtype_ == DType::kInt8Panels ? 1.0 / 127
                                                     : 2.0 / 15;
  const double tolerance = 5.0 * std::sqrt(400.0 / 12.0) * 1.8 * step;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < outs; ++o) {
      double sum = 0.0;
      for (int64_t i = 0; i < depth; ++i) sum += double{x[r * depth + i]} * Bf16ToFloat(source.bits[o * depth + i]);
      ASSERT_NEAR(out[r * outs + o], sum, tolerance);
    }
  }
}

TEST_P(PanelMatMulTest, ARowThatIsNotFiniteSpoilsItselfOnly) {
  ThreadPool pool(2);
  ForEachTarget([&](int64_t) {
    const int64_t depth = 130, outs = 40, rows = 5;
    const Source source = RandomSource(outs, depth, 12);
    const Packed packed = Pack(source.view, dtype_);
    const std::vector<float> x = RandomRows(rows, depth, 13);
    const std::vector<float> good = Multiply(pool, x, rows, packed.view);
    for (const float broken : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      for (const int64_t at : {0, 70, 129}) {
        std::vector<float> spoiled = x;
        spoiled[2 * depth + at] = broken;
        const std::vector<float> out = Multiply(pool, spoiled, rows, packed.view);
        for (int64_t i = 0; i < rows * outs; ++i) {
          if (i / outs == 2) {
            ASSERT_FALSE(std::isfinite(out[i])) << at;
          } else {
            ASSERT_EQ(out[i], good[i]);
          }
        }
      }
    }
  });
}

TEST_P(PanelMatMulTest, ZeroRowsAndTinyValuesGiveZero) {
  ThreadPool pool(1);
  const Source source = RandomSource(33, 70, 14);
  const Packed packed = Pack(source.view, dtype_);
  for (const float value : {0.0f, -0.0f}) {
    const std::vector<float> x(2 * 70, value);
    for (const float out : Multiply(pool, x, 2, packed.view)) ASSERT_EQ(out, 0.0f);
  }
  const std::vector<float> tiny(70, 1e-42f);  // its inverse overflows
  for (const float out : Multiply(pool, tiny, 1, packed.view)) ASSERT_LT(std::abs(out), 1e-38f);
}

// ---- packing ----

TEST(PackPanel, Bf16IsExact) {
  const Source source = RandomSource(67, 129, 21);
  const Packed packed = Pack(source.view, DType::kBf16Panels);
  std::vector<float> values(67 * 129);
  UnpackPanels(packed.view, values.data());
  for (size_t i = 0; i < values.size(); ++i) ASSERT_EQ(values[i], Bf16ToFloat(source.bits[i]));
}

TEST(PackPanel, QuantisedErrorsStayWithinHalfAStep) {
  for (const DType dtype : {DType::kInt8Panels, DType::kInt4Panels}) {
    const Source source = RandomSource(40, 200, 22);
    const Packed packed = Pack(source.view, dtype);
    std::vector<float> values(40 * 200);
    UnpackPanels(packed.view, values.data());
    double squares = 0.0, errors = 0.0;
    for (int64_t i = 0; i < 40 * 200; ++i) {
      const float w = Bf16ToFloat(source.bits[i]);
      const float scale = std::abs(ScaleOf(packed.view, i / 200, i % 200));
      // Half a step, and where the largest weights are clipped: int8's scale is rounded to 8 bits (127 / 512 steps),
      // int4 clips at -8 and 7 a weight of at most 8.7 steps.
      ASSERT_LE(std::abs(values[i] - w), (dtype == DType::kInt4Panels ? 1.75f : 0.76f) * scale);
      squares += double{w} * w;
      errors += double{values[i] - w} * (values[i] - w);
    }
    EXPECT_LT(std::sqrt(errors / squares), dtype == DType::kInt8Panels ? 0.005 : 0.075);
  }
}

TEST(PackPanel, GroupsWithZerosOrNonFiniteWeightsAreWellDefined) {
  for (const DType dtype : {DType::kInt8Panels, DType::kInt4Panels}) {
    Source source = RandomSource(3, 128, 23);
    std::fill_n(source.bits.begin(), 128, uint16_t{0});
    source.bits[128 + 5] = 0x7FC0;  // NaN in the first group of row 1
    const Packed packed = Pack(source.view, dtype);
    std::vector<float> values(3 * 128);
    UnpackPanels(packed.view, values.data());
    for (int64_t i = 0; i < 128; ++i) ASSERT_EQ(values[i], 0.0f);
    EXPECT_TRUE(std::isnan(values[128 + 5]));
    for (int64_t i = 64; i < 256; ++i) ASSERT_TRUE(std::isfinite(values[128 + i])) << i;
  }
}

}  // namespace
}  // namespace minitron::engine::cpu
