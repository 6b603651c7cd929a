#include "engine/nemotron_weights.h"

#include <set>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/base/status_macros.h"

namespace minitron::engine {
namespace {

constexpr char kInvFreqSuffix[] = ".rotary_emb.inv_freq";  // derived from the config; older exports store it

std::string ShapeText(const std::vector<int64_t>& shape) { return absl::StrCat("[", absl::StrJoin(shape, ", "), "]"); }

// Takes tensors out of a checkpoint by name and remembers which.
class Mapper {
 public:
  Mapper(const Checkpoint& checkpoint, const NemotronConfig& config) : checkpoint_(checkpoint), config_(config) {}

  absl::StatusOr<NemotronWeights> Map();

 private:
  absl::Status Take(const std::string& name, std::vector<int64_t> shape, WeightView& view);
  absl::Status Matrix(const std::string& name, int64_t rows, int64_t cols, WeightView& view) {
    return Take(name, {rows, cols}, view);
  }
  absl::Status Norm(const std::string& prefix, WeightView& weight, WeightView& bias);
  absl::Status MapLayer(int index, LayerWeights& layer);
  absl::Status CheckNoneLeft() const;

  const Checkpoint& checkpoint_;
  const NemotronConfig& config_;
  NemotronWeights weights_;
  std::set<std::string> taken_;
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

absl::Status Mapper::Norm(const std::string& prefix, WeightView& weight, WeightView& bias) {
  RETURN_IF_ERROR(Take(prefix + ".weight", {config_.hidden_size}, weight));
  return Take(prefix + ".bias", {config_.hidden_size}, bias);
}

absl::Status Mapper::MapLayer(int index, LayerWeights& layer) {
  const std::string prefix = absl::StrCat("model.layers.", index, ".");
  const int64_t hidden = config_.hidden_size, intermediate = config_.intermediate_size;
  const int64_t query = config_.query_width(), key_value = config_.key_value_width();
  RETURN_IF_ERROR(Norm(prefix + "input_layernorm", layer.input_norm_weight, layer.input_norm_bias));
  RETURN_IF_ERROR(Matrix(prefix + "self_attn.q_proj.weight", query, hidden, layer.q_proj));
  RETURN_IF_ERROR(Matrix(prefix + "self_attn.k_proj.weight", key_value, hidden, layer.k_proj));
  RETURN_IF_ERROR(Matrix(prefix + "self_attn.v_proj.weight", key_value, hidden, layer.v_proj));
  RETURN_IF_ERROR(Matrix(prefix + "self_attn.o_proj.weight", hidden, query, layer.o_proj));
  RETURN_IF_ERROR(Norm(prefix + "post_attention_layernorm", layer.post_norm_weight, layer.post_norm_bias));
  RETURN_IF_ERROR(Matrix(prefix + "mlp.up_proj.weight", intermediate, hidden, layer.up_proj));
  return Matrix(prefix + "mlp.down_proj.weight", hidden, intermediate, layer.down_proj);
}

absl::Status Mapper::CheckNoneLeft() const {
  for (const auto& [name, entry] : checkpoint_.tensors()) {
    if (taken_.count(name) == 0 && !absl::EndsWith(name, kInvFreqSuffix)) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " ", ShapeText(entry.shape),
                                                     " is not part of a Nemotron model of ", config_.num_layers,
                                                     " layers"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<NemotronWeights> Mapper::Map() {
  RETURN_IF_ERROR(Matrix("model.embed_tokens.weight", config_.vocab_size, config_.hidden_size, weights_.embedding));
  weights_.layers.resize(config_.num_layers);
  for (int i = 0; i < config_.num_layers; ++i) RETURN_IF_ERROR(MapLayer(i, weights_.layers[i]));
  RETURN_IF_ERROR(Norm("model.norm", weights_.final_norm_weight, weights_.final_norm_bias));
  RETURN_IF_ERROR(Matrix("lm_head.weight", config_.vocab_size, config_.hidden_size, weights_.lm_head));
  RETURN_IF_ERROR(CheckNoneLeft());
  weights_.matrix_dtype = weights_.lm_head.dtype;
  return std::move(weights_);
}

}  // namespace

absl::StatusOr<NemotronWeights> MapNemotronWeights(const Checkpoint& checkpoint, const NemotronConfig& config) {
  return Mapper(checkpoint, config).Map();
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
