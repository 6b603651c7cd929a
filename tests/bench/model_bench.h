// A whole model end to end: load, prefill, batched decode.
#pragma once

#include <string>
#include <vector>

#include "engine/model_runner.h"
#include "tests/bench/limits.h"

namespace minitron::bench {

struct ModelRun {
  int prefill_tokens = 512;
  int prefill_chunk = 512;  // token rows per step
  int decode_steps = 32;
  int decode_context = 128;  // tokens in the cache of each sequence when decoding starts
  std::vector<int> batches = {1, 2, 4, 8, 16};
  int repeats = 3;
};

// Loads the model and prints, one line each: seconds to load, resident memory, prefill tokens/s (and its share of the
// FMA limit, counting matrix products alone) and decode tokens/s per batch size (and the share of the read limit that
// reading every matrix once per step makes), medians of `repeats`. Returns false and prints why if the model does not
// load.
bool BenchModel(engine::EngineOptions options, const ModelRun& run, const Limits& limits);

}  // namespace minitron::bench
