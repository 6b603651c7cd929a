// The draw: inverse CDF in id order over the tokens the filters kept. Their probability per tile, then the tile, then
// the token in it.
#include "engine/cuda/sampler.cuh"

namespace minitron::engine::cuda {
namespace {

// The probability of a token that is kept, else 0.
DEVICE uint64_t KeptMass(const SampleRow& row, const SampleState& state, float best, float logit, int token) {
  if (KeyOf(logit, token) < state.cut) return 0;
  const float probability = Probability(logit, best, row.temperature);
  return probability >= row.min_p ? Mass(probability) : 0;
}

// Grid (tiles, rows).
KERNEL(kSampleThreads) TileMassKernel(SampleCall call) {
  uint64_t* scratch = reinterpret_cast<uint64_t*>(SharedMemory());
  const int r = static_cast<int>(BlockIndex().y);
  const SampleRow row = call.rows[r];
  const SampleState state = call.memory.states[r];
  if (!IsDrawn(row) || state.failed != 0) return;  // the whole block
  const float* logits = SampledLogits(call, r);
  const float best = LogitOf(state.best);
  uint64_t mass = 0;
  float x[kPerThread];
  LoadTile(logits, call.vocab, x);
  UNROLL
  for (int i = 0; i < kPerThread; ++i) {
    if (TileToken(i) < call.vocab) mass += KeptMass(row, state, best, x[i], TileToken(i));
  }
  mass = BlockTotal(mass, scratch);
  if (ThreadIndex().x == 0) {
    call.memory.tile_masses[static_cast<int64_t>(r) * GridDim().x + BlockIndex().x] = mass;
  }
}

// One block per row.
KERNEL(kSampleThreads) PickTokenKernel(SampleCall call, int num_tiles) {
  uint64_t* scratch = reinterpret_cast<uint64_t*>(SharedMemory());
  const int r = static_cast<int>(BlockIndex().x);
  const SampleRow row = call.rows[r];
  const SampleState state = call.memory.states[r];
  if (!IsDrawn(row) || state.failed != 0) return;  // the whole block
  const uint64_t* masses = call.memory.tile_masses + static_cast<int64_t>(r) * num_tiles;
  uint64_t total = 0;
  for (int tile = 0; tile < num_tiles; ++tile) total += masses[tile];
  // The first token at which the running sum exceeds the threshold; rounding must not lift it to the whole sum.
  uint64_t threshold = static_cast<uint64_t>(row.uniform * static_cast<double>(total));
  if (threshold >= total) threshold = total - 1;
  int tile = 0;
  uint64_t before = 0;
  while (tile < num_tiles - 1 && before + masses[tile] <= threshold) before += masses[tile++];
  const float* logits = SampledLogits(call, r);
  const float best = LogitOf(state.best);
  const int first = tile * kSampleTile + static_cast<int>(ThreadIndex().x) * kPerThread;  // neighbours to one thread
  uint64_t mass[kPerThread];
  uint64_t sum = 0;
  UNROLL
  for (int i = 0; i < kPerThread; ++i) {
    mass[i] = first + i < call.vocab ? KeptMass(row, state, best, logits[first + i], first + i) : 0;
    sum += mass[i];
  }
  uint64_t running = before + BlockSumBefore(sum, scratch);
  UNROLL
  for (int i = 0; i < kPerThread; ++i) {
    if (running <= threshold && threshold < running + mass[i]) call.memory.states[r].token = first + i;
    running += mass[i];
  }
}

}  // namespace

cudaError_t DrawTokens(const SampleCall& call, cudaStream_t stream) {
  const int num_tiles = NumSampleTiles(call.vocab);
  const auto rows = static_cast<unsigned>(call.num_rows);
  constexpr size_t kScratchBytes = kSampleWarps * sizeof(uint64_t);
  const cudaError_t error =
      Launch(&TileMassKernel, {static_cast<unsigned>(num_tiles), rows}, {kSampleThreads}, kScratchBytes, stream, call);
  if (error != cudaSuccess) return error;
  return Launch(&PickTokenKernel, {rows}, {kSampleThreads}, kScratchBytes, stream, call, num_tiles);
}

}  // namespace minitron::engine::cuda
