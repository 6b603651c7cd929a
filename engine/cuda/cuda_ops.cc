#include "engine/cuda/cuda_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/cuda/device_weights.h"

namespace minitron::engine::cuda {
namespace {

absl::Status CheckShape(const char* name, int64_t value, bool good, const char* limit) {
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("the cuda backend has no kernel for ", name, " ", value, ": ", limit));
}

}  // namespace

absl::Status CudaOps::CheckShapes(const NemotronConfig& config, const RunnerLimits& limits) {
  const auto multiple_of_8 = [](int64_t value) { return value % 8 == 0; };
  RETURN_IF_ERROR(
      CheckShape("head_dim", config.head_dim, config.head_dim == 64 || config.head_dim == 128, "64 or 128"));
  RETURN_IF_ERROR(CheckShape("query heads per key/value head", config.group_size(),
                             config.group_size() >= 1 && config.group_size() <= kMaxGroupSize, "1 to 8"));
  RETURN_IF_ERROR(CheckShape("hidden_size", config.hidden_size,
                             multiple_of_8(config.hidden_size) && config.hidden_size <= kMaxNormCols,
                             "a multiple of 8 up to 24576"));
  RETURN_IF_ERROR(CheckShape("intermediate_size", config.intermediate_size, multiple_of_8(config.intermediate_size),
                             "a multiple of 8"));
  RETURN_IF_ERROR(CheckShape("rotary_dim", config.rotary_dim,
                             config.rotary_dim % 2 == 0 && config.rotary_dim <= config.head_dim,
                             "even, at most head_dim"));
  RETURN_IF_ERROR(CheckShape("vocab_size", config.vocab_size, config.vocab_size <= kMaxSamplerVocab, "at most 524288"));
  return CheckShape("block_size", limits.block_size, (limits.block_size & (limits.block_size - 1)) == 0,
                    "a power of two");
}

absl::StatusOr<std::unique_ptr<CudaOps>> CudaOps::Create(const NemotronConfig& config, const RunnerLimits& limits,
                                                         std::unique_ptr<cuda::MatMul> matmul,
                                                         const CudaOpsOptions& options) {
  RETURN_IF_ERROR(CheckShapes(config, limits));
  std::unique_ptr<CudaOps> ops(new CudaOps(config, limits, std::move(matmul), options));
  RETURN_IF_ERROR(ops->AllocateAll());
  return ops;
}

CudaOps::CudaOps(const NemotronConfig& config, const RunnerLimits& limits, std::unique_ptr<cuda::MatMul> matmul,
                 const CudaOpsOptions& options)
    : config_(config),
      limits_(limits),
      options_(options),
      matmul_(std::move(matmul)),
      walks_(2 * static_cast<size_t>(limits.max_num_sequences)) {
  while ((1 << block_shift_) < limits.block_size) ++block_shift_;
}

CudaOps::~CudaOps() {
  if (stream_.get() != nullptr) cudaStreamSynchronize(stream_.get());
}

template <typename T>
absl::Status CudaOps::AllocateInto(DeviceBuffer<T>& buffer, int64_t count, const char* name) {
  absl::StatusOr<DeviceBuffer<T>> allocated = DeviceBuffer<T>::Allocate(count);
  const int64_t num_bytes = count * static_cast<int64_t>(sizeof(T));
  if (!allocated.ok()) {
    return absl::Status(allocated.status().code(),
                        absl::StrCat(allocated.status().message(), " for ", num_bytes, " bytes of ", name));
  }
  buffer = *std::move(allocated);
  return absl::OkStatus();
}

template <typename T>
DeviceBuffer<T> CudaOps::AllocateOrFail(int64_t count, const char* name) {
  DeviceBuffer<T> buffer;
  if (status_.ok()) Check(AllocateInto(buffer, count, name));
  return buffer;
}
template DeviceBuffer<Bf16> CudaOps::AllocateOrFail<Bf16>(int64_t, const char*);
template DeviceBuffer<float> CudaOps::AllocateOrFail<float>(int64_t, const char*);

