// Each op against a naive reference in double, on every Highway target this machine has.
// Typed by op set: another backend adds its type to OpSets and a ForEachTarget of its own.
#include "engine/ops.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "engine/convert.h"
#include "engine/cpu/cpu_ops.h"
#include "engine/cpu/layer_norm.h"
#include "gtest/gtest.h"
#include "tests/engine/random_model.h"
#include "tests/engine/targets.h"

namespace minitron::engine {
namespace {

// Around every vector width (4, 8, 16) and register tile (4 rows, 4 and 8 outputs).
const std::vector<int> kEdges = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65};

template <typename Ops>
class OpsTest : public testing::Test {
 protected:
  using Buffer = typename Ops::Buffer;

  static std::unique_ptr<Ops> MakeOps(const NemotronConfig& config, int block_size = 16, int num_blocks = 16,
                                      int threads = 2, KvCacheType kv_cache_type = KvCacheType::kF32) {
    const RunnerLimits limits{.block_size = block_size,
                              .num_kv_blocks = num_blocks,
                              .max_num_sequences = 8,
                              .max_num_tokens = 128,
                              .max_context_tokens = config.max_position_embeddings,
                              .kv_cache_type = kv_cache_type};
    return std::make_unique<Ops>(config, limits, threads);
  }

  std::vector<float> Random(int64_t count, float scale = 1.0f) {
    std::vector<float> values(count);
    for (float& x : values) x = NextUniform(state_) * scale;
    return values;
  }

  // A weight matrix of a type, and its exact values.
  struct Weight {
    std::vector<uint8_t> bytes;
    std::vector<float> values;
    WeightView view;
  };
  Weight RandomWeight(int64_t rows, int64_t cols, DType dtype) {
    Weight weight;
    weight.values.resize(rows * cols);
    weight.bytes.resize(rows * cols * DTypeBytes(dtype));
    weight.view = {.data = weight.bytes.data(), .dtype = dtype, .rows = rows, .cols = cols};
    for (int64_t i = 0; i < rows * cols; ++i) {
      float value = NextUniform(state_);
      if (std::abs(value) < 0x1.0p-14f) value = 0.0f;
      StoreElement(value, dtype, weight.bytes.data() + i * DTypeBytes(dtype));
      WeightsToFloat(weight.view, i, 1, &weight.values[i]);
    }
    return weight;
  }

