// The kernels that work row by row, and the reference matrix product, against double-precision references.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "engine/cuda/kernels.h"
#include "gtest/gtest.h"
#include "tests/engine/cuda/device_array.h"

namespace minitron::engine::cuda {
namespace {

// Half a unit in the last place of a bf16: 7 stored bits of mantissa.
constexpr double kBf16Rounding = 0x1.0p-8;

TEST(RowKernelsTest, CopyRowsCopiesByIdAndByPreviousResult) {
  ForEachOrder([] {
    for (const int cols : {8, 40, 2048, 2056, 4096}) {
      std::mt19937_64 random(cols);
      const std::vector<Bf16> values = RandomBf16(random, 10 * cols);
      const DeviceArray<Bf16> table(values);
      const std::vector<int32_t> ids = {9, 0, -1, 3, -3};  // -1 - i: previous[i]
      const DeviceArray<int32_t> rows(ids), previous(std::vector<int32_t>{5, 1, 7});
      DeviceArray<Bf16> out(5 * cols);
      ASSERT_EQ(CopyRows(table.data(), rows.data(), previous.data(), 5, cols, out.data(), TestStream()), cudaSuccess);
      const std::vector<Bf16> result = out.Get();
      const int expected[] = {9, 0, 5, 3, 7};
      for (int r = 0; r < 5; ++r) {
        for (int i = 0; i < cols; ++i) ASSERT_EQ(result[r * cols + i].bits, values[expected[r] * cols + i].bits);
      }
    }
  });
  EXPECT_EQ(CopyRows(nullptr, nullptr, nullptr, 1, 12, nullptr, TestStream()), cudaErrorInvalidValue);
}

// Norm parameters and what is normed; what the norm must give in double.
struct NormCase {
  std::vector<Bf16> x;
  std::vector<float> weight, bias;
};

void CheckNorm(const NormCase& c, int rows, int cols, const std::vector<Bf16>& out) {
  for (int r = 0; r < rows; ++r) {
    std::vector<double> x(cols);
    double mean = 0.0, variance = 0.0;
    for (int i = 0; i < cols; ++i) {
      x[i] = HostFloat(c.x[r * cols + i]);
      mean += x[i] / cols;
    }
    for (const double value : x) variance += (value - mean) * (value - mean) / cols;
    for (int i = 0; i < cols; ++i) {
      const double expected =
          (x[i] - mean) / std::sqrt(variance + 1e-5) * (1.0 + double{c.weight[i]}) + double{c.bias[i]};
      // One rounding to bf16, and fp32 statistics.
      ASSERT_NEAR(HostFloat(out[r * cols + i]), expected, std::abs(expected) * kBf16Rounding + 2e-5)
          << cols << " columns, row " << r;
    }
  }
}

TEST(RowKernelsTest, LayerNorm1pEqualsDoubleReference) {
  ForEachOrder([] {
    for (const int cols : {8, 192, 2040, 2048, 2056, 4096, 4104, 8200}) {
      std::mt19937_64 random(cols);
      std::normal_distribution<float> normal;
      constexpr int kRows = 2;
      NormCase c{RandomBf16(random, kRows * cols, 3.0f), {}, {}};
      for (int i = 0; i < cols; ++i) {
        c.weight.push_back(0.3f * normal(random));
        c.bias.push_back(0.3f * normal(random));
        c.x[cols + i] = HostBf16(HostFloat(c.x[cols + i]) + 50.0f);  // a mean to cancel
      }
      const DeviceArray<Bf16> x(c.x);
      DeviceArray<Bf16> out(kRows * cols);
      const DeviceArray<float> weight(c.weight), bias(c.bias);
      ASSERT_EQ(LayerNorm1p(x.data(), weight.data(), bias.data(), 1e-5f, kRows, cols, out.data(), TestStream()),
                cudaSuccess);
      CheckNorm(c, kRows, cols, out.Get());
    }
  });
}

TEST(RowKernelsTest, LayerNormRowsHaveTheSameBitsInAnyBatch) {
  constexpr int kCols = 2056, kRows = 5;
  std::mt19937_64 random(3);
  const std::vector<Bf16> rows = RandomBf16(random, kRows * kCols);
  const DeviceArray<float> zeros(std::vector<float>(kCols, 0.0f));
  DeviceArray<Bf16> together(rows), out(kRows * kCols);
  LayerNorm1p(together.data(), zeros.data(), zeros.data(), 1e-5f, kRows, kCols, out.data(), TestStream());
  const std::vector<Bf16> expected = out.Get();
  for (int r = 0; r < kRows; ++r) {
    DeviceArray<Bf16> alone(std::vector<Bf16>(rows.begin() + r * kCols, rows.begin() + (r + 1) * kCols)), one(kCols);
    LayerNorm1p(alone.data(), zeros.data(), zeros.data(), 1e-5f, 1, kCols, one.data(), TestStream());
    const std::vector<Bf16> result = one.Get();
    for (int i = 0; i < kCols; ++i) ASSERT_EQ(result[i].bits, expected[r * kCols + i].bits);
  }
}

TEST(RowKernelsTest, SquaredReluEqualsReferenceAndKeepsNan) {
  ForEachOrder([] {
    for (const int count : {8, 2040, 2048, 2056, 6000}) {
      std::mt19937_64 random(count);
      std::vector<Bf16> values = RandomBf16(random, count, 4.0f);
      values[3] = HostBf16(std::nanf(""));
      DeviceArray<Bf16> x(values);
      ASSERT_EQ(SquaredRelu(x.data(), count, TestStream()), cudaSuccess);
      const std::vector<Bf16> result = x.Get();
      for (int i = 0; i < count; ++i) {
        const float value = HostFloat(values[i]);
        if (i == 3) {
          EXPECT_TRUE(std::isnan(HostFloat(result[i])));
        } else {
          EXPECT_EQ(result[i].bits, HostBf16(value > 0.0f ? value * value : 0.0f).bits);
        }
      }
    }
  });
}

TEST(RowKernelsTest, RopeRotatesTheLeadingDimsAndStoresKeysAndValues) {
  struct Case {
    int heads, kv_heads, head_dim, rotary_dim, block_shift;
  };
  for (const Case& c : {Case{6, 1, 64, 32, 3}, Case{12, 2, 128, 64, 4}, Case{2, 2, 64, 64, 5}, Case{8, 1, 128, 4, 8}}) {
    ForEachOrder([&c] {
      std::mt19937_64 random(c.heads);
      constexpr int kRows = 5, kPositions = 40, kBlocks = 6;
      const int half = c.rotary_dim / 2, q_width = c.heads * c.head_dim, kv_width = c.kv_heads * c.head_dim;
      const int block_tokens = 1 << c.block_shift;
      std::vector<float> cosines, sines;
      for (int position = 0; position < kPositions; ++position) {
        for (int j = 0; j < half; ++j) {
          const double angle = position * std::pow(10000.0, -2.0 * j / c.rotary_dim);
          cosines.push_back(static_cast<float>(std::cos(angle)));
          sines.push_back(static_cast<float>(std::sin(angle)));
        }
      }
      const std::vector<Bf16> q = RandomBf16(random, kRows * q_width), k = RandomBf16(random, kRows * kv_width);
      const std::vector<Bf16> v = RandomBf16(random, kRows * kv_width);
      const std::vector<int32_t> positions = {0, 1, 17, 38, 39};
      const std::vector<int64_t> slots = {5 * block_tokens, 3, block_tokens - 1, 2 * block_tokens + 1,
                                          4 * block_tokens + 6};
      DeviceArray<Bf16> device_q(q), keys(kBlocks * block_tokens * kv_width), values(kBlocks * block_tokens * kv_width);
      const DeviceArray<Bf16> device_k(k), device_v(v);
      const DeviceArray<int32_t> device_positions(positions);
      const DeviceArray<int64_t> device_slots(slots);
      const DeviceArray<float> device_cosines(cosines), device_sines(sines);
      const RopeParams params{device_q.data(),
                              device_k.data(),
                              device_v.data(),
                              device_positions.data(),
                              device_slots.data(),
                              device_cosines.data(),
                              device_sines.data(),
                              {keys.data(), values.data(), c.kv_heads, c.block_shift},
                              c.heads,
                              c.head_dim,
                              c.rotary_dim,
                              q_width,
                              kv_width};
      ASSERT_EQ(RopeAndStoreKv(params, kRows, TestStream()), cudaSuccess);
      const auto expected = [&](const std::vector<Bf16>& in, int width, int t, int head, int dim) -> double {
        const auto at = [&](int d) { return double{HostFloat(in[t * width + head * c.head_dim + d])}; };
        if (dim >= c.rotary_dim) return at(dim);
        const double cosine = double{cosines[positions[t] * half + dim % half]};
        const double sine = double{sines[positions[t] * half + dim % half]};
        return dim < half ? at(dim) * cosine - at(dim + half) * sine : at(dim) * cosine + at(dim - half) * sine;
      };
      const std::vector<Bf16> new_q = device_q.Get(), new_keys = keys.Get(), new_values = values.Get();
      for (int t = 0; t < kRows; ++t) {
        const int64_t block = slots[t] / block_tokens, offset = slots[t] % block_tokens;
        for (int head = 0; head < c.heads; ++head) {
          for (int dim = 0; dim < c.head_dim; ++dim) {
            const double want = expected(q, q_width, t, head, dim);
            // The products cancel: half a bf16 unit of the result and fp32 roundings of the operands.
            ASSERT_NEAR(HostFloat(new_q[t * q_width + head * c.head_dim + dim]), want,
                        std::abs(want) * kBf16Rounding + 2e-6);
          }
        }
        for (int head = 0; head < c.kv_heads; ++head) {
          for (int dim = 0; dim < c.head_dim; ++dim) {
            const int64_t at = ((block * c.kv_heads + head) * block_tokens + offset) * c.head_dim + dim;
            const double want = expected(k, kv_width, t, head, dim);
            ASSERT_NEAR(HostFloat(new_keys[at]), want, std::abs(want) * kBf16Rounding + 2e-6);
            ASSERT_EQ(new_values[at].bits, v[t * kv_width + head * c.head_dim + dim].bits);
          }
        }
      }
      const auto written = std::count_if(new_keys.begin(), new_keys.end(), [](Bf16 x) { return x.bits != 0xFFFF; });
      EXPECT_EQ(written, kRows * kv_width) << "no other slot is touched";
    });
  }
}

// Keys are rotated in fp32 and values read as they are; then both are the nearest codes. A rotated key may lie so near
// the middle of two codes that double and fp32 disagree: one code apart then.
TEST(RowKernelsTest, RopeStoresTheNearestFp8CodesAndTheirExponents) {
  for (const int head_dim : {64, 128}) {
    ForEachOrder([head_dim] {
      constexpr int kRows = 4, kHeads = 3, kPositions = 8, kBlocks = 3, kBlockTokens = 8, kShift = 3;
      const int half = head_dim / 4, width = kHeads * head_dim;
      std::mt19937_64 random(head_dim);
      std::vector<float> cosines, sines;
      for (int i = 0; i < kPositions * half; ++i) {
        cosines.push_back(std::cos(0.1f * static_cast<float>(i)));
        sines.push_back(std::sin(0.1f * static_cast<float>(i)));
      }
      std::vector<Bf16> k = RandomBf16(random, kRows * width, 2.0f), v = RandomBf16(random, kRows * width);
      for (int d = 0; d < head_dim; ++d) {
        v[d] = HostBf16(0.0f);                                   // a row of zeros
        v[width + d] = HostBf16(1e-4f * static_cast<float>(d));  // small
        v[2 * width + d] =
            HostBf16(d == 5 ? 448.0f : 0.01f * static_cast<float>(d));  // with codes below the normal ones
        k[3 * width + d] = HostBf16(d == 9 ? INFINITY : 1.0f);          // broken
      }
      const DeviceArray<Bf16> device_k(k), device_v(v);
      DeviceArray<Bf16> q(RandomBf16(random, kRows * width));
      const std::vector<int32_t> positions = {0, 3, 7, 1};
      const std::vector<int64_t> slots = {17, 2, 8, 5};
      const DeviceArray<int32_t> device_positions(positions);
      const DeviceArray<int64_t> device_slots(slots);
      const DeviceArray<float> device_cosines(cosines), device_sines(sines);
      DeviceArray<uint8_t> keys(kBlocks * kBlockTokens * width), values(kBlocks * kBlockTokens * width);
      DeviceArray<int8_t> key_exponents(kBlocks * kBlockTokens * kHeads),
          value_exponents(kBlocks * kBlockTokens * kHeads);
      const RopeParams params{q.data(),
                              device_k.data(),
                              device_v.data(),
                              device_positions.data(),
                              device_slots.data(),
                              device_cosines.data(),
                              device_sines.data(),
                              {nullptr,
                               nullptr,
                               kHeads,
                               kShift,
                               {keys.data(), values.data(), key_exponents.data(), value_exponents.data()}},
                              kHeads,
                              head_dim,
                              2 * half,
                              width,
                              width};
      ASSERT_EQ(RopeAndStoreKv(params, kRows, TestStream()), cudaSuccess);
      const auto new_keys = keys.Get(), new_values = values.Get();
      const auto new_key_exponents = key_exponents.Get(), new_value_exponents = value_exponents.Get();
      for (int t = 0; t < kRows; ++t) {
        for (int head = 0; head < kHeads; ++head) {
          std::vector<double> key(head_dim), value(head_dim);
          for (int d = 0; d < head_dim; ++d) {
            const auto at = [&](int dim) { return double{HostFloat(k[t * width + head * head_dim + dim])}; };
            const double cosine = double{cosines[positions[t] * half + d % half]};
            const double sine = double{sines[positions[t] * half + d % half]};
            key[d] = d >= 2 * half ? at(d)
                     : d < half    ? at(d) * cosine - at(d + half) * sine
                                   : at(d) * cosine + at(d - half) * sine;
            value[d] = HostFloat(v[t * width + head * head_dim + d]);
          }
          const int64_t row = (slots[t] / kBlockTokens * kHeads + head) * kBlockTokens + slots[t] % kBlockTokens;
          const HostFp8Row want_value = EncodeFp8Row(value);
          ASSERT_EQ(new_value_exponents[row], want_value.exponent);
          for (int d = 0; d < head_dim; ++d) ASSERT_EQ(new_values[row * head_dim + d], want_value.codes[d]) << d;
          if (t == 3 && head == 0) {
            ASSERT_EQ(new_key_exponents[row], -128) << "reads as NaN";
            continue;
          }
          const HostFp8Row want_key = EncodeFp8Row(key);
          ASSERT_EQ(new_key_exponents[row], want_key.exponent);
          int different = 0;
          for (int d = 0; d < head_dim; ++d) {
            const int apart = std::abs(int{new_keys[row * head_dim + d]} - int{want_key.codes[d]});
            ASSERT_LE(apart, 1);
            different += apart;
          }
          ASSERT_LE(different, 1);
        }
      }
    });
  }
}

TEST(RowKernelsTest, ReferenceMatMulEqualsDoubleReference) {
  for (const int depth : {1, 7, 8, 9, 64, 200}) {
    for (const int outs : {1, 127, 128, 129}) {
      constexpr int kRows = 3;
      std::mt19937_64 random(depth * 1000 + outs);
      const std::vector<Bf16> x = RandomBf16(random, kRows * depth), w = RandomBf16(random, outs * depth);
      const std::vector<Bf16> before = RandomBf16(random, kRows * outs, 3.0f);
      const DeviceArray<Bf16> device_x(x), device_w(w);
      DeviceArray<float> out(kRows * outs);
      DeviceArray<Bf16> narrow(kRows * outs), added(before);
      ASSERT_EQ(ReferenceMatMul(device_x.data(), device_w.data(), kRows, outs, depth, out.data(), TestStream()),
                cudaSuccess);
      ASSERT_EQ(ReferenceMatMul(device_x.data(), device_w.data(), kRows, outs, depth, Store::kReplace, narrow.data(),
                                TestStream()),
                cudaSuccess);
      ASSERT_EQ(ReferenceMatMul(device_x.data(), device_w.data(), kRows, outs, depth, Store::kAdd, added.data(),
                                TestStream()),
                cudaSuccess);
      const std::vector<float> result = out.Get();
      const std::vector<Bf16> rounded = narrow.Get(), sums = added.Get();
      for (int r = 0; r < kRows; ++r) {
        for (int o = 0; o < outs; ++o) {
          double sum = 0.0, magnitude = 0.0;
          for (int i = 0; i < depth; ++i) {
            const double product = double{HostFloat(x[r * depth + i])} * HostFloat(w[o * depth + i]);
            sum += product;
            magnitude += std::abs(product);
          }
          ASSERT_NEAR(result[r * outs + o], sum, 1e-6 * magnitude);
          ASSERT_EQ(rounded[r * outs + o].bits, HostBf16(result[r * outs + o]).bits);
          ASSERT_EQ(sums[r * outs + o].bits, HostBf16(result[r * outs + o] + HostFloat(before[r * outs + o])).bits)
              << "one rounding, of the sum";
        }
      }
    }
  }
}

}  // namespace
}  // namespace minitron::engine::cuda
