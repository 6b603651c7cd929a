// Products in E4M3: activations brought to it, products scaled, through the interface the runner uses.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "engine/cuda/kernels.h"
#include "engine/cuda/matmul.h"
#include "engine/cuda/quantized_weights.h"
#include "gtest/gtest.h"
#include "tests/engine/cuda/device_array.h"

namespace minitron::engine::cuda {
namespace {

TEST(Fp8MatMulTest, EveryCodeIsReadAsItsValueAndTheNearestIsChosen) {
  for (int code = 0; code < 256; ++code) {
    const float value = E4m3Value(static_cast<uint8_t>(code));
    if ((code & 0x7F) == 0x7F) {
      EXPECT_TRUE(std::isnan(value));
      continue;
    }
    EXPECT_EQ(value, HostE4m3(static_cast<uint8_t>(code)));
    uint8_t codes[2];
    const float row[2] = {448.0f, value};
    EXPECT_EQ(QuantizeE4m3Row(row, 2, codes), 1.0f);
    EXPECT_EQ(codes[1], code) << "a value of the format is kept";
  }
}

TEST(Fp8MatMulTest, RowsAreQuantizedToTheNearestCodesOfTheirOwnScale) {
  ForEachOrder([] {
    for (const int cols : {8, 64, 2040, 2056}) {
      std::mt19937_64 random(cols);
      std::vector<Bf16> x = RandomBf16(random, int64_t{4} * cols, 3.0f);
      std::fill_n(x.begin() + cols, cols, HostBf16(0.0f));
      x[2 * cols + 5] = HostBf16(4000.0f);  // an outlier
      x[3 * cols + 7] = HostBf16(std::nanf(""));
      const DeviceArray<Bf16> device_x(x);
      DeviceArray<uint8_t> codes(int64_t{4} * cols);
      DeviceArray<float> scales(4);
      ASSERT_EQ(QuantizeRows(device_x.data(), Activation::kNone, 4, cols, {codes.data(), scales.data()}, TestStream()),
                cudaSuccess);
      const std::vector<uint8_t> result = codes.Get();
      const std::vector<float> scale = scales.Get();
      for (int r = 0; r < 3; ++r) {
        float largest = 0.0f;
        for (int i = 0; i < cols; ++i) largest = std::max(largest, std::abs(HostFloat(x[r * cols + i])));
        ASSERT_EQ(scale[r], largest / 448.0f);
        const float inverse = largest > 0.0f ? 448.0f / largest : 0.0f;
        std::vector<double> scaled(cols);
        for (int i = 0; i < cols; ++i) scaled[i] = HostFloat(x[r * cols + i]) * inverse;
        std::vector<float> exact(scaled.begin(), scaled.end());
        exact.push_back(448.0f);  // a scale of one
        std::vector<uint8_t> expected(exact.size());
        ASSERT_EQ(QuantizeE4m3Row(exact.data(), static_cast<int64_t>(exact.size()), expected.data()), 1.0f);
        for (int i = 0; i < cols; ++i) {
          ASSERT_EQ(result[r * cols + i], expected[i]) << cols << " columns, row " << r << ", " << scaled[i];
          const double error = std::abs(HostE4m3(expected[i]) - scaled[i]);
          ASSERT_LE(error, std::max(std::abs(scaled[i]) / 16.0, 0x1.0p-10)) << "half a step";
        }
      }
      EXPECT_TRUE(std::isnan(scale[3]));
      EXPECT_TRUE(std::all_of(result.begin() + 3 * cols, result.end(), [](uint8_t code) { return code == 0; }));
    }
  });
  EXPECT_EQ(QuantizeRows(nullptr, Activation::kNone, 1, 12, {}, TestStream()), cudaErrorInvalidValue);
}

// Rows in E4M3 and their scales, read back.
struct Coded {
  Coded(int rows, int cols) : codes(int64_t{rows} * cols), scales(rows) {}
  Fp8Rows view() { return {codes.data(), scales.data()}; }
  void ExpectEqual(const Coded& other, const std::string& what) const {
    EXPECT_EQ(codes.Get(), other.codes.Get()) << what;
    std::vector<uint32_t> bits, other_bits;
    for (const float scale : scales.Get()) bits.push_back(std::bit_cast<uint32_t>(scale));
    for (const float scale : other.scales.Get()) other_bits.push_back(std::bit_cast<uint32_t>(scale));
    EXPECT_EQ(bits, other_bits) << what;
  }
  DeviceArray<uint8_t> codes;
  DeviceArray<float> scales;
};

// Rows of every kind: ordinary, zeros, so small that 448 / largest is no float, broken.
std::vector<Bf16> RowsOfEveryKind(std::mt19937_64& random, int cols) {
  std::vector<Bf16> x = RandomBf16(random, int64_t{4} * cols, 3.0f);
  std::fill_n(x.begin() + cols, cols, HostBf16(0.0f));
  for (int i = 0; i < cols; ++i) x[2 * cols + i] = HostBf16(i % 2 == 0 ? 0.0f : 1e-38f);
  x[4 * cols - 1] = HostBf16(INFINITY);
  return x;
}

TEST(Fp8MatMulTest, TheNormLeavesItsRowsInFp8AsAKernelOfItsOwnWould) {
  ForEachOrder([] {
    for (const int cols : {8, 264, 2056, 4104, 8200}) {  // every size of the kernel
      std::mt19937_64 random(cols);
      const DeviceArray<Bf16> x(RowsOfEveryKind(random, cols));
      const DeviceArray<float> ones(std::vector<float>(cols, 1.0f));
      DeviceArray<Bf16> out(int64_t{4} * cols), plain(int64_t{4} * cols);
      Coded fused(4, cols), apart(4, cols);
      ASSERT_EQ(LayerNorm1p(x.data(), ones.data(), ones.data(), 1e-5f, 4, cols, plain.data(), TestStream()),
                cudaSuccess);
      ASSERT_EQ(LayerNorm1p(x.data(), ones.data(), ones.data(), 1e-5f, 4, cols, out.data(), TestStream(), fused.view()),
                cudaSuccess);
      ASSERT_EQ(QuantizeRows(plain.data(), Activation::kNone, 4, cols, apart.view(), TestStream()), cudaSuccess);
      fused.ExpectEqual(apart, std::to_string(cols) + " columns");
      const std::vector<Bf16> got = out.Get(), expected = plain.Get();
      for (size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i].bits, expected[i].bits) << "bf16 is there too";
    }
  });
}

TEST(Fp8MatMulTest, TheActivationIsBroughtToFp8AsAKernelOfItsOwnWould) {
  ForEachOrder([] {
    for (const int cols : {8, 2040, 8200}) {
      std::mt19937_64 random(cols);
      const std::vector<Bf16> x = RowsOfEveryKind(random, cols);
      const DeviceArray<Bf16> source(x);
      DeviceArray<Bf16> activated(x);
      Coded fused(4, cols), apart(4, cols);
      ASSERT_EQ(QuantizeRows(source.data(), Activation::kSquaredRelu, 4, cols, fused.view(), TestStream()),
                cudaSuccess);
      ASSERT_EQ(SquaredRelu(activated.data(), int64_t{4} * cols, TestStream()), cudaSuccess);
      ASSERT_EQ(QuantizeRows(activated.data(), Activation::kNone, 4, cols, apart.view(), TestStream()), cudaSuccess);
      fused.ExpectEqual(apart, std::to_string(cols) + " columns");
    }
  });
}

TEST(Fp8MatMulTest, RowsTooSmallToScaleAreZeros) {
  std::mt19937_64 random(1);
  const DeviceArray<Bf16> x(RowsOfEveryKind(random, 64));
  Coded coded(4, 64);
  ASSERT_EQ(QuantizeRows(x.data(), Activation::kNone, 4, 64, coded.view(), TestStream()), cudaSuccess);
  const std::vector<uint8_t> codes = coded.codes.Get();
  EXPECT_TRUE(std::all_of(codes.begin() + 64, codes.begin() + 192, [](uint8_t code) { return code == 0; }));
  EXPECT_LT(coded.scales.Get()[2], 1e-37f);
  uint8_t host[2];
  const float small[2] = {0.0f, 1e-38f};
  EXPECT_LT(QuantizeE4m3Row(small, 2, host), 1e-37f);
  EXPECT_EQ(host[0], 0);
  EXPECT_EQ(host[1], 0);
}

// A matrix in E4M3 on the device and what its elements are.
struct Matrix {
  Matrix(int num_outs, int num_inputs, uint64_t seed) : outs(num_outs), depth(num_inputs) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<uint8_t> codes(int64_t{outs} * depth);
    std::vector<float> scales(outs);
    std::vector<float> row(depth);
    for (int o = 0; o < outs; ++o) {
      for (float& weight : row) weight = normal(random);
      weights.insert(weights.end(), row.begin(), row.end());
      scales[o] = QuantizeE4m3Row(row.data(), depth, &codes[int64_t{o} * depth]);
      for (int i = 0; i < depth; ++i) values.push_back(double{E4m3Value(codes[int64_t{o} * depth + i])} * scales[o]);
    }
    device_codes.Set(codes);
    device_scales.Set(scales);
  }
  Fp8Matrix view() const { return {device_codes.data(), device_scales.data()}; }

