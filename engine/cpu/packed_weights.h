// PackedWeights: the matrices of a model in panels, made once at load.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/cpu/aligned_buffer.h"
#include "engine/cpu/thread_pool.h"
#include "engine/model_runner.h"
#include "engine/nemotron_weights.h"

namespace minitron::engine::cpu {

// One matrix of the packed image.
struct PackedMatrix {
  WeightView source;
  DType dtype = DType::kBf16Panels;
  int64_t offset = 0;  // in the image, a multiple of kPanelAlignment
};

// Which matrices are packed, to what and where: a function of the source's shapes and types and of the quantisation.
// Order: the layers' q, k, v, o, up, down; then the head. Embedding and norms stay as they are.
//   kOff   bf16 matrices to bf16 panels; matrices of other types are not packed
//   kInt8  all to int8
//   kInt4  all to int4 but the head, which decides between near-equal tokens and is a small share of the bytes: int8
struct PackPlan {
  PackPlan(const NemotronWeights& source, Quantization quantization);

  std::vector<PackedMatrix> matrices;
  int64_t num_bytes = 0;
};

// The weights of `source` with the plan's matrices replaced by their places in `image`.
NemotronWeights ReplaceMatrices(const NemotronWeights& source, const PackPlan& plan, const uint8_t* image);

// Packs all of the plan into `image` (plan.num_bytes, writable) on the pool's threads. Source pages of mapped files are
// given back as they are done with, so that memory holds the model once. With `show_progress` and stderr a terminal,
// draws a bar.
void PackImage(const PackPlan& plan, ThreadPool& pool, bool show_progress, uint8_t* image);

// Immutable once made; owns the image. The embedding and norms still point into the source.
class PackedWeights {
 public:
  // Packs into anonymous memory.
  PackedWeights(const NemotronWeights& source, Quantization quantization, ThreadPool& pool, bool show_progress);

  const NemotronWeights& weights() const { return weights_; }

 private:
  AlignedBuffer<uint8_t> image_;
  NemotronWeights weights_;
};

}  // namespace minitron::engine::cpu
