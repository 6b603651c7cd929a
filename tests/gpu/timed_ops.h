// CudaOps with marks on the device's own time line: where a decode step begins, where its recorded part begins and
// ends, where its tokens are out. What the device does between the last mark of a step and the recorded part of the
// next is waiting, for the host or for the step's arrays: the idle gap between decode graphs.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cuda/cuda_ops.h"
#include "engine/cuda/device_memory.h"
#include "tests/gpu/step_gaps.h"

namespace minitron::gpu {

// Events of the last steps. A mark is an event on the step's stream, with time. Engine thread only.
class StepMarks final : public StepGaps {
 public:
  enum Place { kBegin, kForward, kSampling, kEnd, kNumPlaces };

  // Marks the next `num_steps` steps. Error: as ToStatus.
  absl::Status Watch(int num_steps) override {
    steps_.clear();
    steps_.resize(num_steps);
    current_ = -1;
    for (auto& step : steps_) {
      for (engine::cuda::Event& event : step) {
        cudaEvent_t handle = nullptr;
        if (auto status = engine::cuda::ToStatus(cudaEventCreateWithFlags(&handle, 0), "event"); !status.ok()) {
          return status;
        }
        event = engine::cuda::Event(handle);
      }
    }
    return absl::OkStatus();
  }

  // The steps watched, which have been waited for: every one but the first against the one before it.
  absl::StatusOr<std::vector<StepGap>> Gaps() override {
    std::vector<StepGap> gaps;
    absl::Status status;
    // The last mark lies behind what the runner waits for.
    const int last = std::min(current_, static_cast<int>(steps_.size()) - 1);
    if (last >= 0) status = engine::cuda::ToStatus(cudaEventSynchronize(steps_[last][kEnd].get()), "wait for a mark");
    const auto us = [&](const engine::cuda::Event& from, const engine::cuda::Event& to) {
      float ms = 0.0f;
      if (status.ok()) status = engine::cuda::ToStatus(cudaEventElapsedTime(&ms, from.get(), to.get()), "elapsed time");
      return 1e3 * static_cast<double>(ms);
    };
    for (int i = 1; i <= last; ++i) {
      const auto& step = steps_[i];
      gaps.push_back({.wait_us = us(steps_[i - 1][kEnd], step[kBegin]),
                      .upload_us = us(step[kBegin], step[kForward]),
                      .forward_us = us(step[kForward], step[kSampling]),
                      .sampling_us = us(step[kSampling], step[kEnd])});
    }
    if (!status.ok()) return status;
    return gaps;
  }

  void NextStep() { ++current_; }
  // The last mark of a place counts. Without a step to watch it does nothing.
  void Mark(Place place, cudaStream_t stream) {
    if (current_ < 0 || current_ >= static_cast<int>(steps_.size())) return;
    const cudaError_t error = cudaEventRecord(steps_[current_][place].get(), stream);
    CHECK(error == cudaSuccess);
  }

 private:
  std::vector<std::array<engine::cuda::Event, kNumPlaces>> steps_;
  int current_ = -1;  // the step being enqueued
};

// Forwards every op; marks in Upload, Replay and Sample.
class TimedOps {
 public:
  using Inner = engine::cuda::CudaOps;
  static constexpr bool kAsynchronous = Inner::kAsynchronous;
  using Element = Inner::Element;
  using Buffer = Inner::Buffer;
  using FloatBuffer = Inner::FloatBuffer;
  using Matrix = Inner::Matrix;
  using ConstMatrix = Inner::ConstMatrix;
  using Weight = engine::WeightView;
  using View = engine::BatchView;

  TimedOps(std::unique_ptr<Inner> ops, std::shared_ptr<StepMarks> marks)
      : ops_(std::move(ops)), marks_(std::move(marks)) {}

  Buffer Allocate(int64_t count) { return ops_->Allocate(count); }
  FloatBuffer AllocateFloats(int64_t count) { return ops_->AllocateFloats(count); }
  View Upload(const engine::Batch& batch) {
    marks_->NextStep();
    marks_->Mark(StepMarks::kBegin, ops_->stream());
    return ops_->Upload(batch);
  }
  void Embed(const View& batch, const Weight& embedding, Matrix out) { ops_->Embed(batch, embedding, out); }
  void AddLayerNorm1p(Matrix residual, ConstMatrix delta, const Weight& weight, const Weight& bias, float eps,
                      Matrix out) {
    ops_->AddLayerNorm1p(residual, delta, weight, bias, eps, out);
  }
  template <typename Out>
  void MatMul(ConstMatrix x, const Weight& w, Out out) {
    ops_->MatMul(x, w, out);
  }
  ConstMatrix MatMulToResidual(ConstMatrix x, const Weight& w, Matrix residual, Matrix delta) {
    return ops_->MatMulToResidual(x, w, residual, delta);
  }
  void ProjectQkv(ConstMatrix x, const Weight& wq, const Weight& wk, const Weight& wv, Matrix q, Matrix k, Matrix v) {
    ops_->ProjectQkv(x, wq, wk, wv, q, k, v);
  }
  void RopeAndStoreKv(const View& batch, int layer, Matrix q, ConstMatrix k, ConstMatrix v) {
    ops_->RopeAndStoreKv(batch, layer, q, k, v);
  }
  void PagedAttention(const View& batch, int layer, ConstMatrix q, Matrix out) {
    ops_->PagedAttention(batch, layer, q, out);
  }
  void SquaredRelu(Matrix x) { ops_->SquaredRelu(x); }
  void GatherRows(ConstMatrix x, const int32_t* rows, Matrix out) { ops_->GatherRows(x, rows, out); }
  void Sample(engine::MatrixView<float> logits, absl::Span<const engine::ResultRow> rows, int first_row,
              absl::Span<engine::ResultRowOutput> outputs) {
    ops_->Sample(logits, rows, first_row, outputs);
    marks_->Mark(StepMarks::kEnd, ops_->stream());
  }
  absl::Status Wait() { return ops_->Wait(); }

  std::vector<View> StepsToRecord() { return ops_->StepsToRecord(); }
  void PrepareStep(const View& view) { ops_->PrepareStep(view); }
  void BeginRecording(const View& view) { ops_->BeginRecording(view); }
  void EndRecording(const View& view) { ops_->EndRecording(view); }
  bool Replay(const View& view) {
    marks_->Mark(StepMarks::kForward, ops_->stream());
    const bool replayed = ops_->Replay(view);
    marks_->Mark(StepMarks::kSampling, ops_->stream());
    return replayed;
  }

  const absl::Status& status() const { return ops_->status(); }

 private:
  std::unique_ptr<Inner> ops_;
  std::shared_ptr<StepMarks> marks_;
};

}  // namespace minitron::gpu
