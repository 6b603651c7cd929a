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
