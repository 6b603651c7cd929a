// PackedWeights: the matrices of a model in panels, packed at load or mapped from a cache file.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/checkpoint/checkpoint.h"
#include "engine/cpu/aligned_buffer.h"
#include "engine/cpu/pack_plan.h"
#include "engine/cpu/panel_cache.h"
#include "engine/cpu/thread_pool.h"
#include "engine/nemotron_weights.h"

namespace minitron::engine::cpu {

// Below this, packing takes less than half a second: a file beside the model would be clutter.
inline constexpr int64_t kMinCacheBytes = int64_t{256} << 20;

struct PackOptions {
  Quantization quantization = Quantization::kOff;
  // Folder of cache files. Empty: `model_dir`, for images of kMinCacheBytes and more, if it can be written.
  std::string cache_dir;
  std::string model_dir;
  bool show_progress = false;
};

// Immutable; owns the image. The embedding and the norms still point into the source.
class PackedWeights {
 public:
  // Maps the cache file of these weights, or packs them into one, or into memory when there is to be no file or it
  // cannot be written (a log line says why). `checkpoint` holds the source.
  // Error: INVALID_ARGUMENT when an explicit cache_dir is no folder, or a number to be quantised is not finite.
  static absl::StatusOr<std::unique_ptr<PackedWeights>> Load(const NemotronWeights& source,
                                                             const Checkpoint& checkpoint, const PackOptions& options,
                                                             ThreadPool& pool);

  // Packs into memory. `checkpoint`: as for PackImage. Error: as PackImage.
  static absl::StatusOr<std::unique_ptr<PackedWeights>> Pack(const NemotronWeights& source,
                                                             const Checkpoint* checkpoint, const PackPlan& plan,
                                                             bool show_progress, ThreadPool& pool);

  const NemotronWeights& weights() const { return weights_; }

 private:
  PackedWeights(const NemotronWeights& source, const PackPlan& plan, AlignedBuffer<uint8_t> memory);
  PackedWeights(const NemotronWeights& source, const PackPlan& plan, std::unique_ptr<CachedImage> cached);

  std::unique_ptr<CachedImage> cached_;  // one of the two holds the image
  AlignedBuffer<uint8_t> memory_;
  NemotronWeights weights_;
};

}  // namespace minitron::engine::cpu
