// nemotron_weights: every tensor found once, with the shape the config demands; and the model that ships loads.
#include "engine/nemotron_weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>

namespace minitron::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A checkpoint in memory that a test can edit; the data is never read.
class FakeCheckpoint : public Checkpoint {
 public:
  std::map<std::string, TensorEntry>& edit() { return tensors_; }
  void Add(const std::string& name, std::vector<int64_t> shape) {
    int64_t bytes = 2;
    for (const int64_t dim : shape) bytes *= dim;
    tensors_[name] = {DType::kBf16, std::move(shape), this, bytes};
  }
};

// Hidden 24 is not heads x head_dim, as in the 8B.
NemotronConfig SmallConfig() {
  NemotronConfig config;
  config.vocab_size = 10;
  config.hidden_size = 24;
  config.num_layers = 2;
  config.num_attention_heads = 6;
  config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.rotary_dim = 4;
  config.intermediate_size = 40;
  return config;
}

void FillSmall(FakeCheckpoint& checkpoint) {
  checkpoint.Add("model.embed_tokens.weight", {10, 24});
  checkpoint.Add("model.norm.weight", {24});
  checkpoint.Add("model.norm.bias", {24});
  checkpoint.Add("lm_head.weight", {10, 24});
  for (const std::string layer : {"model.layers.0.", "model.layers.1."}) {
    for (const std::string norm : {"input_layernorm", "post_attention_layernorm"}) {
      checkpoint.Add(layer + norm + ".weight", {24});
      checkpoint.Add(layer + norm + ".bias", {24});
    }
    checkpoint.Add(layer + "self_attn.q_proj.weight", {48, 24});
    checkpoint.Add(layer + "self_attn.k_proj.weight", {16, 24});
    checkpoint.Add(layer + "self_attn.v_proj.weight", {16, 24});
    checkpoint.Add(layer + "self_attn.o_proj.weight", {24, 48});
    checkpoint.Add(layer + "mlp.up_proj.weight", {40, 24});
    checkpoint.Add(layer + "mlp.down_proj.weight", {24, 40});
  }
}

void ExpectRefused(const FakeCheckpoint& checkpoint, const std::string& why) {
  const auto weights = MapNemotronWeights(checkpoint, SmallConfig());
  ASSERT_FALSE(weights.ok()) << "not refused: " << why;
  EXPECT_EQ(weights.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(weights.status().message()), HasSubstr(why));
}

TEST(NemotronWeights, MapsEveryRoleAndCounts) {
  FakeCheckpoint checkpoint;
  FillSmall(checkpoint);
  const auto weights = MapNemotronWeights(checkpoint, SmallConfig());
  ASSERT_TRUE(weights.ok()) << weights.status();
  ASSERT_EQ(weights->layers.size(), 2u);
  EXPECT_EQ(weights->layers[1].q_proj.rows, 48);
  EXPECT_EQ(weights->layers[1].q_proj.cols, 24);
  EXPECT_EQ(weights->layers[1].o_proj.cols, 48);
  EXPECT_EQ(weights->layers[0].input_norm_bias.rows, 1);
  EXPECT_EQ(weights->layers[0].input_norm_bias.cols, 24);
  EXPECT_EQ(weights->num_parameters, 2 * 240 + 2 * 24 + 2 * (4 * 24 + 2 * 1152 + 2 * 384 + 2 * 960));
  EXPECT_EQ(weights->num_bytes, 2 * weights->num_parameters);
}

TEST(NemotronWeights, MatricesAreNamedByWhereTheirNumbersLie) {
  FakeCheckpoint checkpoint;
  FillSmall(checkpoint);
  auto weights = MapNemotronWeights(checkpoint, SmallConfig());
  ASSERT_TRUE(weights.ok()) << weights.status();
  const float numbers[5] = {};
  weights->embedding.data = &numbers[0];
  weights->layers[0].k_proj.data = &numbers[1];
  weights->layers[1].down_proj.data = &numbers[2];
  weights->lm_head.data = &numbers[3];
  EXPECT_EQ(weights->NameOf(&numbers[0]), "model.embed_tokens.weight");
  EXPECT_EQ(weights->NameOf(&numbers[1]), "model.layers.0.self_attn.k_proj.weight");
  EXPECT_EQ(weights->NameOf(&numbers[2]), "model.layers.1.mlp.down_proj.weight");
  EXPECT_EQ(weights->NameOf(&numbers[3]), "lm_head.weight");
  EXPECT_EQ(weights->NameOf(&numbers[4]), "");
}

