// StepTimeModel: how long a step of a given shape takes, learnt from the steps that were run.
//
// Seconds = sum of non-negative coefficients times {1, token rows, sequences, KV tokens read, query-key pairs}. Fitted
// by least squares with forgetting: each step adds its weight to the normal equations, old ones fade with a half-life
// of about 140 steps, and a few rounds of coordinate descent from the last solution keep every coefficient at or above
// zero. Directions that recent steps say nothing about (the price of a prompt while all decode) stay as they were. A
// step that took far longer than foreseen (a page fault, a busy host) counts with less weight, as in Huber's loss.
//
// The same numbers give the same model: no clock, no randomness. Allocates nothing. Engine thread only.
#pragma once

#include <array>

namespace minitron::scheduler {

// What a step computes.
struct StepShape {
  double num_tokens = 0;      // token rows
  double num_sequences = 0;   // in the batch
  double context_tokens = 0;  // KV tokens read: per sequence, those in the cache after the step
  double num_pairs = 0;       // query-key pairs: per token row, the positions it attends to

  // Adds a sequence's rows [first_position, first_position + num_rows).
  void Add(int first_position, int num_rows);
};

class StepTimeModel {
 public:
  // Steps until predictions are worth anything.
  static constexpr int kMinSteps = 8;

  void Observe(const StepShape& shape, double seconds);

  bool is_trained() const { return num_steps_ >= kMinSteps; }
  // At least 0; 0 before the first step.
  double PredictSeconds(const StepShape& shape) const;
  // What a step may take beyond the prediction in nearly all cases, from recent errors.
  double margin_seconds() const { return 3 * mean_error_; }

  // The largest n in [0, max_tokens] so that `shape` with the rows [first_position, first_position + n) of one more
  // sequence takes at most `target_s`, by prediction with margin. 0 if not even one fits. Requires is_trained().
  int MaxRows(const StepShape& shape, int first_position, int max_tokens, double target_s) const;

 private:
  static constexpr int kNumFeatures = 5;
  using Features = std::array<double, kNumFeatures>;

  static Features FeaturesOf(const StepShape& shape);
  void Solve();

  // Normal equations of the weighted squares, in scaled features; `coefficients_` is their solution.
  std::array<Features, kNumFeatures> gram_{};
  Features moment_{};
  Features coefficients_{};
  double mean_error_ = 0;  // fading mean of |observed - predicted|, seconds
  int num_steps_ = 0;
};

}  // namespace minitron::scheduler