  int outs, depth;
  std::vector<float> weights;  // before they were quantized
  std::vector<double> values;
  DeviceArray<uint8_t> device_codes{int64_t{outs} * depth};
  DeviceArray<float> device_scales{outs};
};

std::vector<Bf16> Multiply(MatMul& matmul, const Matrix& w, const std::vector<Bf16>& x,
                           const std::vector<Bf16>* add_to) {
  const int rows = static_cast<int>(x.size()) / w.depth;
  const DeviceArray<Bf16> device_x(x);
  DeviceArray<Bf16> out(int64_t{rows} * w.outs);
  if (add_to != nullptr) out.Set(*add_to);
  const Store store = add_to != nullptr ? Store::kAdd : Store::kReplace;
  const absl::StatusOr<Fp8Rows> coded = matmul.RowsForFp8(rows, w.depth);
  EXPECT_TRUE(coded.ok()) << coded.status();
  EXPECT_EQ(QuantizeRows(device_x.data(), Activation::kNone, rows, w.depth, *coded, TestStream()), cudaSuccess);
  const Fp8Matrix operand{coded->codes, coded->scales};
  EXPECT_TRUE(matmul.Run(operand, w.view(), rows, w.outs, w.depth, store, out.data(), TestStream()).ok());
  return out.Get();
}