TEST(NemotronWeights, EachMissingTensorIsNamed) {
  FakeCheckpoint full;
  FillSmall(full);
  for (const auto& [name, entry] : full.tensors()) {
    FakeCheckpoint checkpoint;
    FillSmall(checkpoint);
    checkpoint.edit().erase(name);
    ExpectRefused(checkpoint, "tensor " + name + " missing");
  }
}

TEST(NemotronWeights, EachMisshapenTensorIsNamedWithBothShapes) {
  FakeCheckpoint full;
  FillSmall(full);
  for (const auto& [name, entry] : full.tensors()) {
    FakeCheckpoint checkpoint;
    FillSmall(checkpoint);
    checkpoint.edit()[name].shape[0] -= 1;
    ExpectRefused(checkpoint, "tensor " + name + " has shape [" + std::to_string(entry.shape[0] - 1));
    checkpoint.edit()[name].shape = {1, entry.shape[0], entry.shape.back()};
    ExpectRefused(checkpoint, "tensor " + name + " has shape [1, ");
  }
}

TEST(NemotronWeights, ExtraTensorsAreRefusedButNotInvFreq) {
  FakeCheckpoint checkpoint;
  FillSmall(checkpoint);
  checkpoint.Add("model.layers.0.self_attn.rotary_emb.inv_freq", {2});
  EXPECT_TRUE(MapNemotronWeights(checkpoint, SmallConfig()).ok());
  checkpoint.Add("model.layers.2.mlp.up_proj.weight", {40, 24});
  ExpectRefused(checkpoint, "model.layers.2.mlp.up_proj.weight [40, 24] is not part of");
  checkpoint.edit().erase("model.layers.2.mlp.up_proj.weight");
  checkpoint.Add("model.layers.0.mlp.gate_proj.weight", {40, 24});
  ExpectRefused(checkpoint, "gate_proj");
}

TEST(NemotronWeights, MixedDTypesKeepTheirOwn) {
  FakeCheckpoint checkpoint;
  FillSmall(checkpoint);
  checkpoint.edit()["model.norm.weight"].dtype = DType::kF32;
  checkpoint.edit()["lm_head.weight"].dtype = DType::kF16;
  const auto weights = MapNemotronWeights(checkpoint, SmallConfig());
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(weights->final_norm_weight.dtype, DType::kF32);
  EXPECT_EQ(weights->embedding.dtype, DType::kBf16);
  EXPECT_EQ(weights->matrix_dtype, DType::kF16);
}

// A matrix in E4M3 and its scale, which is read.
void MakeFp8(FakeCheckpoint& checkpoint, const std::string& name, std::vector<int64_t> scale_shape, DType scale_type,
             const void* scales) {
  TensorEntry& matrix = checkpoint.edit()[name];
  matrix.dtype = DType::kE4m3;
  matrix.num_bytes /= 2;
  int64_t count = 1;
  for (const int64_t size : scale_shape) count *= size;
  checkpoint.edit()[name + "_scale"] = {scale_type, std::move(scale_shape), scales, count * DTypeBytes(scale_type)};
}

