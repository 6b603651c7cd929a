// The Nemotron network on one page: sequential residual blocks, LayerNorm1P before attention and before the MLP,
// grouped query attention with partial rotary embedding, an ungated squared-ReLU MLP, no linear biases, an untied head.
// Source: huggingface/transformers:src/transformers/models/nemotron/modeling_nemotron.py
#pragma once

#include <cstdint>

#include "engine/model_config.h"
#include "engine/nemotron_weights.h"
#include "engine/ops.h"

namespace minitron::engine {

// Activations of one step, allocated once for max_num_tokens rows.
template <OpSet Ops>
struct ForwardBuffers {
  ForwardBuffers(Ops& ops, const NemotronConfig& config, int64_t max_num_tokens)
      : residual(ops.Allocate(max_num_tokens * config.hidden_size)),
        normed(ops.Allocate(max_num_tokens * config.hidden_size)),
        projections(ops.Allocate(max_num_tokens * (config.query_width() + 2 * config.key_value_width()))),
        attended(ops.Allocate(max_num_tokens * config.query_width())),
        inner(ops.Allocate(max_num_tokens * config.intermediate_size)) {}

  // Elements of all buffers together.
  static int64_t NumElements(const NemotronConfig& config, int64_t max_num_tokens) {
    return max_num_tokens * (2 * config.hidden_size + 2 * config.query_width() + 2 * config.key_value_width() +
                             config.intermediate_size);
  }

  typename Ops::Buffer residual, normed;  // [T, hidden]
  typename Ops::Buffer projections;       // queries [T, query_width], keys and values [T, key_value_width]
  typename Ops::Buffer attended;          // [T, query_width]
  typename Ops::Buffer inner;             // [T, intermediate]
};

// Runs the batch through all layers and the final norm, writing the KV cache of its rows.
// Returns the normed hidden states [T, hidden], which live in `buffers` until the next call.
template <OpSet Ops>
MatrixView<const typename Ops::Element> Forward(Ops& ops, const NemotronConfig& config, const NemotronWeights& weights,
                                                const BatchView& batch, ForwardBuffers<Ops>& buffers) {
  using Element = typename Ops::Element;
  using Matrix = MatrixView<Element>;
  using ConstMatrix = MatrixView<const Element>;
  const int64_t T = batch.num_tokens;
  const Matrix x{buffers.residual.data(), T, config.hidden_size};
  const Matrix h{buffers.normed.data(), T, config.hidden_size};
  const Matrix q{buffers.projections.data(), T, config.query_width()};
  const Matrix k{q.data + q.rows * q.cols, T, config.key_value_width()};
  const Matrix v{k.data + k.rows * k.cols, T, config.key_value_width()};
  const Matrix attended{buffers.attended.data(), T, config.query_width()};
  const Matrix inner{buffers.inner.data(), T, config.intermediate_size};
  const auto read = [](const Matrix& m) { return ConstMatrix{m.data, m.rows, m.cols}; };
  ConstMatrix delta{nullptr, T, config.hidden_size};  // what is left to add to the residual; nothing at first

  ops.Embed(batch, weights.embedding, x);
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const LayerWeights& w = weights.layers[layer];
    ops.AddLayerNorm1p(x, delta, w.input_norm_weight, w.input_norm_bias, config.norm_eps, h);
    ops.ProjectQkv(read(h), w.q_proj, w.k_proj, w.v_proj, q, k, v);
    ops.RopeAndStoreKv(batch, layer, q, read(k), read(v));
    ops.PagedAttention(batch, layer, read(q), attended);
    delta = ops.MatMulToResidual(read(attended), w.o_proj, x, h);
    ops.AddLayerNorm1p(x, delta, w.post_norm_weight, w.post_norm_bias, config.norm_eps, h);
    ops.MatMul(read(h), w.up_proj, inner);
    ops.SquaredRelu(inner);
    delta = ops.MatMulToResidual(read(inner), w.down_proj, x, h);
  }
  ops.AddLayerNorm1p(x, delta, weights.final_norm_weight, weights.final_norm_bias, config.norm_eps, h);
  return read(h);
}

}  // namespace minitron::engine
