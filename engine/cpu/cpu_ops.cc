#include "engine/cpu/cpu_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "engine/base/check.h"
#include "engine/convert.h"
#include "engine/cpu/cpu_topology.h"
#include "engine/cpu/layer_norm.h"
#include "engine/cpu/matmul.h"
#include "engine/cpu/panel_matmul.h"
#include "engine/cpu/squared_relu.h"

namespace minitron::engine::cpu {
namespace {

// Rows per range so that a range has about 16 Ki elements: less is not worth a wake-up.
int64_t RowGrain(int64_t cols) { return std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(1, cols)); }

}  // namespace

CpuOps::CpuOps(const NemotronConfig& config, const RunnerLimits& limits, int num_threads)
    : group_size_(config.group_size()),
      rotary_dim_(config.rotary_dim),
      pool_(num_threads, ThreadCpusHere(num_threads)),
      cache_({.num_layers = config.num_layers,
              .num_blocks = limits.num_kv_blocks,
              .num_heads = config.num_key_value_heads,
              .head_dim = config.head_dim,
              .block_size = limits.block_size,
              .type = limits.kv_cache_type}),
      gain_(config.hidden_size),
      bias_(config.hidden_size),
      rotated_keys_(int64_t{limits.max_num_tokens} * config.key_value_width()),
      attention_scratch_(config.group_size(), config.head_dim, limits.max_context_tokens, num_threads),
      quantized_rows_(limits.max_num_tokens,
                      std::max({config.hidden_size, config.query_width(), config.intermediate_size}),
                      limits.activation_type == ActivationType::kBf16),
      histories_(2 * static_cast<size_t>(limits.max_num_sequences)),
      sampler_scratch_(num_threads) {
  CHECK(rotary_dim_ % 2 == 0 && rotary_dim_ <= config.head_dim);
  // fp32 throughout, as in Hugging Face: the rounding of a large angle is part of the model.
  const int half = rotary_dim_ / 2;
  cosines_.resize(static_cast<size_t>(limits.max_context_tokens) * half);
  sines_.resize(cosines_.size());
  for (int j = 0; j < half; ++j) {
    const float exponent = static_cast<float>(2 * j) / static_cast<float>(rotary_dim_);
    const float inverse_frequency = 1.0f / std::pow(config.rope_theta, exponent);
    for (int position = 0; position < limits.max_context_tokens; ++position) {
      const float angle = static_cast<float>(position) * inverse_frequency;
      cosines_[static_cast<size_t>(position) * half + j] = std::cos(angle);
      sines_[static_cast<size_t>(position) * half + j] = std::sin(angle);
    }
  }
}

BatchView CpuOps::Upload(const Batch& batch) {
  if (!std::exchange(caller_placed_, true)) pool_.PlaceCaller();  // the engine thread, at its first step
  token_ids_ = batch.token_ids;
  for (TokenId& token : token_ids_) {
    if (!IsFromPreviousResult(token)) continue;
    const size_t row = static_cast<size_t>(PreviousResultRow(token));
    CHECK(row < result_tokens_.size());
    token = result_tokens_[row];
  }
  result_tokens_.assign(batch.results.size(), 0);
  token_sequence_.resize(token_ids_.size());
  for (int s = 0; s < batch.num_sequences(); ++s) {
    std::fill(token_sequence_.begin() + batch.query_start[s], token_sequence_.begin() + batch.query_start[s + 1], s);
  }
  for (const HistoryReset& reset : batch.history_resets) histories_.at(reset.slot).Reset(reset);
  return {.num_tokens = batch.num_tokens(),
          .num_sequences = batch.num_sequences(),
          .token_ids = token_ids_.data(),
          .positions = batch.positions.data(),
          .slot_mapping = batch.slot_mapping.data(),
          .query_start = batch.query_start.data(),
          .block_start = batch.block_start.data(),
          .block_ids = batch.block_ids.data(),
          .kv_lens = batch.kv_lens.data()};
}

void CpuOps::Embed(const BatchView& batch, const WeightView& embedding, Matrix out) {
  CHECK(out.rows == batch.num_tokens && out.cols == embedding.cols);
  for (int64_t t = 0; t < out.rows; ++t) {
    CHECK(batch.token_ids[t] >= 0 && batch.token_ids[t] < embedding.rows);
    WeightsToFloat(embedding, batch.token_ids[t] * embedding.cols, embedding.cols, out.row(t));
  }
}

void CpuOps::AddLayerNorm1p(Matrix residual, ConstMatrix delta, const WeightView& weight, const WeightView& bias,
                            float eps, Matrix out) {
  const int64_t hidden = residual.cols;
  CHECK(out.rows == residual.rows && out.cols == hidden);
  CHECK(delta.data == nullptr || (delta.rows == residual.rows && delta.cols == hidden));
  CHECK(weight.size() == hidden && bias.size() == hidden && static_cast<size_t>(hidden) <= gain_.size());
  WeightsToFloat(weight, 0, hidden, gain_.data());
  WeightsToFloat(bias, 0, hidden, bias_.data());
  for (int64_t i = 0; i < hidden; ++i) gain_[i] += 1.0f;
  pool_.ParallelFor(residual.rows, RowGrain(hidden), [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      LayerNormRow(residual.row(t), delta.data == nullptr ? nullptr : delta.row(t), gain_.data(), bias_.data(), hidden,
                   eps, out.row(t));
    }
  });
}

void CpuOps::MatMul(ConstMatrix x, const WeightView& w, Matrix out) {
  if (IsPanels(w.dtype)) {
    PanelMatMul(pool_, x, {{.w = w, .out = out}}, quantized_rows_);
  } else {
    cpu::MatMul(pool_, x, w, out);
  }
}