TEST(NemotronWeights, Fp8MatricesHaveAScaleForEachOutput) {
  const float one = 0.5f;
  const std::vector<float> each(40, 0.25f);
  const std::vector<uint16_t> narrow(24, 0x3F00);  // 0.5 as bf16
  FakeCheckpoint checkpoint;
  FillSmall(checkpoint);
  EXPECT_FALSE(MapNemotronWeights(checkpoint, SmallConfig())->has_fp8());
  MakeFp8(checkpoint, "model.layers.0.self_attn.q_proj.weight", {}, DType::kF32, &one);
  MakeFp8(checkpoint, "model.layers.0.self_attn.k_proj.weight", {1}, DType::kF32, &one);
  MakeFp8(checkpoint, "model.layers.0.mlp.up_proj.weight", {40, 1}, DType::kF32, each.data());
  MakeFp8(checkpoint, "model.layers.1.mlp.down_proj.weight", {24}, DType::kBf16, narrow.data());
  for (const char* unused : {"mlp.up_proj.input_scale", "self_attn.k_scale", "self_attn.v_scale", "self_attn.kv_scale",
                             "self_attn.k_proj.output_scale"}) {
    checkpoint.Add(std::string("model.layers.0.") + unused, {1});
  }
  const auto weights = MapNemotronWeights(checkpoint, SmallConfig());
  ASSERT_TRUE(weights.ok()) << weights.status();
  const NemotronWeights copy = *weights;  // scales stay where they are
  EXPECT_TRUE(copy.has_fp8());
  const LayerWeights &first = copy.layers[0], &second = copy.layers[1];
  EXPECT_EQ(first.q_proj.dtype, DType::kE4m3);
  for (int row = 0; row < 48; ++row) EXPECT_EQ(first.q_proj.scales[row], 0.5f);
  for (int row = 0; row < 16; ++row) EXPECT_EQ(first.k_proj.scales[row], 0.5f);
  for (int row = 0; row < 40; ++row) EXPECT_EQ(first.up_proj.scales[row], 0.25f);
  for (int row = 0; row < 24; ++row) EXPECT_EQ(second.down_proj.scales[row], 0.5f);
  EXPECT_EQ(first.v_proj.scales, nullptr);
}

TEST(NemotronWeights, Fp8ScalesThatAreMissingOrNoScalesAreNamed) {
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  const auto refused = [&name](std::vector<int64_t> shape, DType type, const std::vector<float>& scales,
                               const std::string& why) {
    FakeCheckpoint checkpoint;
    FillSmall(checkpoint);
    MakeFp8(checkpoint, name, std::move(shape), type, scales.data());
    ExpectRefused(checkpoint, "tensor " + name + "_scale " + why);
  };
  refused({2}, DType::kF32, {1.0f, 1.0f}, "has shape [2], expected one number or 40, one for each output");
  refused({1}, DType::kF16, {1.0f}, "is f16, expected f32 or bf16");
  refused({1}, DType::kF32, {-1.0f}, "has -1 for output 0 outside [0, 1e+30]");
  refused({1}, DType::kF32, {std::nanf("")}, "has nan for output 0");
  refused({1}, DType::kF32, {INFINITY}, "has inf for output 0");
  FakeCheckpoint checkpoint;
  FillSmall(checkpoint);
  checkpoint.edit()[name].dtype = DType::kE4m3;
  ExpectRefused(checkpoint, "tensor " + name + "_scale missing: the scale of a matrix in fp8");
  checkpoint.edit()[name].dtype = DType::kBf16;
  checkpoint.edit()["model.norm.bias"].dtype = DType::kE4m3;
  ExpectRefused(checkpoint, "tensors of model.norm are fp8, expected bf16, f16 or f32");
}

TEST(NemotronWeights, TheShippedModelLoads) {
  const std::string dir = std::string(MINITRON_SOURCE_DIR) + "/deploy/models/minitron-tiny";
  const auto config = LoadNemotronConfig(dir);
  ASSERT_TRUE(config.ok()) << config.status();
  const auto checkpoint = Checkpoint::Open(dir);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto weights = MapNemotronWeights(**checkpoint, *config);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(weights->layers.size(), 6u);
  EXPECT_EQ(weights->num_parameters, 4'625'280);
  EXPECT_EQ(weights->num_bytes, 2 * weights->num_parameters);
  EXPECT_EQ(weights->matrix_dtype, DType::kBf16);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(weights->lm_head.data) % 2, 0u);
  // Every weight is a finite bf16: the whole file is readable and looks like weights.
  int64_t non_zero = 0;
  for (const auto& [name, entry] : (*checkpoint)->tensors()) {
    const auto* values = static_cast<const uint16_t*>(entry.data);
    for (int64_t i = 0; i < entry.num_bytes / 2; ++i) {
      ASSERT_NE(values[i] & 0x7F80, 0x7F80) << name;
      non_zero += (values[i] & 0x7FFF) != 0;
    }
  }
  EXPECT_GT(non_zero, 4'000'000);
}

}  // namespace
}  // namespace minitron::engine
