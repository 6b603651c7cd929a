// Logprobs, ranks and the most likely tokens, all of the raw logits; then the outputs and the token histories.
#include "engine/cuda/sampler.cuh"

namespace minitron::engine::cuda {
namespace {

// Grid (tiles, rows), rows that want logprobs: the log-sum-exp's sum, the chosen token's rank, the tile's best tokens.
KERNEL(kSampleThreads) TileLogprobsKernel(SampleCall call) {
  uint64_t* scratch = reinterpret_cast<uint64_t*>(SharedMemory());
  const int r = static_cast<int>(BlockIndex().y);
  const SampleRow row = call.rows[r];
  SampleState* state = &call.memory.states[r];
  if (row.num_top_logprobs < 0 || state->failed != 0) return;  // the whole block
  const float* logits = call.logits + static_cast<int64_t>(r) * call.vocab;
  const float best = LogitOf(state->raw_best);
  const uint64_t chosen = KeyOf(logits[state->token], state->token);
  uint64_t keys[kPerThread];
  uint64_t mass = 0, num_better = 0;
  UNROLL
  for (int i = 0; i < kPerThread; ++i) {
    const int token = TileToken(i);
    keys[i] = token < call.vocab ? KeyOf(logits[token], token) : 0;
    if (token < call.vocab) mass += Mass(Probability(logits[token], best, 1.0f));
    num_better += keys[i] > chosen ? 1 : 0;
  }
  mass = BlockTotal(mass, scratch);
  num_better = BlockTotal(num_better, scratch);
  if (ThreadIndex().x == 0) {
    AtomicAdd(&state->raw_mass, mass);
    AtomicAdd(&state->num_better, static_cast<uint32_t>(num_better));
  }
  uint64_t* tops = call.memory.tile_tops + (static_cast<int64_t>(r) * GridDim().x + BlockIndex().x) * kMaxTopLogprobs;
  uint64_t last = ~uint64_t{0};
  for (int n = 0; n < row.num_top_logprobs; ++n) {  // the best below the last
    uint64_t next = 0;
    UNROLL
    for (int i = 0; i < kPerThread; ++i) next = keys[i] < last && keys[i] > next ? keys[i] : next;
    last = BlockMax(next, scratch);
    if (ThreadIndex().x == 0) tops[n] = last;
  }
}

// One block per row.
KERNEL(kSampleThreads) StoreOutputKernel(SampleCall call, int num_tiles) {
  uint64_t* scratch = reinterpret_cast<uint64_t*>(SharedMemory());
  const int r = static_cast<int>(BlockIndex().x);
  const SampleRow row = call.rows[r];
  const SampleState state = call.memory.states[r];
  const bool with_logprobs = row.num_top_logprobs >= 0 && state.failed == 0;
  const float* logits = call.logits + static_cast<int64_t>(r) * call.vocab;
  const float best = LogitOf(state.raw_best);
  const float log_sum = with_logprobs ? Log(static_cast<double>(state.raw_mass) * 0x1.0p-44) : 0.0f;
  if (ThreadIndex().x == 0) {
    SampleOutput output = {state.token, static_cast<int32_t>(state.failed), 0.0f, 0};
    if (with_logprobs) {
      output.logprob = logits[state.token] - best - log_sum;
      output.rank = static_cast<int32_t>(state.num_better) + 1;
    }
    call.outputs[r] = output;
    call.result_tokens[r] = state.token;
    if (row.target < 0 && state.failed == 0 && row.history_slot >= 0) {
      AtomicAdd(&call.history[static_cast<int64_t>(row.history_slot) * call.vocab + state.token], 1u);
    }
  }
  if (!with_logprobs) return;  // the whole block
  const uint64_t* tops = call.memory.tile_tops + static_cast<int64_t>(r) * num_tiles * kMaxTopLogprobs;
  uint64_t last = ~uint64_t{0};
  for (int n = 0; n < row.num_top_logprobs; ++n) {
    uint64_t next = 0;
    for (int i = static_cast<int>(ThreadIndex().x); i < num_tiles * row.num_top_logprobs; i += kSampleThreads) {
      const uint64_t key = tops[i / row.num_top_logprobs * kMaxTopLogprobs + i % row.num_top_logprobs];
      next = key < last && key > next ? key : next;
    }
    last = BlockMax(next, scratch);
    if (ThreadIndex().x == 0) {
      TopLogprob top = {-1, 0.0f};  // fewer tokens than asked for
      if (last != 0) top = {TokenOf(last), LogitOf(last) - best - log_sum};
      call.top[static_cast<int64_t>(r) * kMaxTopLogprobs + n] = top;
    }
  }
}

}  // namespace

cudaError_t StoreSamples(const SampleCall& call, cudaStream_t stream) {
  const int num_tiles = NumSampleTiles(call.vocab);
  const auto rows = static_cast<unsigned>(call.num_rows);
  constexpr size_t kScratchBytes = kSampleWarps * sizeof(uint64_t);
  if (call.needs.logprobs) {
    const cudaError_t error = Launch(&TileLogprobsKernel, {static_cast<unsigned>(num_tiles), rows}, {kSampleThreads},
                                     kScratchBytes, stream, call);
    if (error != cudaSuccess) return error;
  }
  return Launch(&StoreOutputKernel, {rows}, {kSampleThreads}, kScratchBytes, stream, call, num_tiles);
}

}  // namespace minitron::engine::cuda
