// Products with quantized matrices: what a tile holds, against the weights it was made from; the product, against a
// double-precision one of what it holds; a row's bits, whatever the number of rows.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/cuda/quantized_weights.h"
#include "gtest/gtest.h"
#include "tests/engine/cuda/device_array.h"

namespace minitron::engine::cuda {
namespace {

constexpr WeightFormat kFormats[] = {WeightFormat::kInt8, WeightFormat::kInt4, WeightFormat::kE4m3};
const char* NameOf(WeightFormat format) {
  return format == WeightFormat::kInt8 ? "int8" : format == WeightFormat::kInt4 ? "int4" : "fp8";
}

// A random matrix and its tiles on the device.
struct Matrix {
  Matrix(WeightFormat weight_format, int num_outs, int num_inputs, uint64_t seed)
      : format(weight_format), outs(num_outs), depth(num_inputs) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    for (int64_t i = 0; i < int64_t{outs} * depth; ++i) weights.push_back(normal(random));
    weights[1] = 0.3f;                                  // an outlier
    std::fill_n(weights.begin() + depth, depth, 0.0f);  // a row of zeros
    std::vector<unsigned char> bytes(NumTiles(outs) * TileBytes(format, depth));
    for (int64_t tile = 0; tile < NumTiles(outs); ++tile) {
      const int rows = static_cast<int>(std::min<int64_t>(kTileRows, outs - tile * kTileRows));
      QuantizeTile(format, &weights[tile * kTileRows * depth], rows, depth, &bytes[tile * TileBytes(format, depth)]);
    }
    tiles = std::make_unique<DeviceArray<unsigned char>>(bytes);
  }
  template <typename Output>
  std::vector<Output> Multiply(const std::vector<Bf16>& x) const {
    const int rows = static_cast<int>(x.size()) / depth;
    const DeviceArray<Bf16> device_x(x);
    DeviceArray<Output> out(int64_t{rows} * outs);
    cudaError_t error = cudaSuccess;
    if constexpr (std::is_same_v<Output, float>) {
      error = QuantizedMatMul(format, device_x.data(), tiles->data(), rows, outs, depth, out.data(), TestStream());
    } else {
      error = QuantizedMatMul(format, device_x.data(), tiles->data(), rows, outs, depth, Store::kReplace, out.data(),
                              TestStream());
    }
    EXPECT_EQ(error, cudaSuccess);
    return out.Get();
  }
  std::vector<Bf16> AddProduct(const std::vector<Bf16>& x, const std::vector<Bf16>& to) const {
    const DeviceArray<Bf16> device_x(x);
    DeviceArray<Bf16> out(to);
    EXPECT_EQ(QuantizedMatMul(format, device_x.data(), tiles->data(), static_cast<int>(x.size()) / depth, outs, depth,
                              Store::kAdd, out.data(), TestStream()),
              cudaSuccess);
    return out.Get();
  }
  // What the tiles hold, [outs, depth]: the product with the unit vectors.
  std::vector<float> Held() const {
    std::vector<float> held(weights.size());
    for (int first = 0; first < depth; first += 64) {
      std::vector<Bf16> units(int64_t{64} * depth, HostBf16(0.0f));
      for (int i = 0; i < 64; ++i) units[int64_t{i} * depth + first + i] = HostBf16(1.0f);
      const std::vector<float> columns = Multiply<float>(units);
      for (int i = 0; i < 64; ++i) {
        for (int o = 0; o < outs; ++o) held[int64_t{o} * depth + first + i] = columns[int64_t{i} * outs + o];
      }
    }
    return held;
  }

