// PackPlan: which matrices of a model are packed, to what, and where in the image.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/checkpoint/checkpoint.h"
#include "engine/cpu/thread_pool.h"
#include "engine/model_runner.h"
#include "engine/nemotron_weights.h"

namespace minitron::engine::cpu {

// One matrix of the packed image.
struct PackedMatrix {
  WeightView source;
  DType dtype = DType::kBf16Panels;
  int64_t offset = 0;  // in the image, a multiple of kPanelAlignment
  std::string name;    // as in checkpoints
};

// A function of the source's shapes and types and of the quantisation.
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

// Packs all of the plan into `image` (plan.num_bytes, writable) on the pool's threads. If the source is a checkpoint's,
// tells it what is read next and what is done with, so that memory holds the model once. With `show_progress` and
// stderr a terminal, draws a bar for images of a gigabyte and more.
// Error: INVALID_ARGUMENT for a number that is to be quantised and is not finite (tensor, value and place); the image
// is then not complete.
absl::Status PackImage(const PackPlan& plan, const Checkpoint* checkpoint, ThreadPool& pool, bool show_progress,
                       uint8_t* image);

}  // namespace minitron::engine::cpu