// A step samples one row per sequence, each with a mask at most, and refills at most one history per sequence.
SampleLayout CudaOps::LargestSampleLayout() const {
  const int64_t sequences = limits_.max_num_sequences;
  const int64_t edits = kMaxLogitBiases + kMaxStopTokens + static_cast<int64_t>(config_.eos_token_ids.size());
  return SampleLayout(MaxResults(), sequences * edits, sequences * limits_.max_context_tokens,
                      sequences * MaskWords(config_.vocab_size));
}

template <typename Visit>
absl::Status CudaOps::VisitBuffers(const Visit& visit) {
  const bool fp8 = limits_.kv_cache_type == KvCacheType::kFp8;
  const int64_t cache_rows = config_.num_layers * CacheRowsPerLayer();
  const int64_t cache_bytes = cache_rows * config_.head_dim * (fp8 ? 1 : 2);
  RETURN_IF_ERROR(visit(keys_, cache_bytes, "KV cache"));
  RETURN_IF_ERROR(visit(values_, cache_bytes, "KV cache"));
  if (fp8) {
    RETURN_IF_ERROR(visit(key_exponents_, cache_rows, "KV cache"));
    RETURN_IF_ERROR(visit(value_exponents_, cache_rows, "KV cache"));
  }
  RETURN_IF_ERROR(visit(cosines_, RotaryTableSize(), "rotary tables"));
  RETURN_IF_ERROR(visit(sines_, RotaryTableSize(), "rotary tables"));
  const int64_t max_items = int64_t{limits_.max_num_sequences} * MaxChunks();
  const int64_t partial = PartialFloats(config_.num_key_value_heads, config_.head_dim);
  RETURN_IF_ERROR(visit(partials_, max_items * partial, "attention partials"));
  const int blocks_per_sequence = (limits_.max_context_tokens + limits_.block_size - 1) / limits_.block_size;
  const ForwardCounts most{.rows = limits_.max_num_tokens,
                           .sequences = limits_.max_num_sequences,
                           .items = static_cast<int>(max_items),
                           .merge_rows = limits_.max_num_sequences,
                           .tiles = limits_.max_num_tokens,
                           .block_ids = limits_.max_num_sequences * (blocks_per_sequence + 1)};
  RETURN_IF_ERROR(visit(forward_arrays_, ForwardLayout(most).end, "step arrays"));
  RETURN_IF_ERROR(visit(sample_arrays_, LargestSampleLayout().end, "step arrays"));
  const int64_t rows = LogitsRows(config_, limits_);
  const int64_t vocab = config_.vocab_size, tiles = NumSampleTiles(config_.vocab_size);
  RETURN_IF_ERROR(visit(states_, rows * SampleStateBytes(), "sampler"));
  RETURN_IF_ERROR(visit(edited_, rows * vocab, "sampler"));
  RETURN_IF_ERROR(visit(bin_masses_, rows * kRadixBins, "sampler"));
  RETURN_IF_ERROR(visit(bin_counts_, rows * kRadixBins, "sampler"));
  RETURN_IF_ERROR(visit(tile_masses_, rows * tiles, "sampler"));
  RETURN_IF_ERROR(visit(tile_tops_, rows * tiles * kMaxTopLogprobs, "sampler"));
  RETURN_IF_ERROR(visit(history_, int64_t{2} * limits_.max_num_sequences * vocab, "token histories"));
  RETURN_IF_ERROR(visit(result_tokens_, MaxResults(), "results"));
  RETURN_IF_ERROR(visit(outputs_, MaxResults(), "results"));
  return visit(top_, int64_t{MaxResults()} * kMaxTopLogprobs, "results");
}

std::vector<MemoryUse> CudaOps::Requirements(const NemotronConfig& config, const RunnerLimits& limits) {
  CudaOps nothing(config, limits, nullptr, {});
  std::vector<MemoryUse> uses;
  const absl::Status counted = nothing.VisitBuffers([&uses](const auto& buffer, int64_t count, const char* name) {
    AddUse(uses, name, count * static_cast<int64_t>(sizeof(*buffer.data())));
    return absl::OkStatus();
  });
  CHECK(counted.ok());
  return uses;
}