// The rows as the kernel brings them to E4M3.
std::vector<double> Quantized(const std::vector<Bf16>& x, int depth) {
  std::vector<double> values;
  for (size_t first = 0; first < x.size(); first += depth) {
    float largest = 0.0f;
    for (int i = 0; i < depth; ++i) largest = std::max(largest, std::abs(HostFloat(x[first + i])));
    for (int i = 0; i < depth; ++i) {
      const float scaled[2] = {HostFloat(x[first + i]) * (448.0f / largest), 448.0f};
      uint8_t codes[2];
      QuantizeE4m3Row(scaled, 2, codes);
      values.push_back(HostE4m3(codes[0]) * (largest / 448.0f));
    }
  }
  return values;
}

TEST(Fp8MatMulTest, ProductsEqualDoubleReferenceOfWhatTheCodesAre) {
  const auto matmul = CreateReferenceMatMul();
  ASSERT_TRUE(matmul->PrepareFp8(300, 1024, 192).ok());
  for (const auto& [outs, depth, rows] :
       {std::tuple{16, 64, 1}, {48, 192, 9}, {1024, 16, 300}}) {  // the last: in parts
    const Matrix w(outs, depth, outs);
    std::mt19937_64 random(rows);
    const std::vector<Bf16> x = RandomBf16(random, int64_t{rows} * depth);
    const std::vector<Bf16> before = RandomBf16(random, int64_t{rows} * outs, 0.1f);
    const std::vector<double> values = Quantized(x, depth);
    const std::vector<Bf16> out = Multiply(*matmul, w, x, nullptr), added = Multiply(*matmul, w, x, &before);
    for (int r = 0; r < rows; ++r) {
      for (int o = 0; o < outs; ++o) {
        double sum = 0.0, magnitude = 0.0;
        for (int i = 0; i < depth; ++i) {
          const double product = values[r * depth + i] * w.values[o * depth + i];
          sum += product;
          magnitude += std::abs(product);
        }
        constexpr double kBf16Rounding = 0x1.0p-8;
        const double previous = HostFloat(before[r * outs + o]);
        ASSERT_NEAR(HostFloat(out[r * outs + o]), sum, std::abs(sum) * kBf16Rounding + 1e-6 * magnitude);
        ASSERT_NEAR(HostFloat(added[r * outs + o]), previous + sum,
                    std::abs(previous + sum) * kBf16Rounding + 1e-6 * magnitude);
      }
    }
  }
}

