// NemotronWeights: every tensor of the network by role, shapes checked once against the config.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/checkpoint/checkpoint.h"
#include "engine/model_config.h"
#include "engine/model_runner.h"
#include "engine/tensor.h"

namespace minitron::engine {

struct LayerWeights {
  WeightView input_norm_weight, input_norm_bias;  // [hidden]; weight is an offset from 1
  WeightView q_proj, k_proj, v_proj;              // [query_width | key_value_width, hidden]
  WeightView o_proj;                              // [hidden, query_width]
  WeightView post_norm_weight, post_norm_bias;    // [hidden]; weight is an offset from 1
  WeightView up_proj;                             // [intermediate, hidden]
  WeightView down_proj;                           // [hidden, intermediate]
};

// Views into the Checkpoint, which must outlive this object.
struct NemotronWeights {
  WeightView embedding;  // [vocab, hidden]
  std::vector<LayerWeights> layers;
  WeightView final_norm_weight, final_norm_bias;  // [hidden]
  WeightView lm_head;                             // [vocab, hidden]
  int64_t num_parameters = 0;
  int64_t num_bytes = 0;
  DType matrix_dtype = DType::kBf16;                             // of lm_head; names the checkpoint's type
  std::shared_ptr<const std::deque<std::vector<float>>> scales;  // what WeightView::scales points into

  // Whether any matrix is in E4M3.
  bool has_fp8() const;
  // The name, as in checkpoints, of the matrix whose numbers lie at `data`; empty: none of them.
  std::string NameOf(const void* data) const;
};

// Finds all tensors. A matrix in E4M3 has its scale beside it, NAME_scale with one number or one for each output.
// Scales of activations and of the KV cache that such checkpoints have are not used. Errors: INVALID_ARGUMENT for a
// missing, extra or misshapen tensor (name, shape, shape expected); rotary inv_freq buffers are tolerated.
absl::StatusOr<NemotronWeights> MapNemotronWeights(const Checkpoint& checkpoint, const NemotronConfig& config);

// What a runner says of a model by its config and weights. The backend fills in its own: `backend`, `weight_type`,
// `weight_bytes` and `kv_bytes_per_token`.
ModelInfo DescribeModel(const NemotronConfig& config, const NemotronWeights& weights, int max_context_tokens);

}  // namespace minitron::engine
