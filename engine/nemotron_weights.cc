#include "engine/nemotron_weights.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <deque>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/base/status_macros.h"

namespace minitron::engine {
namespace {

constexpr float kMaxScale = 1e30f;  // times the largest code it is finite
// Tensors that may be there and are not read: what derives from the config, and scales of what we scale ourselves.
constexpr const char* kUnusedSuffixes[] = {".rotary_emb.inv_freq", ".input_scale", ".k_scale", ".v_scale", ".kv_scale",
                                           ".output_scale"};

// The matrices of a layer: names behind "model.layers.N." and shapes.
struct LayerMatrix {
  WeightView LayerWeights::*view;
  const char* name;
  int64_t (*rows)(const NemotronConfig&);
  int64_t (*cols)(const NemotronConfig&);
};
constexpr auto kHidden = [](const NemotronConfig& c) -> int64_t { return c.hidden_size; };
constexpr auto kInner = [](const NemotronConfig& c) -> int64_t { return c.intermediate_size; };
constexpr auto kQueries = [](const NemotronConfig& c) -> int64_t { return c.query_width(); };
constexpr auto kKeys = [](const NemotronConfig& c) -> int64_t { return c.key_value_width(); };
constexpr LayerMatrix kLayerMatrices[] = {{&LayerWeights::q_proj, "self_attn.q_proj.weight", kQueries, kHidden},
                                          {&LayerWeights::k_proj, "self_attn.k_proj.weight", kKeys, kHidden},
                                          {&LayerWeights::v_proj, "self_attn.v_proj.weight", kKeys, kHidden},
                                          {&LayerWeights::o_proj, "self_attn.o_proj.weight", kHidden, kQueries},
                                          {&LayerWeights::up_proj, "mlp.up_proj.weight", kInner, kHidden},
                                          {&LayerWeights::down_proj, "mlp.down_proj.weight", kHidden, kInner}};
constexpr const char* kEmbedding = "model.embed_tokens.weight";
constexpr const char* kHead = "lm_head.weight";
std::string LayerPrefix(size_t index) { return absl::StrCat("model.layers.", index, "."); }

bool IsUnused(const std::string& name) {
  return std::any_of(std::begin(kUnusedSuffixes), std::end(kUnusedSuffixes),
                     [&name](const char* suffix) { return absl::EndsWith(name, suffix); });
}

std::string ShapeText(const std::vector<int64_t>& shape) { return absl::StrCat("[", absl::StrJoin(shape, ", "), "]"); }

// Takes tensors out of a checkpoint by name and remembers which.
class Mapper {
 public:
  Mapper(const Checkpoint& checkpoint, const NemotronConfig& config) : checkpoint_(checkpoint), config_(config) {}

  absl::StatusOr<NemotronWeights> Map();

 private:
  absl::Status Take(const std::string& name, std::vector<int64_t> shape, WeightView& view);
  absl::Status Matrix(const std::string& name, int64_t rows, int64_t cols, WeightView& view) {
    RETURN_IF_ERROR(Take(name, {rows, cols}, view));
    return view.dtype == DType::kE4m3 ? TakeScales(name + "_scale", view) : absl::OkStatus();
  }
  absl::Status TakeScales(const std::string& name, WeightView& view);
  absl::Status Norm(const std::string& prefix, WeightView& weight, WeightView& bias);
  absl::Status MapLayer(size_t index, LayerWeights& layer);
  absl::Status CheckNoneLeft() const;

  const Checkpoint& checkpoint_;
  const NemotronConfig& config_;
  NemotronWeights weights_;
  std::set<std::string> taken_;
  std::shared_ptr<std::deque<std::vector<float>>> scales_ = std::make_shared<std::deque<std::vector<float>>>();
};

absl::Status Mapper::Take(const std::string& name, std::vector<int64_t> shape, WeightView& view) {
  const auto found = checkpoint_.tensors().find(name);
  if (found == checkpoint_.tensors().end()) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " missing, expected ", ShapeText(shape)));
  }
  const TensorEntry& entry = found->second;
  if (entry.shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " has shape ", ShapeText(entry.shape),
                                                   ", expected ", ShapeText(shape), " from config.json"));
  }
  view = {entry.data, entry.dtype, shape.size() == 2 ? shape[0] : 1, shape.back()};
  weights_.num_parameters += view.size();
  weights_.num_bytes += entry.num_bytes;
  taken_.insert(name);
  return absl::OkStatus();
}

