// Top-k and top-p: a radix search for the key of the last token kept, 11 bits per pass over the row. A pass counts the
// tokens (and their probability) per bin; then the bin that holds the boundary is found from the top. It ends early
// once the bin holds one token, or is kept whole.
#include "engine/cuda/sampler.cuh"

namespace minitron::engine::cuda {
namespace {

constexpr int kNumLevels = kKeyBits / kRadixBits;
constexpr int kBinsPerThread = kRadixBins / kSampleThreads;
constexpr size_t kHistogramBytes = kRadixBins * (sizeof(uint64_t) + sizeof(uint32_t));

// Key bits below the ones `level` looks at.
HOST_DEVICE constexpr int LowBits(int level) { return kKeyBits - (level + 1) * kRadixBits; }

DEVICE bool Searches(const SampleRow& row, const SampleState& state, Filter filter) {
  return Uses(row, filter) && state.failed == 0 && state.search_done == 0;
}

// Grid (tiles, rows): adds the tile's tokens that share the prefix found so far to the row's bins.
KERNEL(kSampleThreads) CountBinsKernel(SampleCall call, Filter filter, int level) {
  const int r = static_cast<int>(BlockIndex().y);
  const SampleRow row = call.rows[r];
  const SampleState state = call.memory.states[r];
  if (!Searches(row, state, filter)) return;  // the whole block
  uint64_t* masses = reinterpret_cast<uint64_t*>(SharedMemory());
  uint32_t* counts = reinterpret_cast<uint32_t*>(masses + kRadixBins);
  for (int b = static_cast<int>(ThreadIndex().x); b < kRadixBins; b += kSampleThreads) {
    masses[b] = 0;
    counts[b] = 0;
  }
  SyncThreads();
  const float* logits = SampledLogits(call, r);
  const float best = LogitOf(state.best);
  float x[kPerThread];
  LoadTile(logits, call.vocab, x);
  UNROLL
  for (int i = 0; i < kPerThread; ++i) {
    const int token = TileToken(i);
    if (token >= call.vocab) break;
    if (NotFinite(x[i])) continue;  // banned; a mask bans nearly all, which would queue for one bin
    const uint64_t key = KeyOf(x[i], token);
    const uint64_t bits = key >> LowBits(level);
    if (key < state.cut || bits >> kRadixBits != state.prefix) continue;
    const int bin = static_cast<int>(bits & (kRadixBins - 1));
    AtomicAdd(&counts[bin], 1u);
    if (filter == Filter::kTopP) AtomicAdd(&masses[bin], Mass(Probability(x[i], best, row.temperature)));
  }
  SyncThreads();
  for (int b = static_cast<int>(ThreadIndex().x); b < kRadixBins; b += kSampleThreads) {
    const int64_t at = static_cast<int64_t>(r) * kRadixBins + b;
    if (counts[b] != 0) AtomicAdd(&call.memory.bin_counts[at], counts[b]);
    if (masses[b] != 0) AtomicAdd(&call.memory.bin_masses[at], masses[b]);
  }
}

// One block per row: finds the bin of the boundary from the top, and empties the bins for the next pass.
KERNEL(kSampleThreads) ChooseBinKernel(SampleCall call, Filter filter, int level) {
  uint64_t* scratch = reinterpret_cast<uint64_t*>(SharedMemory());
  const int r = static_cast<int>(BlockIndex().x);
  const SampleRow row = call.rows[r];
  SampleState* state = &call.memory.states[r];
  if (!Searches(row, *state, filter)) return;
  uint64_t* masses = call.memory.bin_masses + static_cast<int64_t>(r) * kRadixBins;
  uint32_t* counts = call.memory.bin_counts + static_cast<int64_t>(r) * kRadixBins;
  const int top = kRadixBins - 1 - static_cast<int>(ThreadIndex().x) * kBinsPerThread;  // this thread's highest bin
  uint64_t weights[kBinsPerThread];
  uint64_t sum = 0;
  for (int i = 0; i < kBinsPerThread; ++i) {
    weights[i] = filter == Filter::kTopK ? counts[top - i] : masses[top - i];
    sum += weights[i];
  }
  const uint64_t total = BlockTotal(sum, scratch);
  uint64_t before = BlockSumBefore(sum, scratch);
  uint64_t needed = state->needed;
  if (level == 0) {
    // The shortest head whose probability reaches top_p of what is left; at least one token.
    const double share = static_cast<double>(row.top_p) * static_cast<double>(total);
    const auto whole = static_cast<uint64_t>(share);
    needed = filter == Filter::kTopK ? static_cast<uint64_t>(row.top_k)
                                     : whole + (static_cast<double>(whole) < share ? 1 : 0);
    needed = needed < 1 ? 1 : needed > total ? total : needed;
  }
  SyncThreads();  // everybody has read `needed`
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (before < needed && needed <= before + weights[i]) {
      const uint64_t prefix = state->prefix << kRadixBits | static_cast<uint64_t>(top - i);
      const bool whole_bin = needed == before + weights[i] || counts[top - i] == 1;
      if (whole_bin || level == kNumLevels - 1) {
        state->cut = prefix << LowBits(level);
        state->search_done = 1;
      }
      state->prefix = prefix;
      state->needed = needed - before;
    }
    before += weights[i];
    masses[top - i] = 0;
    counts[top - i] = 0;
  }
}

// One thread per row: ready for the next filter's search.
KERNEL(kSampleThreads) EndSearchKernel(SampleCall call) {
  const int r = static_cast<int>(BlockIndex().x) * kSampleThreads + static_cast<int>(ThreadIndex().x);
  if (r >= call.num_rows) return;
  call.memory.states[r].prefix = 0;
  call.memory.states[r].search_done = 0;
}

cudaError_t Search(const SampleCall& call, Filter filter, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(call.num_rows);
  const Dim3 tiles = {static_cast<unsigned>(NumSampleTiles(call.vocab)), rows};
  for (int level = 0; level < kNumLevels; ++level) {
    cudaError_t error = Launch(&CountBinsKernel, tiles, {kSampleThreads}, kHistogramBytes, stream, call, filter, level);
    if (error != cudaSuccess) return error;
    error = Launch(&ChooseBinKernel, {rows}, {kSampleThreads}, kSampleWarps * sizeof(uint64_t), stream, call, filter,
                   level);
    if (error != cudaSuccess) return error;
  }
  return Launch(&EndSearchKernel, {(rows + kSampleThreads - 1) / kSampleThreads}, {kSampleThreads}, 0, stream, call);
}

}  // namespace

cudaError_t FilterLogits(const SampleCall& call, cudaStream_t stream) {
  if (call.needs.top_k) {
    const cudaError_t error = Search(call, Filter::kTopK, stream);
    if (error != cudaSuccess) return error;
  }
  return call.needs.top_p ? Search(call, Filter::kTopP, stream) : cudaSuccess;
}

}  // namespace minitron::engine::cuda
