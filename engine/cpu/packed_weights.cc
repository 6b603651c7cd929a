#include "engine/cpu/packed_weights.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "engine/base/check.h"
#include "engine/checkpoint/mapped_file.h"
#include "engine/cpu/panel_format.h"

namespace minitron::engine::cpu {
namespace {

// Calls visit(view) for every matrix that may be packed, in the order of the image.
template <typename Weights, typename Visit>
void ForEachMatrix(Weights& weights, const Visit& visit) {
  for (auto& layer : weights.layers) {
    for (auto* view : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj, &layer.up_proj, &layer.down_proj}) {
      visit(*view);
    }
  }
  visit(weights.lm_head);
}

bool IsPacked(const WeightView& source, Quantization quantization) {
  return quantization != Quantization::kOff || source.dtype == DType::kBf16;
}

// Tells the kernel that whole pages inside a range of mapped file are not needed any more.
void DropPages(const void* data, int64_t num_bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(num_bytes)) / page * page;
  // Unlike MADV_DONTNEED this cannot lose data: private dirty or anonymous pages are kept.
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_PAGEOUT);
}

}  // namespace

PackPlan::PackPlan(const NemotronWeights& source, Quantization quantization) {
  ForEachMatrix(source, [&](const WeightView& view) {
    if (!IsPacked(view, quantization)) return;
    DType dtype = DType::kBf16Panels;
    if (quantization == Quantization::kInt8) dtype = DType::kInt8Panels;
    if (quantization == Quantization::kInt4) {
      dtype = &view == &source.lm_head ? DType::kInt8Panels : DType::kInt4Panels;
    }
    matrices.push_back({view, dtype, num_bytes});
    num_bytes += PackedBytes(dtype, view.rows, view.cols);
  });
}

NemotronWeights ReplaceMatrices(const NemotronWeights& source, const PackPlan& plan, const uint8_t* image) {
  NemotronWeights result = source;
  auto next = plan.matrices.begin();
  ForEachMatrix(result, [&](WeightView& view) {
    if (next == plan.matrices.end() || next->source.data != view.data) return;
    result.num_bytes += PackedBytes(next->dtype, view.rows, view.cols) - view.size() * DTypeBytes(view.dtype);
    view.data = image + next->offset;
    view.dtype = next->dtype;
    ++next;
  });
  CHECK(next == plan.matrices.end());
  result.matrix_dtype = result.layers.empty() ? result.lm_head.dtype : result.layers.front().up_proj.dtype;
  return result;
}

void PackImage(const PackPlan& plan, ThreadPool& pool, bool show_progress, uint8_t* image) {
  const bool draw = show_progress && plan.num_bytes >= kPrefaultThresholdBytes && isatty(STDERR_FILENO) != 0;
  for (const PackedMatrix& matrix : plan.matrices) {
    const WeightView& source = matrix.source;
    const int64_t panel_bytes = PanelBytes(matrix.dtype, source.cols);
    pool.ParallelFor(NumPanels(source.rows), 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t panel = begin; panel < end; ++panel) {
        PackPanel(source, matrix.dtype, panel, image + matrix.offset + panel * panel_bytes);
      }
    });
    DropPages(source.data, source.size() * DTypeBytes(source.dtype));
    if (!draw) continue;
    const int64_t done = matrix.offset + PackedBytes(matrix.dtype, source.rows, source.cols);
    std::fprintf(stderr, "\r%s%s", ProgressLine(done, plan.num_bytes).c_str(), done == plan.num_bytes ? "\n" : "");
  }
}

PackedWeights::PackedWeights(const NemotronWeights& source, Quantization quantization, ThreadPool& pool,
                             bool show_progress) {
  const PackPlan plan(source, quantization);
  image_ = AlignedBuffer<uint8_t>(plan.num_bytes);
  // 2 MiB pages save a sixth of the time of a single reading thread.
  if (plan.num_bytes > 0) madvise(image_.data(), image_.num_bytes(), MADV_HUGEPAGE);
  PackImage(plan, pool, show_progress, image_.data());
  weights_ = ReplaceMatrices(source, plan, image_.data());
}

}  // namespace minitron::engine::cpu