TEST(Fp8MatMulTest, ARowHasTheSameBitsInAnyBatchAndABrokenOneBreaksAlone) {
  constexpr int kOuts = 1024, kDepth = 32, kRows = 260;  // the last rows are in a second part
  const auto matmul = CreateReferenceMatMul();
  ASSERT_TRUE(matmul->PrepareFp8(kRows, kOuts, kDepth).ok());
  const Matrix w(kOuts, kDepth, 3);
  std::mt19937_64 random(4);
  std::vector<Bf16> x = RandomBf16(random, kRows * kDepth);
  x[kDepth + 1] = HostBf16(INFINITY);  // row 1
  const std::vector<Bf16> all = Multiply(*matmul, w, x, nullptr);
  for (int o = 0; o < kOuts; ++o) ASSERT_TRUE(std::isnan(HostFloat(all[kOuts + o])));
  for (const int rows : {1, 5, 257}) {
    const std::vector<Bf16> some = Multiply(*matmul, w, {x.end() - rows * kDepth, x.end()}, nullptr);
    for (int i = 0; i < rows * kOuts; ++i) {
      ASSERT_EQ(some[i].bits, all[(kRows - rows) * kOuts + i].bits) << rows << " rows, element " << i;
    }
  }
}

TEST(Fp8MatMulTest, WhatWasNotPreparedIsAnError) {
  const auto matmul = CreateReferenceMatMul();
  EXPECT_EQ(matmul->RowsForFp8(1, 16).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(matmul->Run(Fp8Matrix{}, Fp8Matrix{}, 1, 16, 16, Store::kReplace, nullptr, TestStream()).code(),
            absl::StatusCode::kInternal);
  EXPECT_EQ(matmul->workspace_bytes(), 0);
  ASSERT_TRUE(matmul->PrepareFp8(4, 64, 64).ok());
  EXPECT_EQ(matmul->RowsForFp8(5, 16).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(matmul->RowsForFp8(4, 72).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(matmul->workspace_bytes(), 4 * 64 + 4 * 4 + 4 * 64 * 4);
}

// With 8 bits on both sides; the weights alone are in quantized_matmul_test.cc. README.md has the line.
TEST(Fp8MatMulTest, TheErrorOfAProductStaysWithinItsBound) {
  constexpr double kBound = 0.045;
  const auto matmul = CreateReferenceMatMul();
  ASSERT_TRUE(matmul->PrepareFp8(8, 64, 512).ok());
  const Matrix w(64, 512, 11);
  std::mt19937_64 random(2);
  const std::vector<Bf16> x = RandomBf16(random, 8 * 512), out = Multiply(*matmul, w, x, nullptr);
  double error = 0.0, norm = 0.0;
  for (int r = 0; r < 8; ++r) {
    for (int o = 0; o < 64; ++o) {
      double sum = 0.0;
      for (int i = 0; i < 512; ++i) sum += double{HostFloat(x[r * 512 + i])} * w.weights[o * 512 + i];
      error += (HostFloat(out[r * 64 + o]) - sum) * (HostFloat(out[r * 64 + o]) - sum);
      norm += sum * sum;
    }
  }
  const double relative = std::sqrt(error / norm);
  std::printf("| fp8, activations fp8 | 8.06 | %.4f |\n", relative);
  EXPECT_LE(relative, kBound);
  EXPECT_GE(relative, kBound / 4) << "the bound says nothing";
}

}  // namespace
}  // namespace minitron::engine::cuda