// One scale for the matrix or one for each row, bf16 or fp32: as fp32 for each row.
absl::Status Mapper::TakeScales(const std::string& name, WeightView& view) {
  const auto found = checkpoint_.tensors().find(name);
  if (found == checkpoint_.tensors().end()) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " missing: the scale of a matrix in fp8"));
  }
  const TensorEntry& entry = found->second;
  int64_t count = 1;
  for (const int64_t size : entry.shape) count *= size;
  const bool of_rows =
      entry.shape == std::vector<int64_t>{view.rows} || entry.shape == std::vector<int64_t>{view.rows, 1};
  if (!of_rows && (count != 1 || entry.shape.size() > 2)) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " has shape ", ShapeText(entry.shape),
                                                   ", expected one number or ", view.rows, ", one for each output"));
  }
  if (entry.dtype != DType::kF32 && entry.dtype != DType::kBf16) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", name, " is ", DTypeName(entry.dtype), ", expected f32 or bf16"));
  }
  std::vector<float>& scales = scales_->emplace_back(view.rows);
  for (int64_t row = 0; row < view.rows; ++row) {
    const int64_t i = of_rows ? row : 0;
    if (entry.dtype == DType::kF32) {
      std::memcpy(&scales[row], static_cast<const unsigned char*>(entry.data) + 4 * i, sizeof(float));
    } else {
      scales[row] = std::bit_cast<float>(uint32_t{static_cast<const uint16_t*>(entry.data)[i]} << 16);
    }
    if (!(scales[row] >= 0.0f && scales[row] <= kMaxScale)) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", name, " has ", scales[row], " for output ", row, " outside [0, ", kMaxScale, "]"));
    }
  }
  view.scales = scales.data();
  weights_.num_bytes += entry.num_bytes;
  taken_.insert(name);
  return absl::OkStatus();
}

absl::Status Mapper::Norm(const std::string& prefix, WeightView& weight, WeightView& bias) {
  RETURN_IF_ERROR(Take(prefix + ".weight", {config_.hidden_size}, weight));
  RETURN_IF_ERROR(Take(prefix + ".bias", {config_.hidden_size}, bias));
  if (weight.dtype != DType::kE4m3 && bias.dtype != DType::kE4m3) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("tensors of ", prefix, " are fp8, expected bf16, f16 or f32"));
}

absl::Status Mapper::MapLayer(size_t index, LayerWeights& layer) {
  const std::string prefix = LayerPrefix(index);
  RETURN_IF_ERROR(Norm(prefix + "input_layernorm", layer.input_norm_weight, layer.input_norm_bias));
  for (const LayerMatrix& m : kLayerMatrices) {
    RETURN_IF_ERROR(Matrix(prefix + m.name, m.rows(config_), m.cols(config_), layer.*m.view));
  }
  return Norm(prefix + "post_attention_layernorm", layer.post_norm_weight, layer.post_norm_bias);
}

absl::Status Mapper::CheckNoneLeft() const {
  for (const auto& [name, entry] : checkpoint_.tensors()) {
    if (taken_.count(name) == 0 && !IsUnused(name)) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " ", ShapeText(entry.shape),
                                                     " is not part of a Nemotron model of ", config_.num_layers,
                                                     " layers"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<NemotronWeights> Mapper::Map() {
  RETURN_IF_ERROR(Matrix(kEmbedding, config_.vocab_size, config_.hidden_size, weights_.embedding));
  weights_.layers.resize(config_.num_layers);
  for (size_t i = 0; i < weights_.layers.size(); ++i) RETURN_IF_ERROR(MapLayer(i, weights_.layers[i]));
  RETURN_IF_ERROR(Norm("model.norm", weights_.final_norm_weight, weights_.final_norm_bias));
  RETURN_IF_ERROR(Matrix(kHead, config_.vocab_size, config_.hidden_size, weights_.lm_head));
  RETURN_IF_ERROR(CheckNoneLeft());
  weights_.matrix_dtype = weights_.lm_head.dtype;
  weights_.scales = std::move(scales_);
  return std::move(weights_);
}

}  // namespace

absl::StatusOr<NemotronWeights> MapNemotronWeights(const Checkpoint& checkpoint, const NemotronConfig& config) {
  return Mapper(checkpoint, config).Map();
}

bool NemotronWeights::has_fp8() const {
  const auto is_fp8 = [](const WeightView& view) { return view.dtype == DType::kE4m3; };
  return is_fp8(embedding) || is_fp8(lm_head) || std::any_of(layers.begin(), layers.end(), [&](const LayerWeights& w) {
           return std::any_of(std::begin(kLayerMatrices), std::end(kLayerMatrices),
                              [&](const LayerMatrix& m) { return is_fp8(w.*m.view); });
         });
}

std::string NemotronWeights::NameOf(const void* data) const {
  if (data == embedding.data) return kEmbedding;
  if (data == lm_head.data) return kHead;
  for (size_t i = 0; i < layers.size(); ++i) {
    for (const LayerMatrix& m : kLayerMatrices) {
      if ((layers[i].*m.view).data == data) return LayerPrefix(i) + m.name;
    }
  }
  return "";
}

ModelInfo DescribeModel(const NemotronConfig& config, const NemotronWeights& weights, int max_context_tokens) {
  ModelInfo info;
  info.architecture = "nemotron";
  info.num_parameters = weights.num_parameters;
  info.vocab_size = config.vocab_size;
  info.hidden_size = config.hidden_size;
  info.num_layers = config.num_layers;
  info.num_attention_heads = config.num_attention_heads;
  info.num_key_value_heads = config.num_key_value_heads;
  info.head_dim = config.head_dim;
  info.intermediate_size = config.intermediate_size;
  info.max_context_tokens = max_context_tokens;
  info.bos_token_id = config.bos_token_id;
  info.eos_token_ids = config.eos_token_ids;
  return info;
}

}  // namespace minitron::engine