  uint64_t state_ = 11;
};

using OpSets = testing::Types<cpu::CpuOps>;
TYPED_TEST_SUITE(OpsTest, OpSets);

// A sum of n fp32 products with |terms| adding to s is off by at most n * 2^-24 * s; typical errors are its square
// root. 4 * sqrt(n) * 2^-24 * s leaves room and still fails for one forgotten or doubled term.
double SumTolerance(int64_t count, double sum_of_magnitudes) {
  return 4.0 * std::sqrt(static_cast<double>(count)) * 0x1.0p-24 * sum_of_magnitudes + 1e-30;
}

TYPED_TEST(OpsTest, MatMulEqualsDoubleReferenceAroundEveryEdge) {
  ForEachTarget([&](int64_t) {
    auto ops = this->MakeOps(SmallConfig());
    for (const DType dtype : {DType::kBf16, DType::kF16, DType::kF32}) {
      for (const int depth : kEdges) {
        for (const int outs : {1, 3, 4, 7, 8, 9, 33}) {
          for (const int rows : {1, 2, 3, 4, 5, 9}) {
            const auto w = this->RandomWeight(outs, depth, dtype);
            const std::vector<float> x = this->Random(rows * depth);
            std::vector<float> out(rows * outs, -7.0f);
            ops->MatMul({x.data(), rows, depth}, w.view, {out.data(), rows, outs});
            for (int r = 0; r < rows; ++r) {
              for (int o = 0; o < outs; ++o) {
                double sum = 0.0, magnitude = 0.0;
                for (int i = 0; i < depth; ++i) {
                  const double product = double{x[r * depth + i]} * w.values[o * depth + i];
                  sum += product;
                  magnitude += std::abs(product);
                }
                ASSERT_NEAR(out[r * outs + o], sum, SumTolerance(depth, magnitude))
                    << DTypeName(dtype) << " rows " << rows << " depth " << depth << " outs " << outs;
              }
            }
          }
        }
      }
    }
  });
}

TYPED_TEST(OpsTest, MatMulRowsHaveTheSameBitsInAnyBatchAndAtAnyThreadCount) {
  ForEachTarget([&](int64_t) {
    auto ops = this->MakeOps(SmallConfig());
    auto other_ops = this->MakeOps(SmallConfig(), 16, 16, 5);
    for (const int depth : {33, 200}) {
      const int outs = 523;
      const auto w = this->RandomWeight(outs, depth, DType::kBf16);
      const std::vector<float> x = this->Random(65 * depth);
      std::vector<float> alone(65 * outs);
      for (int r = 0; r < 65; ++r) {
        ops->MatMul({x.data() + r * depth, 1, depth}, w.view, {alone.data() + r * outs, 1, outs});
      }
      for (const int rows : kEdges) {
        for (auto* which : {ops.get(), other_ops.get()}) {
          std::vector<float> together(rows * outs);
          which->MatMul({x.data(), rows, depth}, w.view, {together.data(), rows, outs});
          ASSERT_EQ(std::memcmp(together.data(), alone.data(), together.size() * sizeof(float)), 0) << rows << " rows";
        }
      }
    }
  });
}

TYPED_TEST(OpsTest, MatMulReadsNothingPastTheLastWeight) {
  ForEachTarget([&](int64_t) {
    auto ops = this->MakeOps(SmallConfig());
    for (const int depth : kEdges) {
      // Exactly sized heap memory: AddressSanitizer sees one byte too many. NaN behind x must not leak into the sum.
      const auto w = this->RandomWeight(3, depth, DType::kBf16);
      std::vector<float> x = this->Random(depth);
      x.push_back(std::nanf(""));
      std::vector<float> out(3);
      ops->MatMul({x.data(), 1, depth}, w.view, {out.data(), 1, 3});
      for (const float value : out) ASSERT_TRUE(std::isfinite(value)) << depth;
    }
  });
}

TYPED_TEST(OpsTest, EmbedWidensRowsExactly) {
  auto ops = this->MakeOps(SmallConfig());
  for (const DType dtype : {DType::kBf16, DType::kF16, DType::kF32}) {
    const auto table = this->RandomWeight(50, 40, dtype);
    const std::vector<TokenId> tokens = {49, 0, 7, 7};
    std::vector<float> out(tokens.size() * 40);
    BatchView batch{.num_tokens = 4, .token_ids = tokens.data()};
    ops->Embed(batch, table.view, {out.data(), 4, 40});
    for (size_t t = 0; t < tokens.size(); ++t) {
      EXPECT_TRUE(std::equal(&out[t * 40], &out[t * 40] + 40, &table.values[tokens[t] * 40]));
    }
  }
}

TYPED_TEST(OpsTest, AddLayerNorm1pEqualsDoubleReference) {
  for (const int hidden : {1, 2, 15, 16, 17, 64, 65, 4096}) {
    NemotronConfig config = SmallConfig();
    config.hidden_size = hidden;
    auto ops = this->MakeOps(config);
    for (const bool with_delta : {false, true}) {
      const int rows = 5;
      const auto weight = this->RandomWeight(1, hidden, DType::kBf16);
      const auto bias = this->RandomWeight(1, hidden, DType::kBf16);
      std::vector<float> residual = this->Random(rows * hidden, 3.0f);
      const std::vector<float> before = residual;
      std::vector<float> delta = this->Random(rows * hidden);
      std::vector<float>& out = delta;  // the alias the contract allows
      const std::vector<float> added = delta;
      constexpr float kEps = 1e-5f;
      ops->AddLayerNorm1p({residual.data(), rows, hidden}, {with_delta ? delta.data() : nullptr, rows, hidden},
                          weight.view, bias.view, kEps, {out.data(), rows, hidden});
      for (int r = 0; r < rows; ++r) {
        double mean = 0.0, variance = 0.0;
        std::vector<double> x(hidden);
        for (int i = 0; i < hidden; ++i) {
          const float sum = before[r * hidden + i] + (with_delta ? added[r * hidden + i] : 0.0f);
          ASSERT_EQ(residual[r * hidden + i], sum);
          x[i] = sum;
          mean += x[i] / hidden;
        }
        for (int i = 0; i < hidden; ++i) variance += (x[i] - mean) * (x[i] - mean) / hidden;
        for (int i = 0; i < hidden; ++i) {
          const double normal = (x[i] - mean) / std::sqrt(variance + double{kEps});
          // A handful of fp32 roundings of values up to 10; a single element has variance 0 and nothing to cancel.
          ASSERT_NEAR(out[r * hidden + i], normal * (1.0 + weight.values[i]) + bias.values[i], 1e-5)
              << hidden << " with delta " << with_delta;
        }
      }
    }
  }
}

TYPED_TEST(OpsTest, LayerNormCancelsALargeMean) {
  NemotronConfig config = SmallConfig();
  config.hidden_size = 64;
  auto ops = this->MakeOps(config);
  const std::vector<float> zeros(64, 0.0f);
  const WeightView zero{.data = zeros.data(), .dtype = DType::kF32, .rows = 1, .cols = 64};
  std::vector<float> x(64), out(64);
  for (int i = 0; i < 64; ++i) x[i] = 1000.0f + (i % 2 == 0 ? 1.0f : -1.0f);
  ops->AddLayerNorm1p({x.data(), 1, 64}, {nullptr, 1, 64}, zero, zero, 1e-5f, {out.data(), 1, 64});
  for (int i = 0; i < 64; ++i) EXPECT_NEAR(out[i], i % 2 == 0 ? 1.0 : -1.0, 1e-4);
}

TEST(LayerNormRowTest, HasTheSameBitsOnEveryTarget) {
  for (const int count : kEdges) {
    uint64_t seed = 3;
    std::vector<float> x(count), delta(count), gain(count), bias(count), first;
    for (std::vector<float>* values : {&x, &delta, &gain, &bias}) {
      for (float& value : *values) value = NextUniform(seed);
    }
    ForEachTarget([&](int64_t) {
      std::vector<float> residual = x, out = delta;  // the alias the contract allows
      cpu::LayerNormRow(residual.data(), out.data(), gain.data(), bias.data(), count, 1e-5f, out.data());
      residual.insert(residual.end(), out.begin(), out.end());
      if (first.empty()) first = residual;
      ASSERT_EQ(std::memcmp(residual.data(), first.data(), first.size() * sizeof(float)), 0) << count;
    });
  }
}

TYPED_TEST(OpsTest, SquaredReluEqualsReferenceAndKeepsNan) {
  auto ops = this->MakeOps(SmallConfig());
  std::vector<float> x = this->Random(7 * 33, 5.0f);
  x[4] = std::nanf("");
  const std::vector<float> before = x;
  ops->SquaredRelu({x.data(), 7, 33});
  for (size_t i = 0; i < x.size(); ++i) {
    if (i == 4) {
      EXPECT_TRUE(std::isnan(x[i]));
    } else {
      EXPECT_EQ(x[i], before[i] > 0.0f ? before[i] * before[i] : 0.0f);
    }
  }
}

TYPED_TEST(OpsTest, GatherRowsCopiesInTheOrderAsked) {
  auto ops = this->MakeOps(SmallConfig());
  const std::vector<float> x = this->Random(6 * 5);
  const std::vector<int32_t> rows = {5, 0, 0, 3};
  std::vector<float> out(4 * 5);
  ops->GatherRows({x.data(), 6, 5}, rows.data(), {out.data(), 4, 5});
  for (int r = 0; r < 4; ++r) EXPECT_TRUE(std::equal(&out[r * 5], &out[r * 5] + 5, &x[rows[r] * 5]));
}

// One sequence whose positions [0, length) go through RopeAndStoreKv, then its queries through PagedAttention, against
// rotation and softmax in double.
struct AttentionCase {
  int query_heads, kv_heads, head_dim, rotary_dim, block_size, length;
};

template <typename Ops>
class AttentionOpsTest : public OpsTest<Ops> {};
TYPED_TEST_SUITE(AttentionOpsTest, OpSets);

std::vector<double> RotateNaive(const float* head, int head_dim, int rotary_dim, int position) {
  std::vector<double> out(head, head + head_dim);
  const int half = rotary_dim / 2;
  for (int j = 0; j < half; ++j) {
    const double angle = position * std::pow(10000.0, -2.0 * j / rotary_dim);
    out[j] = head[j] * std::cos(angle) - head[j + half] * std::sin(angle);
    out[j + half] = head[j + half] * std::cos(angle) + head[j] * std::sin(angle);
  }
  return out;
}

TYPED_TEST(AttentionOpsTest, RopeAndPagedAttentionEqualDoubleReference) {
  const std::vector<AttentionCase> cases = {
      {6, 1, 16, 8, 8, 33},    {12, 2, 128, 64, 16, 40}, {4, 4, 20, 10, 8, 17}, {3, 1, 7, 2, 16, 9},
      {14, 2, 64, 32, 32, 65}, {2, 2, 8, 8, 64, 64},     {5, 1, 16, 8, 16, 1},  {8, 1, 33, 16, 256, 31},
  };
  ForEachTarget([&](int64_t) {
    for (const AttentionCase& c : cases) {
      NemotronConfig config = SmallConfig();
      config.num_attention_heads = c.query_heads;
      config.num_key_value_heads = c.kv_heads;
      config.head_dim = c.head_dim;
      config.rotary_dim = c.rotary_dim;
      auto ops = this->MakeOps(config, c.block_size, 16);
      const int64_t q_width = config.query_width(), kv_width = config.key_value_width();
      const std::vector<float> q_in = this->Random(c.length * q_width, 2.0f);
      const std::vector<float> k = this->Random(c.length * kv_width, 2.0f);
      const std::vector<float> v = this->Random(c.length * kv_width, 2.0f);
      std::vector<float> q = q_in, out(c.length * q_width, -7.0f);
      Batch batch;
      for (int block = 0; block * c.block_size < c.length; ++block) batch.block_ids.push_back((15 + 13 * block) % 16);
      for (int t = 0; t < c.length; ++t) {
        batch.token_ids.push_back(0);
        batch.positions.push_back(t);
        batch.slot_mapping.push_back(int64_t{batch.block_ids[t / c.block_size]} * c.block_size + t % c.block_size);
      }
      batch.query_start.push_back(c.length);
      batch.block_start.push_back(static_cast<int>(batch.block_ids.size()));
      batch.kv_lens.push_back(c.length);
      const BatchView view = ops->Upload(batch);
      const int layer = 1;
      ops->RopeAndStoreKv(view, layer, {q.data(), c.length, q_width}, {k.data(), c.length, kv_width},
                          {v.data(), c.length, kv_width});
      ops->PagedAttention(view, layer, {q.data(), c.length, q_width}, {out.data(), c.length, q_width});
      for (int t = 0; t < c.length; ++t) {
        for (int h = 0; h < c.query_heads; ++h) {
          const int g = h / (c.query_heads / c.kv_heads);
          const auto query = RotateNaive(&q_in[t * q_width + h * c.head_dim], c.head_dim, c.rotary_dim, t);
          std::vector<double> scores(t + 1), expected(c.head_dim, 0.0);
          double total = 0.0;
          for (int p = 0; p <= t; ++p) {
            const auto key = RotateNaive(&k[p * kv_width + g * c.head_dim], c.head_dim, c.rotary_dim, p);
            double dot = 0.0;
            for (int d = 0; d < c.head_dim; ++d) dot += query[d] * key[d];
            scores[p] = dot / std::sqrt(static_cast<double>(c.head_dim));
          }
          const double maximum = *std::max_element(scores.begin(), scores.end());
          for (double& score : scores) total += score = std::exp(score - maximum);
          for (int p = 0; p <= t; ++p) {
            for (int d = 0; d < c.head_dim; ++d) {
              expected[d] += scores[p] / total * v[p * kv_width + g * c.head_dim + d];
            }
          }
          for (int d = 0; d < c.head_dim; ++d) {
            // Angles in fp32 are off by position * 2^-24 (4e-6 at 64), scores by a few of those; values are below 2.
            ASSERT_NEAR(out[t * q_width + h * c.head_dim + d], expected[d], 4e-5)
                << "heads " << c.query_heads << "/" << c.kv_heads << " dim " << c.head_dim << " row " << t;
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace minitron::engine
