// OpSet: the inner seam. The Nemotron graph (nemotron_forward.h) and the runner (model_runner_impl.h) are written once
// over these ops; engine/cpu implements them on fp32 activations, engine/cuda on bf16.
//
// An op enqueues work and may return before it is done; ops run in the order they are called. Ops never allocate: an op
// set owns its KV cache, its workspace and its history, sized when it is built. Shapes are CHECKed, values never fail.
//
// Contract of every op: the bits of an output row are a function of that row's inputs alone (and, in attention, of the
// keys and values of its own sequence up to its position). Neither T, nor the row's place, nor block ids, nor chunking,
// nor the number of threads may change them. Hence each reduction has ONE order, fixed by its length.
//
// Dimensions: T token rows, S sequences, R result rows, H query heads, G key/value heads, D head_dim, V vocabulary.
// Source of the maths: huggingface/transformers:src/transformers/models/nemotron/modeling_nemotron.py
#pragma once

#include <concepts>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/batch.h"
#include "engine/tensor.h"

namespace minitron::engine {

// The arrays of a Batch where the ops can read them (host memory for the CPU), token ids resolved.
struct BatchView {
  int num_tokens = 0;     // T
  int num_sequences = 0;  // S
  const TokenId* token_ids = nullptr;
  const int32_t* positions = nullptr;
  const int64_t* slot_mapping = nullptr;
  const int32_t* query_start = nullptr;
  const int32_t* block_start = nullptr;
  const BlockId* block_ids = nullptr;
  const int32_t* kv_lens = nullptr;
};

// `Ops::Element` is the type of activations; `Ops::Buffer` and `Ops::FloatBuffer` own device memory and have data().
template <typename Ops>
concept OpSet = requires(Ops ops, const Batch& batch, const BatchView& view, WeightView weight, int layer, float eps,
                         int64_t count, MatrixView<typename Ops::Element> out,
                         MatrixView<const typename Ops::Element> in, MatrixView<float> logits, const int32_t* rows,
                         absl::Span<const ResultRow> result_rows, int first_row, absl::Span<ResultRowOutput> outputs) {
  // Whether ops only enqueue, so that a step can be submitted while the one before still runs.
  { Ops::kAsynchronous } -> std::convertible_to<bool>;

  // Memory for `count` activations, once at start-up.
  { ops.Allocate(count) } -> std::same_as<typename Ops::Buffer>;
  { ops.AllocateFloats(count) } -> std::same_as<typename Ops::FloatBuffer>;

  // Starts a step: brings the batch to the ops, replaces each TokenFromPreviousResult by the token that row of the
  // step before was given by Sample, and refills the history slots named in the batch.
  { ops.Upload(batch) } -> std::same_as<BatchView>;

  // out[t, :] = embedding[token_ids[t], :]; no scale, no norm.
  //   embedding [V, hidden]   bf16, f16 or f32
  //   out       [T, hidden]
  {ops.Embed(view, weight, out)};

  // residual += delta (none when delta.data is null);
  // out = (residual - mean) / sqrt(var + eps) * (1 + weight) + bias, per row.
  //   residual, delta, out [T, hidden]; out may alias delta, not residual
  //   weight, bias         [hidden]     stored as offset from 1 (LayerNorm1P); 1 + weight is added in fp32
  // Biased variance around the mean, both in fp32, two passes.
  {ops.AddLayerNorm1p(out, in, weight, weight, eps, out)};

  // out = x * w^T, products and sums in fp32. A backend may round x to what it multiplies w with.
  //   x   [T, in]
  //   w   [out, in]   bf16, f16 or f32, row-major
  //   out [T, out]; the second form keeps logits in fp32 whatever Element is
  {ops.MatMul(in, weight, out)};
  {ops.MatMul(in, weight, logits)};

  // residual += x * w^T, as MatMul; or delta = x * w^T, which the next AddLayerNorm1p is to add. Returns what is left
  // to add: null data when nothing is.
  //   x [T, in], w [hidden, in], residual, delta [T, hidden]
  { ops.MatMulToResidual(in, weight, out, out) } -> std::same_as<MatrixView<const typename Ops::Element>>;

  // q = x * wq^T, k = x * wk^T, v = x * wv^T, as MatMul. The three outputs lie one behind the other, and how their
  // numbers lie in that memory is the op set's own affair: only RopeAndStoreKv and PagedAttention read them.
  {ops.ProjectQkv(in, weight, weight, weight, out, out, out)};

  // Rotates the first rotary_dim dims of each head of q (in place) and k, then stores k and v in the KV cache of
  // `layer` at slot_mapping[t]. Half-split pairs (j, j + rotary_dim / 2), j < rotary_dim / 2, by the angle position *
  // theta^(-2 j / rotary_dim), computed in fp32; the other dims pass through.
  //   q    [T, H * D]
  //   k, v [T, G * D]
  {ops.RopeAndStoreKv(view, layer, out, in, in)};

  // out[t, h] = sum_p softmax_p(q[t, h] . K[p, g] / sqrt(D)) V[p, g] over positions p = 0 .. positions[t] of the row's
  // own sequence, read through its blocks; g = h / (H / G). Ragged: prompt chunks and single decode rows in one call.
  //   q, out [T, H * D]; out may not alias q
  {ops.PagedAttention(view, layer, in, out)};

  // x = max(x, 0)^2, in place.   x [T, intermediate]
  {ops.SquaredRelu(out)};

  // out[r, :] = x[rows[r], :] for the out.rows rows.   x [T, hidden], out [R, hidden], rows in host memory
  {ops.GatherRows(in, rows, out)};

  // outputs[r] from logits[r]: a token by sampler.h, or a target's logprob. result_rows[r] is row first_row + r of the
  // batch; the token is remembered for the next Upload and appended to the row's history slot. Overwrites logits.
  //   logits [R, V] fp32
  // A row with a logit that is not finite has failed = true; others are not affected.
  {ops.Sample(logits, result_rows, first_row, outputs)};

  // Waits until every op called for the oldest step not waited for is done and its outputs are filled.
  // Error: INTERNAL when the device failed.
  { ops.Wait() } -> std::same_as<absl::Status>;
};

// An op set that can replay the forward pass of some batches as one piece of work. It names the batches once, at start;
// for each, the runner runs Forward twice: after PrepareStep (which settles what ops settle on first use) and between
// BeginRecording and EndRecording, where ops are noted and not run. Later, Replay(view) enqueues the recorded pass and
// returns true if `view`, from Upload, has one; else Forward has to be called.
template <typename Ops>
concept RecordingOpSet = OpSet<Ops> && requires(Ops ops, const BatchView& view) {
  { *ops.StepsToRecord().begin() } -> std::convertible_to<BatchView>;
  {ops.PrepareStep(view)};
  {ops.BeginRecording(view)};
  {ops.EndRecording(view)};
  { ops.Replay(view) } -> std::same_as<bool>;
};

}  // namespace minitron::engine