void CpuOps::RotateHeads(float* heads, int num_heads, int32_t position) const {
  const int half = rotary_dim_ / 2;
  const int head_dim = cache_.shape().head_dim;
  const float* cosine = cosines_.data() + static_cast<int64_t>(position) * half;
  const float* sine = sines_.data() + static_cast<int64_t>(position) * half;
  for (int h = 0; h < num_heads; ++h) {
    float* head = heads + int64_t{h} * head_dim;
    for (int j = 0; j < half; ++j) {
      const float low = head[j];
      const float high = head[j + half];
      head[j] = low * cosine[j] - high * sine[j];
      head[j + half] = high * cosine[j] + low * sine[j];
    }
  }
}

template <typename Element>
void CpuOps::StoreRow(int layer, int64_t slot, const float* keys, const float* values) {
  const KvCacheShape& shape = cache_.shape();
  const auto element = [](float value) {
    if constexpr (sizeof(Element) == 2) {
      return FloatToBf16(value);
    } else {
      return value;
    }
  };
  const int64_t block = slot / shape.block_size, offset = slot % shape.block_size;
  for (int h = 0; h < shape.num_heads; ++h, keys += shape.head_dim, values += shape.head_dim) {
    Element* key_column = cache_.KeyBlock<Element>(layer, block, h) + offset;
    Element* value_row = cache_.ValueBlock<Element>(layer, block, h) + offset * shape.head_dim;
    for (int d = 0; d < shape.head_dim; ++d) {
      key_column[int64_t{d} * shape.block_size] = element(keys[d]);
      value_row[d] = element(values[d]);
    }
  }
}

void CpuOps::ProjectQkv(ConstMatrix x, const WeightView& wq, const WeightView& wk, const WeightView& wv, Matrix q,
                        Matrix k, Matrix v) {
  if (IsPanels(wq.dtype) && wk.dtype == wq.dtype && wv.dtype == wq.dtype) {
    PanelMatMul(pool_, x, {{.w = wq, .out = q}, {.w = wk, .out = k}, {.w = wv, .out = v}}, quantized_rows_);
    return;
  }
  MatMul(x, wq, q);
  MatMul(x, wk, k);
  MatMul(x, wv, v);
}

void CpuOps::RopeAndStoreKv(const BatchView& batch, int layer, Matrix q, ConstMatrix k, ConstMatrix v) {
  const KvCacheShape& shape = cache_.shape();
  const int num_heads = shape.num_heads;
  CHECK(q.rows == batch.num_tokens && k.rows == q.rows && v.rows == q.rows);
  CHECK(q.cols == int64_t{num_heads} * group_size_ * shape.head_dim);
  CHECK(k.cols == int64_t{num_heads} * shape.head_dim && v.cols == k.cols);
  CHECK(rotated_keys_.size() >= k.rows * k.cols);
  pool_.ParallelFor(q.rows, RowGrain(q.cols + 2 * k.cols), [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const int32_t position = batch.positions[t];
      RotateHeads(q.row(t), num_heads * group_size_, position);
      float* keys = rotated_keys_.data() + t * k.cols;
      std::copy_n(k.row(t), k.cols, keys);
      RotateHeads(keys, num_heads, position);
      if (shape.type == KvCacheType::kBf16) {
        StoreRow<uint16_t>(layer, batch.slot_mapping[t], keys, v.row(t));
      } else {
        StoreRow<float>(layer, batch.slot_mapping[t], keys, v.row(t));
      }
    }
  });
}

void CpuOps::PagedAttention(const BatchView& batch, int layer, ConstMatrix q, Matrix out) {
  cpu::PagedAttention(pool_, batch, token_sequence_.data(), cache_, layer, group_size_, q, out, attention_scratch_);
}

void CpuOps::SquaredRelu(Matrix x) {
  pool_.ParallelFor(x.rows, RowGrain(x.cols), [&](int64_t begin, int64_t end, int) {
    SquaredReluRange(x.data + begin * x.cols, (end - begin) * x.cols);
  });
}

void CpuOps::GatherRows(ConstMatrix x, const int32_t* rows, Matrix out) {
  CHECK(x.cols == out.cols);
  for (int64_t r = 0; r < out.rows; ++r) {
    CHECK(rows[r] >= 0 && rows[r] < x.rows);
    std::copy_n(x.data + rows[r] * x.cols, x.cols, out.row(r));
  }
}

void CpuOps::Sample(Matrix logits, absl::Span<const ResultRow> rows, int first_row,
                    absl::Span<ResultRowOutput> outputs) {
  CHECK(static_cast<size_t>(logits.rows) == rows.size() && rows.size() == outputs.size());
  CHECK(first_row + rows.size() <= result_tokens_.size());
  pool_.ParallelFor(logits.rows, RowGrain(logits.cols), [&](int64_t begin, int64_t end, int thread) {
    for (int64_t r = begin; r < end; ++r) {
      const ResultRow& row = rows[r];
      const TokenHistory* history = row.history_slot == kNone ? nullptr : &histories_[row.history_slot];
      outputs[r] = ProcessRow(absl::MakeSpan(logits.row(r), logits.cols), row, history, sampler_scratch_[thread]);
    }
  });
  for (size_t r = 0; r < rows.size(); ++r) {
    result_tokens_[first_row + r] = outputs[r].token_id;
    const bool sampled = rows[r].target == kNone && !outputs[r].failed;
    if (sampled && rows[r].history_slot != kNone) histories_[rows[r].history_slot].AppendOutput(outputs[r].token_id);
  }
}

static_assert(OpSet<CpuOps>);

}  // namespace minitron::engine::cpu
