#include "engine/cpu/packed_weights.h"

#include <sys/mman.h>

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/log.h"
#include "engine/base/status_macros.h"

namespace minitron::engine::cpu {

PackedWeights::PackedWeights(const NemotronWeights& source, const PackPlan& plan, AlignedBuffer<uint8_t> memory)
    : memory_(std::move(memory)), weights_(ReplaceMatrices(source, plan, memory_.data())) {}

PackedWeights::PackedWeights(const NemotronWeights& source, const PackPlan& plan, std::unique_ptr<CachedImage> cached)
    : cached_(std::move(cached)), weights_(ReplaceMatrices(source, plan, cached_->data())) {}

absl::StatusOr<std::unique_ptr<PackedWeights>> PackedWeights::Pack(const NemotronWeights& source,
                                                                   const Checkpoint* checkpoint, const PackPlan& plan,
                                                                   bool show_progress, ThreadPool& pool) {
  AlignedBuffer<uint8_t> memory(plan.num_bytes);
  // With 2 MiB pages a single thread reads a sixth faster.
  if (plan.num_bytes > 0) madvise(memory.data(), memory.num_bytes(), MADV_HUGEPAGE);
  RETURN_IF_ERROR(PackImage(plan, checkpoint, pool, show_progress, memory.data()));
  return std::unique_ptr<PackedWeights>(new PackedWeights(source, plan, std::move(memory)));
}

absl::StatusOr<std::unique_ptr<PackedWeights>> PackedWeights::Load(const NemotronWeights& source,
                                                                   const Checkpoint& checkpoint,
                                                                   const PackOptions& options, ThreadPool& pool) {
  const PackPlan plan(source, options.quantization);
  const bool explicit_dir = !options.cache_dir.empty();
  const auto in_memory = [&] { return Pack(source, &checkpoint, plan, options.show_progress, pool); };
  if (plan.matrices.empty() || (!explicit_dir && plan.num_bytes < kMinCacheBytes)) return in_memory();
  ASSIGN_OR_RETURN(PanelCache cache,
                   PanelCache::Open(explicit_dir ? options.cache_dir : options.model_dir, plan, checkpoint, pool));
  absl::StatusOr<std::unique_ptr<CachedImage>> image = cache.Find();
  if (image.ok()) {
    base::LogInfo(absl::StrCat("packed weights mapped from ", cache.path()));
  } else {
    if (!absl::IsNotFound(image.status())) {
      base::LogWarning(absl::StrCat("packed weights are made anew: ", std::string(image.status().message())));
    }
    image = cache.Build(options.show_progress);
    if (absl::IsInvalidArgument(image.status())) return image.status();
    if (!image.ok()) {
      base::LogWarning(absl::StrCat("packed weights stay in memory: ", std::string(image.status().message())));
      return in_memory();
    }
    base::LogInfo(absl::StrCat("packed weights written to ", cache.path()));
  }
  return std::unique_ptr<PackedWeights>(new PackedWeights(source, plan, std::move(image).value()));
}

}  // namespace minitron::engine::cpu