absl::Status CudaOps::AllocateAll() {
  ASSIGN_OR_RETURN(stream_, CreateStream());
  RETURN_IF_ERROR(VisitBuffers(
      [this](auto& buffer, int64_t count, const char* name) { return AllocateInto(buffer, count, name); }));
  RETURN_IF_ERROR(UploadRopeTables());
  RETURN_IF_ERROR(AllocateSlots());
  const auto clear = [this](auto& buffer) {
    return ToStatus(cudaMemsetAsync(buffer.data(), 0, buffer.size() * sizeof(*buffer.data()), stream_.get()), "memset");
  };
  RETURN_IF_ERROR(clear(bin_masses_));
  RETURN_IF_ERROR(clear(bin_counts_));
  RETURN_IF_ERROR(clear(history_));
  return ToStatus(cudaStreamSynchronize(stream_.get()), "stream");
}

absl::Status CudaOps::AllocateSlots() {
  const int64_t results = int64_t{MaxResults()} * (sizeof(SampleOutput) + kMaxTopLogprobs * sizeof(TopLogprob));
  for (Slot& slot : slots_) {
    ASSIGN_OR_RETURN(slot.forward, PinnedBuffer::Allocate(forward_arrays_.size()));
    ASSIGN_OR_RETURN(slot.sample, PinnedBuffer::Allocate(sample_arrays_.size()));
    ASSIGN_OR_RETURN(slot.results, PinnedBuffer::Allocate(results));
    ASSIGN_OR_RETURN(slot.done, CreateEvent());
  }
  return absl::OkStatus();
}

absl::Status CudaOps::UploadRopeTables() {
  // fp32 throughout, as in Hugging Face: the rounding of a large angle is part of the model.
  const int half = config_.rotary_dim / 2;
  const int64_t count = RotaryTableSize();
  ASSIGN_OR_RETURN(const PinnedBuffer staging, PinnedBuffer::Allocate(2 * count * static_cast<int64_t>(sizeof(float))));
  auto* cosines = reinterpret_cast<float*>(staging.data());
  float* sines = cosines + count;
  for (int j = 0; j < half; ++j) {
    const float exponent = static_cast<float>(2 * j) / static_cast<float>(config_.rotary_dim);
    const float inverse_frequency = 1.0f / std::pow(config_.rope_theta, exponent);
    for (int position = 0; position < limits_.max_context_tokens; ++position) {
      const float angle = static_cast<float>(position) * inverse_frequency;
      cosines[int64_t{position} * half + j] = std::cos(angle);
      sines[int64_t{position} * half + j] = std::sin(angle);
    }
  }
  const size_t num_bytes = static_cast<size_t>(count) * sizeof(float);
  const auto copy = [&](float* to, const float* from) {
    return ToStatus(cudaMemcpyAsync(to, from, num_bytes, cudaMemcpyHostToDevice, stream_.get()), "copy to device");
  };
  RETURN_IF_ERROR(copy(cosines_.data(), cosines));
  RETURN_IF_ERROR(copy(sines_.data(), sines));
  return ToStatus(cudaStreamSynchronize(stream_.get()), "stream");  // before the staging memory goes
}

void CudaOps::Check(const absl::Status& status) {
  if (status_.ok()) status_ = status;
}
void CudaOps::Check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) Check(ToStatus(error, what));
}

void CudaOps::Embed(const BatchView& batch, const WeightView& embedding, Matrix out) {
  if (!status_.ok()) return;
  CHECK(embedding.dtype == DType::kBf16 && out.rows == batch.num_tokens && out.cols == embedding.cols);
  Check(CopyRows(static_cast<const Bf16*>(embedding.data), batch.token_ids, result_tokens_.data(),
                 static_cast<int>(out.rows), static_cast<int>(out.cols), out.data, Launching()),
        "embed");
}

