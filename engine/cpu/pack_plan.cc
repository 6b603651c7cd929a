#include "engine/cpu/pack_plan.h"

#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/checkpoint/mapped_file.h"
#include "engine/convert.h"
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

// Names the first number of the matrix that is none. Quantised it would spoil its whole group.
absl::Status NotFiniteError(const PackedMatrix& matrix) {
  const WeightView& source = matrix.source;
  std::vector<float> row(source.cols);
  for (int64_t r = 0; r < source.rows; ++r) {
    WeightsToFloat(source, r * source.cols, source.cols, row.data());
    for (int64_t c = 0; c < source.cols; ++c) {
      if (std::isfinite(row[c])) continue;
      return absl::InvalidArgumentError(absl::StrCat("tensor ", matrix.name, " has ", row[c], " at [", r, ", ", c,
                                                     "]: only finite weights can be quantized"));
    }
  }
  return absl::InternalError(absl::StrCat("tensor ", matrix.name, " has numbers that cannot be quantized"));
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
    matrices.push_back({view, dtype, num_bytes, source.NameOf(view.data)});
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

absl::Status PackImage(const PackPlan& plan, const Checkpoint* checkpoint, ThreadPool& pool, bool show_progress,
                       uint8_t* image) {
  const bool draw = show_progress && plan.num_bytes >= kPrefaultThresholdBytes && isatty(STDERR_FILENO) != 0;
  const auto will_need = [&](size_t i) {
    if (checkpoint == nullptr || i >= plan.matrices.size()) return;
    checkpoint->WillNeed(plan.matrices[i].source.data, plan.matrices[i].source.bytes());
  };
  will_need(0);
  for (size_t i = 0; i < plan.matrices.size(); ++i) {
    will_need(i + 1);  // the disk works on the next while this one is packed
    const PackedMatrix& matrix = plan.matrices[i];
    const WeightView& source = matrix.source;
    const int64_t panel_bytes = PanelBytes(matrix.dtype, source.cols);
    std::atomic<bool> finite{true};
    pool.ParallelFor(NumPanels(source.rows), 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t panel = begin; panel < end; ++panel) {
        uint8_t* destination = image + matrix.offset + panel * panel_bytes;
        if (!PackPanel(source, matrix.dtype, panel, destination)) finite.store(false, std::memory_order_relaxed);
      }
    });
    if (!finite.load()) return NotFiniteError(matrix);
    if (checkpoint != nullptr) checkpoint->DoneWith(source.data, source.bytes());
    if (!draw) continue;
    const int64_t done = matrix.offset + PackedBytes(matrix.dtype, source.rows, source.cols);
    std::fprintf(stderr, "\r%s%s", ProgressLine(done, plan.num_bytes).c_str(), done == plan.num_bytes ? "\n" : "");
  }
  return absl::OkStatus();
}

}  // namespace minitron::engine::cpu