  WeightFormat format;
  int outs, depth;
  std::vector<float> weights;
  std::unique_ptr<DeviceArray<unsigned char>> tiles;
};

// Half a step of the grid: of the group's for integers (int4 may also cut its largest), of the number's own for E4M3.
TEST(QuantizedMatMulTest, TilesHoldTheNearestNumbersOfTheirFormat) {
  for (const WeightFormat format : kFormats) {
    for (const auto& [outs, depth] : {std::pair{16, 64}, {21, 192}, {65, 128}}) {
      const Matrix matrix(format, outs, depth, 5);
      const std::vector<float> held = matrix.Held();
      const int group = GroupSize(format, depth);
      for (int64_t first = 0; first < static_cast<int64_t>(held.size()); first += group) {
        float largest = 0.0f;
        for (int i = 0; i < group; ++i) largest = std::max(largest, std::abs(matrix.weights[first + i]));
        for (int i = 0; i < group; ++i) {
          const float weight = matrix.weights[first + i], error = std::abs(held[first + i] - weight);
          constexpr float kScaleRounding = 0x1.0p-8f;  // the scale is a bf16
          float bound = largest / 127.0f * 0.5f + largest * kScaleRounding;
          if (format == WeightFormat::kInt4) bound = largest / 7.0f * 0.5f + largest * (2.25f / 9.25f);
          if (format == WeightFormat::kE4m3)
            bound = std::max(std::abs(weight) / 16.0f, largest / 448.0f * 0x1.0p-10f) * 1.02f;
          ASSERT_LE(error, bound) << NameOf(format) << ", weight " << weight << " of a group up to " << largest;
        }
      }
    }
  }
}

TEST(QuantizedMatMulTest, ProductsEqualDoubleReferenceOfWhatTilesHold) {
  for (const WeightFormat format : kFormats) {
    for (const auto& [outs, depth, rows] :
         {std::tuple{16, 64, 1}, {48, 320, 3}, {131, 128, 9}, {33, 576, 17}, {5, 64, 70}, {17, 2624, 2}}) {
      const Matrix matrix(format, outs, depth, outs);
      const std::vector<float> held = matrix.Held();
      std::mt19937_64 random(rows);
      const std::vector<Bf16> x = RandomBf16(random, int64_t{rows} * depth);
      const std::vector<Bf16> before = RandomBf16(random, int64_t{rows} * outs, 0.5f);
      ForEachOrder([&, outs = outs, depth = depth, rows = rows] {
        const std::vector<float> out = matrix.Multiply<float>(x);
        const std::vector<Bf16> narrow = matrix.Multiply<Bf16>(x);
        const std::vector<Bf16> added = matrix.AddProduct(x, before);
        for (int r = 0; r < rows; ++r) {
          for (int o = 0; o < outs; ++o) {
            double sum = 0.0, magnitude = 0.0;
            for (int i = 0; i < depth; ++i) {
              const double product = double{HostFloat(x[r * depth + i])} * held[o * depth + i];
              sum += product;
              magnitude += std::abs(product);
            }
            ASSERT_NEAR(out[r * outs + o], sum, 1e-6 * magnitude) << NameOf(format) << " row " << r << " output " << o;
            ASSERT_EQ(narrow[r * outs + o].bits, HostBf16(out[r * outs + o]).bits);
            ASSERT_EQ(added[r * outs + o].bits, HostBf16(out[r * outs + o] + HostFloat(before[r * outs + o])).bits);
          }
        }
      });
    }
  }
}

TEST(QuantizedMatMulTest, ARowHasTheSameBitsAmongFewRowsAndMany) {
  for (const WeightFormat format : kFormats) {
    const Matrix matrix(format, 40, 192, 3);
    std::mt19937_64 random(8);
    const std::vector<Bf16> x = RandomBf16(random, 66 * 192);
    const std::vector<float> all = matrix.Multiply<float>(x);
    for (const int rows : {1, 8, 9, 17, 33, 65}) {
      const std::vector<float> some = matrix.Multiply<float>({x.end() - rows * 192, x.end()});
      ASSERT_TRUE(std::equal(some.begin(), some.end(), all.end() - rows * 40)) << NameOf(format) << ", " << rows;
    }
  }
}

// 41 steps of 64: slices of 5 and 6 of them, more than a warp's stages hold.
TEST(QuantizedMatMulTest, LongSlicesAreSummedTheSameWayByAWarpEachAndByOne) {
  for (const WeightFormat format : kFormats) {
    const Matrix matrix(format, 16, 2624, 4);
    std::mt19937_64 random(9);
    const std::vector<Bf16> x = RandomBf16(random, 9 * 2624);
    const std::vector<float> many = matrix.Multiply<float>(x);
    const std::vector<float> one = matrix.Multiply<float>({x.end() - 2624, x.end()});
    ASSERT_TRUE(std::equal(one.begin(), one.end(), many.end() - 16)) << NameOf(format);
  }
}

TEST(QuantizedMatMulTest, DepthsWithoutAKernelAreRefused) {
  EXPECT_EQ(
      QuantizedMatMul(WeightFormat::kInt8, nullptr, nullptr, 1, 16, 96, static_cast<float*>(nullptr), TestStream()),
      cudaErrorInvalidValue);
}

// The error of a product relative to that of the exact weights, on normal weights and rows: what a format costs by
// itself. README.md has the table.
TEST(QuantizedMatMulTest, ErrorsStayWithinTheirBounds) {
  constexpr double kBounds[] = {0.008, 0.10, 0.03};
  std::printf("| weights | bits | error of a product |\n|---|---|---|\n");
  for (const WeightFormat format : kFormats) {
    const Matrix matrix(format, 64, 512, 11);
    std::mt19937_64 random(2);
    const std::vector<Bf16> x = RandomBf16(random, 8 * 512);
    const std::vector<float> out = matrix.Multiply<float>(x);
    double error = 0.0, norm = 0.0;
    for (int r = 0; r < 8; ++r) {
      for (int o = 0; o < 64; ++o) {
        double sum = 0.0;
        for (int i = 0; i < 512; ++i) sum += double{HostFloat(x[r * 512 + i])} * matrix.weights[o * 512 + i];
        error += (out[r * 64 + o] - sum) * (out[r * 64 + o] - sum);
        norm += sum * sum;
      }
    }
    const double relative = std::sqrt(error / norm);
    std::printf("| %s | %.2f | %.4f |\n", NameOf(format), 8.0 * TileBytes(format, 512) / (16.0 * 512), relative);
    EXPECT_LE(relative, kBounds[static_cast<int>(format)]) << NameOf(format);
    EXPECT_GE(relative, kBounds[static_cast<int>(format)] / 4) << NameOf(format) << ": the bound says nothing";
  }
}

}  // namespace
}  // namespace minitron::engine::cuda