void CudaOps::AddLayerNorm1p(Matrix residual, ConstMatrix delta, const WeightView& weight, const WeightView& bias,
                             float eps, Matrix out) {
  if (!status_.ok()) return;
  CHECK(out.rows == residual.rows && out.cols == residual.cols && delta.data == nullptr);  // see MatMulToResidual
  CHECK(weight.dtype == DType::kF32 && bias.dtype == DType::kF32 && weight.size() == residual.cols);
  Fp8Rows coded;
  if (options_.fp8_products) coded = RowsForFp8({out.data, out.rows, out.cols});
  if (!status_.ok()) return;
  Check(LayerNorm1p(residual.data, static_cast<const float*>(weight.data), static_cast<const float*>(bias.data), eps,
                    static_cast<int>(residual.rows), static_cast<int>(residual.cols), out.data, Launching(), coded),
        "norm");
  if (options_.fp8_products) coded_ = out.data;
}

// The next place for activations in E4M3, which is the last one's: what lies there is lost.
Fp8Rows CudaOps::RowsForFp8(ConstMatrix x) {
  coded_ = nullptr;
  absl::StatusOr<Fp8Rows> rows = matmul_->RowsForFp8(static_cast<int>(x.rows), static_cast<int>(x.cols));
  Check(rows.status());
  return rows.ok() ? *rows : Fp8Rows{};
}

// x in E4M3: as the kernel that made x left it there, or brought to it now.
Fp8Matrix CudaOps::InFp8(ConstMatrix x) {
  const bool is_coded = coded_ == x.data;
  const Fp8Rows rows = RowsForFp8(x);
  if (status_.ok() && !is_coded) {
    Check(
        QuantizeRows(x.data, Activation::kNone, static_cast<int>(x.rows), static_cast<int>(x.cols), rows, Launching()),
        "quantize rows");
  }
  return {rows.codes, rows.scales};
}

void CudaOps::Multiply(ConstMatrix x, const WeightView& w, Store store, Matrix out) {
  if (!status_.ok()) return;
  CHECK(x.cols == w.cols && out.cols == w.rows && out.rows == x.rows);
  const int rows = static_cast<int>(x.rows), outs = static_cast<int>(w.rows), depth = static_cast<int>(w.cols);
  if (w.dtype == DType::kE4m3) {
    const Fp8Matrix coded = InFp8(x), matrix{static_cast<const uint8_t*>(w.data), w.scales};
    if (status_.ok()) Check(matmul_->Run(coded, matrix, rows, outs, depth, store, out.data, stream_.get()));
    return;
  }
  if (!IsTiles(w.dtype)) {
    CHECK(w.dtype == DType::kBf16);
    Check(matmul_->Run(x.data, static_cast<const Bf16*>(w.data), rows, outs, depth, store, out.data, stream_.get()));
    return;
  }
  Check(QuantizedMatMul(FormatOf(w.dtype), x.data, static_cast<const unsigned char*>(w.data), rows, outs, depth, store,
                        out.data, Launching()),
        "quantized product");
}

void CudaOps::MatMul(ConstMatrix x, const WeightView& w, Matrix out) { Multiply(x, w, Store::kReplace, out); }

CudaOps::ConstMatrix CudaOps::MatMulToResidual(ConstMatrix x, const WeightView& w, Matrix residual, Matrix delta) {
  CHECK(residual.rows == delta.rows && residual.cols == delta.cols);
  Multiply(x, w, Store::kAdd, residual);
  return {nullptr, delta.rows, delta.cols};
}

void CudaOps::MatMul(ConstMatrix x, const WeightView& w, MatrixView<float> out) {
  if (!status_.ok()) return;
  CHECK(x.cols == w.cols && out.cols == w.rows && out.rows == x.rows);
  const int rows = static_cast<int>(x.rows), outs = static_cast<int>(w.rows), depth = static_cast<int>(w.cols);
  if (!IsTiles(w.dtype)) {
    CHECK(w.dtype == DType::kBf16);
    Check(matmul_->Run(x.data, static_cast<const Bf16*>(w.data), rows, outs, depth, out.data, stream_.get()));
    return;
  }
  Check(QuantizedMatMul(FormatOf(w.dtype), x.data, static_cast<const unsigned char*>(w.data), rows, outs, depth,
                        out.data, Launching()),
        "quantized product");
}

