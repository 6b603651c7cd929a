// CpuOps: the op set of ops.h on host memory, fp32 activations, weights in the checkpoint's type.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/cpu/aligned_buffer.h"
#include "engine/cpu/attention.h"
#include "engine/cpu/kv_cache.h"
#include "engine/cpu/quantize_rows.h"
#include "engine/cpu/thread_pool.h"
#include "engine/model_config.h"
#include "engine/model_runner_impl.h"
#include "engine/ops.h"
#include "engine/sampler.h"

namespace minitron::engine::cpu {

// Engine thread only. Every op has finished when it returns. Owns the KV cache, the workers and the token histories.
class CpuOps {
 public:
  static constexpr bool kAsynchronous = false;
  using Element = float;
  using Buffer = AlignedBuffer<float>;
  using FloatBuffer = AlignedBuffer<float>;
  using Matrix = MatrixView<float>;
  using ConstMatrix = MatrixView<const float>;

  CpuOps(const NemotronConfig& config, const RunnerLimits& limits, int num_threads);

  Buffer Allocate(int64_t count) { return Buffer(count); }
  FloatBuffer AllocateFloats(int64_t count) { return FloatBuffer(count); }

  BatchView Upload(const Batch& batch);
  void Embed(const BatchView& batch, const WeightView& embedding, Matrix out);
  void AddLayerNorm1p(Matrix residual, ConstMatrix delta, const WeightView& weight, const WeightView& bias, float eps,
                      Matrix out);
  void MatMul(ConstMatrix x, const WeightView& w, Matrix out);
  // Leaves the sum to the norm, which passes over the residual anyway.
  ConstMatrix MatMulToResidual(ConstMatrix x, const WeightView& w, Matrix residual, Matrix delta) {
    CHECK(residual.rows == delta.rows && residual.cols == delta.cols);
    MatMul(x, w, delta);
    return {delta.data, delta.rows, delta.cols};
  }
  void ProjectQkv(ConstMatrix x, const WeightView& wq, const WeightView& wk, const WeightView& wv, Matrix q, Matrix k,
                  Matrix v);
  void RopeAndStoreKv(const BatchView& batch, int layer, Matrix q, ConstMatrix k, ConstMatrix v);
  void PagedAttention(const BatchView& batch, int layer, ConstMatrix q, Matrix out);
  void SquaredRelu(Matrix x);
  void GatherRows(ConstMatrix x, const int32_t* rows, Matrix out);
  void Sample(Matrix logits, absl::Span<const ResultRow> rows, int first_row, absl::Span<ResultRowOutput> outputs);
  absl::Status Wait() { return absl::OkStatus(); }

  const KvCache& kv_cache() const { return cache_; }

 private:
  // Writes one row's rotated keys and its values into a slot.
  template <typename Element>
  void StoreRow(int layer, int64_t slot, const float* keys, const float* values);
  // Rotates the heads of one token row in place.
  void RotateHeads(float* heads, int num_heads, int32_t position) const;

  const int group_size_;
  const int rotary_dim_;
  ThreadPool pool_;
  bool caller_placed_ = false;
  KvCache cache_;
  std::vector<float> cosines_, sines_;  // [max_context, rotary_dim / 2]
  std::vector<float> gain_, bias_;      // [hidden]; of the norm at hand
  Buffer rotated_keys_;                 // [max_num_tokens, key_value_width]
  AttentionScratch attention_scratch_;
  QuantizedRowsBuffer quantized_rows_;  // [max_num_tokens, widest input of a matrix]

  std::vector<TokenId> token_ids_;               // [T], resolved
  std::vector<int32_t> token_sequence_;          // [T]
  std::vector<TokenId> result_tokens_;           // [R], of the latest step
  std::vector<TokenHistory> histories_;          // by history slot
  std::vector<SamplerScratch> sampler_scratch_;  // by thread
};

}  // namespace minitron::engine::cpu
