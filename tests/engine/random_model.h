// A small random Nemotron model in memory, with the 8B's ratios, for tests of the engine.
#pragma once

#include <memory>
#include <vector>

#include "engine/model_config.h"
#include "engine/nemotron_weights.h"

namespace minitron::engine {

// The 8B's proportions in small: 6 query heads per kv head, query_width != hidden, half of each head rotated.
NemotronConfig SmallConfig();

// Random weights that own their memory. Norm weights and biases are not zero.
class RandomModel {
 public:
  RandomModel(const NemotronConfig& config, DType dtype, uint64_t seed);

  const NemotronConfig& config() const { return config_; }
  const NemotronWeights& weights() const { return weights_; }

 private:
  WeightView Make(int64_t rows, int64_t cols, float scale);

  NemotronConfig config_;
  DType dtype_;
  uint64_t state_;
  std::vector<std::unique_ptr<std::vector<uint8_t>>> storage_;
  NemotronWeights weights_;
};

// `value` in the element type, rounded to nearest even for bf16; for f16, |value| must be 0 or in [2^-14, 65504].
void StoreElement(float value, DType dtype, void* destination);

// A cheap repeatable stream: uniform in [-1, 1).
float NextUniform(uint64_t& state);

}  // namespace minitron::engine