void CudaOps::ProjectQkv(ConstMatrix x, const WeightView& wq, const WeightView& wk, const WeightView& wv, Matrix q,
                         Matrix k, Matrix v) {
  CHECK(DeviceWeights::Adjoin(wq, wk) && DeviceWeights::Adjoin(wk, wv));
  CHECK(k.data == q.data + q.rows * q.cols && v.data == k.data + k.rows * k.cols);
  const WeightView fused{wq.data, wq.dtype, wq.rows + wk.rows + wv.rows, wq.cols, wq.scales};
  Multiply(x, fused, Store::kReplace, Matrix{q.data, q.rows, q.cols + k.cols + v.cols});
}

KvCacheView CudaOps::CacheOf(int layer) const {
  const int64_t row = layer * CacheRowsPerLayer(), element = row * config_.head_dim;
  if (limits_.kv_cache_type == KvCacheType::kFp8) {
    const Fp8Cache fp8{keys_.data() + element, values_.data() + element, key_exponents_.data() + row,
                       value_exponents_.data() + row};
    return {nullptr, nullptr, config_.num_key_value_heads, block_shift_, fp8};
  }
  return {reinterpret_cast<Bf16*>(keys_.data()) + element, reinterpret_cast<Bf16*>(values_.data()) + element,
          config_.num_key_value_heads, block_shift_};
}

void CudaOps::RopeAndStoreKv(const BatchView& batch, int layer, Matrix q, ConstMatrix k, ConstMatrix v) {
  if (!status_.ok()) return;
  CHECK(q.rows == batch.num_tokens && k.rows == q.rows && v.rows == q.rows && q.cols == config_.query_width());
  const RopeParams params{q.data,           q.data + q.cols,    q.data + q.cols + k.cols,
                          batch.positions,  batch.slot_mapping, cosines_.data(),
                          sines_.data(),    CacheOf(layer),     config_.num_attention_heads,
                          config_.head_dim, config_.rotary_dim, ProjectionWidth(),
                          ProjectionWidth()};
  Check(cuda::RopeAndStoreKv(params, static_cast<int>(q.rows), Launching()), "rope");
}

void CudaOps::PagedAttention(const BatchView& batch, int layer, ConstMatrix q, Matrix out) {
  if (!status_.ok()) return;
  CHECK(q.rows == batch.num_tokens && out.rows == q.rows && out.cols == q.cols);
  constexpr float kLog2E = 1.44269504f;
  const AttentionParams params{
      q.data,           out.data,          CacheOf(layer),
      batch.block_ids,  batch.block_start, config_.group_size(),
      config_.head_dim, ProjectionWidth(), kLog2E / std::sqrt(static_cast<float>(config_.head_dim))};
  if (counts_.items > 0) {
    // Blocks that find no work in a recorded step are launched all the same: as many as fit on the device, no more.
    const int max_blocks = std::min(counts_.items, ResidentDecodeItems(params, options_.num_processors));
    const int max_merge_rows = std::min(counts_.merge_rows, ResidentMergeRows(params, options_.num_processors));
    Check(DecodeAttention(params, ForwardArray<DecodeItem>(layout_.items), ForwardArray<MergeRow>(layout_.merge_rows),
                          ForwardArray<DecodeCounts>(layout_.counts), partials_.data(), max_blocks, max_merge_rows,
                          Launching()),
          "decode attention");
  }
  if (counts_.tiles > 0) {
    Check(PrefillAttention(params, ForwardArray<PrefillTile>(layout_.tiles), counts_.tiles, stream_.get()),
          "prefill attention");
  }
}

void CudaOps::SquaredRelu(Matrix x) {
  if (!status_.ok()) return;
  if (!options_.fp8_products) {
    Check(cuda::SquaredRelu(x.data, x.rows * x.cols, Launching()), "squared relu");
    return;
  }
  const Fp8Rows coded = RowsForFp8({x.data, x.rows, x.cols});
  if (!status_.ok()) return;
  Check(QuantizeRows(x.data, Activation::kSquaredRelu, static_cast<int>(x.rows), static_cast<int>(x.cols), coded,
                     Launching()),
        "squared relu");
  coded_ = x.data;
}

static_assert(OpSet<CudaOps>);
static_assert(RecordingOpSet<CudaOps>);

}  // namespace minitron::engine::cuda
