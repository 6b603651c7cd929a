// The sampler's first kernels: one pass over the raw logits with masks, penalties, biases and bans, then the row's
// verdict; and the token histories penalties need. Calls the others in order.
#include "engine/cuda/sampler.cuh"

namespace minitron::engine::cuda {
namespace {

KERNEL(kSampleThreads)
AddToHistoryKernel(const HistoryToken* tokens, int num_tokens, uint32_t* history, int vocab) {
  const int i = static_cast<int>(BlockIndex().x) * kSampleThreads + static_cast<int>(ThreadIndex().x);
  if (i >= num_tokens) return;
  uint32_t* entry = history + int64_t{tokens[i].slot} * vocab + tokens[i].token;
  if (tokens[i].is_output != 0) {
    AtomicAdd(entry, 1u);
  } else {
    AtomicOr(entry, kInPrompt);
  }
}

constexpr uint32_t kMinusInfinity = 0xFF800000u;

DEVICE float Penalised(float logit, const SampleRow& row, uint32_t seen) {
  if (seen == 0) return logit;
  logit = logit > 0.0f ? logit / row.repetition_penalty : logit * row.repetition_penalty;
  const uint32_t output_count = seen & ~kInPrompt;
  if (output_count > 0) {
    logit -= row.frequency_penalty * static_cast<float>(output_count);
    logit -= row.presence_penalty;
  }
  return logit;
}

// Grid (tiles, rows): the best raw logit, whether all are finite, and the edited logits with their best.
KERNEL(kSampleThreads) ReadLogitsKernel(SampleCall call) {
  uint64_t* scratch = reinterpret_cast<uint64_t*>(SharedMemory());
  const int r = static_cast<int>(BlockIndex().y);
  const SampleRow row = call.rows[r];
  SampleState* state = &call.memory.states[r];
  const float* logits = call.logits + static_cast<int64_t>(r) * call.vocab;
  float* edited = call.memory.edited + static_cast<int64_t>(r) * call.vocab;
  const bool is_edited = IsEdited(row);
  uint64_t best = 0;
  uint64_t not_finite = 0;
  float x[kPerThread];
  LoadTile(logits, call.vocab, x);
  UNROLL
  for (int i = 0; i < kPerThread; ++i) {
    const int token = TileToken(i);
    if (token >= call.vocab) break;
    const float logit = x[i];
    if (NotFinite(logit)) not_finite = 1;
    const uint64_t key = KeyOf(logit, token);
    best = key > best ? key : best;
    if (is_edited) {
      const uint32_t seen =
          row.uses_history != 0 ? call.history[static_cast<int64_t>(row.history_slot) * call.vocab + token] : 0;
      edited[token] = Penalised(logit, row, seen);
    }
  }
  best = BlockMax(best, scratch);
  not_finite = BlockMax(not_finite, scratch);
  if (ThreadIndex().x == 0) {
    AtomicMax(&state->raw_best, best);
    if (not_finite != 0) AtomicOr(&state->not_finite, 1u);
  }
  if (is_edited) {
    const int first = static_cast<int>(BlockIndex().x) * kSampleTile;
    for (int e = static_cast<int>(ThreadIndex().x); e < row.num_edits; e += kSampleThreads) {
      const LogitEdit edit = call.edits[row.first_edit + e];
      if (edit.token >= first && edit.token < first + kSampleTile) edited[edit.token] += edit.bias;
    }
    SyncThreads();
    const uint32_t* mask = row.mask >= 0 ? call.masks + row.mask * MaskWords(call.vocab) : nullptr;
    best = 0;
    UNROLL_BY(4)
    for (int i = 0; i < kPerThread; ++i) {
      const int token = TileToken(i);
      if (token >= call.vocab) break;
      if (mask != nullptr && (mask[token / 32] >> (token % 32) & 1) == 0) {
        edited[token] = BitsToFloat(kMinusInfinity);
        continue;
      }
      const uint64_t key = KeyOf(edited[token], token);
      best = key > best ? key : best;
    }
    best = BlockMax(best, scratch);
  }
  if (ThreadIndex().x == 0) AtomicMax(&state->best, best);
}

// One thread per row: failed or not, and the greedy token.
KERNEL(kSampleThreads) JudgeRowsKernel(SampleCall call) {
  const int r = static_cast<int>(BlockIndex().x) * kSampleThreads + static_cast<int>(ThreadIndex().x);
  if (r >= call.num_rows) return;
  const SampleRow row = call.rows[r];
  SampleState* state = &call.memory.states[r];
  // Every token banned, or penalties beyond fp32: there is nothing to choose from.
  const bool nothing_left = row.target < 0 && (state->best == 0 || NotFinite(LogitOf(state->best)));
  state->failed = state->not_finite != 0 || nothing_left ? 1u : 0u;
  state->token = row.target >= 0 ? row.target : state->failed != 0 ? 0 : TokenOf(state->best);
}

}  // namespace

cudaError_t AddToHistory(const HistoryToken* tokens, int num_tokens, uint32_t* history, int vocab,
                         cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((num_tokens + kSampleThreads - 1) / kSampleThreads);
  return Launch(&AddToHistoryKernel, {blocks}, {kSampleThreads}, 0, stream, tokens, num_tokens, history, vocab);
}

int64_t SampleStateBytes() { return sizeof(SampleState); }

cudaError_t SampleLogits(const SampleCall& call, cudaStream_t stream) {
  if (call.vocab > kMaxSamplerVocab) return cudaErrorInvalidValue;
  const auto rows = static_cast<unsigned>(call.num_rows);
  const Dim3 grid = {static_cast<unsigned>(NumSampleTiles(call.vocab)), rows};
  cudaError_t error = cudaMemsetAsync(call.memory.states, 0, sizeof(SampleState) * rows, stream);
  if (error != cudaSuccess) return error;
  error = Launch(&ReadLogitsKernel, grid, {kSampleThreads}, kSampleWarps * sizeof(uint64_t), stream, call);
  if (error != cudaSuccess) return error;
  error = Launch(&JudgeRowsKernel, {(rows + kSampleThreads - 1) / kSampleThreads}, {kSampleThreads}, 0, stream, call);
  if (error != cudaSuccess) return error;
  if (call.needs.top_k || call.needs.top_p) {
    error = FilterLogits(call, stream);
    if (error != cudaSuccess) return error;
  }
  if (call.needs.draws) {
    error = DrawTokens(call, stream);
    if (error != cudaSuccess) return error;
  }
  return StoreSamples(call, stream);
}

}  // namespace minitron::engine::cuda
