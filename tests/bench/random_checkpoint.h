// Random checkpoints in Hugging Face's layout: a model's shape and cost without its weights.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/model_config.h"

namespace minitron::bench {

// A known shape: "1b", "1b-square" (16 query heads, as stock llama.cpp needs them), "8b" (Minitron-8B), "8b-4-layers"
// (four of its layers and an eighth of its vocabulary, to be compared with other implementations) or "test" (the
// smallest with all its parts).
// Returns false for another name.
bool ShapeByName(const std::string& name, engine::NemotronConfig& config);

struct TensorSpec {
  std::string name;
  std::vector<int64_t> shape;
  float scale = 0.0f;  // uniform in [-scale, scale)
  uint64_t seed = 0;   // of RandomBf16

  int64_t NumElements() const;
};

// Every tensor of the model, in file order. Matrices keep the size of activations (scale sqrt(3 / inputs)), so that the
// residual stream stays near 1 through any number of layers; norms are near their neutral values.
std::vector<TensorSpec> TensorSpecs(const engine::NemotronConfig& config, uint64_t seed);

// `count` bf16 values for a tensor from element `first` on: RandomBf16Value of random_value.h.
void RandomBf16(uint64_t seed, int64_t first, int64_t count, float scale, uint16_t* out);

// Writes config.json and model.safetensors (bf16) to an existing folder, by as many threads as there are cores.
// Returns false and prints why on failure; that there is room is looked at before anything is written.
bool WriteRandomCheckpoint(const std::string& dir, const engine::NemotronConfig& config, uint64_t seed);

}  // namespace minitron::bench
