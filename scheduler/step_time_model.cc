#include "scheduler/step_time_model.h"

#include <algorithm>
#include <cmath>

namespace minitron::scheduler {
namespace {

constexpr double kForgetting = 0.995;
// How strongly a solution is held where it was, as a share of one observation's weight: enough to stop drift along
// directions without information, too little to slow the rest down.
constexpr double kProximal = 1e-3;
constexpr int kDescentRounds = 24;
// Typical sizes, so that every feature is of the order of one.
constexpr double kTokenScale = 256;
constexpr double kSequenceScale = 32;
constexpr double kContextScale = 65536;
constexpr double kPairScale = 1048576;
// A residual beyond this many mean errors counts as that many.
constexpr double kOutlier = 4;
constexpr double kErrorSmoothing = 0.02;

}  // namespace

void StepShape::Add(int first_position, int num_rows) {
  const double first = first_position, rows = num_rows;
  num_tokens += rows;
  num_sequences += 1;
  context_tokens += first + rows;
  num_pairs += rows * first + rows * (rows + 1) / 2;
}

StepTimeModel::Features StepTimeModel::FeaturesOf(const StepShape& shape) {
  return {1.0, shape.num_tokens / kTokenScale, shape.num_sequences / kSequenceScale,
          shape.context_tokens / kContextScale, shape.num_pairs / kPairScale};
}

double StepTimeModel::PredictSeconds(const StepShape& shape) const {
  const Features features = FeaturesOf(shape);
  double seconds = 0;
  for (int i = 0; i < kNumFeatures; ++i) seconds += coefficients_[i] * features[i];
  return seconds;
}

void StepTimeModel::Observe(const StepShape& shape, double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return;
  const double error = std::abs(seconds - PredictSeconds(shape));
  double weight = 1;
  if (is_trained()) {
    // The mean error itself is moved by at most the clipped residual, or one hiccup would open the door for the next.
    const double clip = kOutlier * std::max(mean_error_, 1e-3 * seconds);
    weight = std::min(1.0, clip / std::max(error, 1e-12));
    mean_error_ += kErrorSmoothing * (std::min(error, clip) - mean_error_);
  } else if (num_steps_ > 0) {
    mean_error_ = num_steps_ == 1 ? error : 0.5 * (mean_error_ + error);
  }
  const Features features = FeaturesOf(shape);
  for (int i = 0; i < kNumFeatures; ++i) {
    for (int j = 0; j < kNumFeatures; ++j) {
      gram_[i][j] = kForgetting * gram_[i][j] + weight * features[i] * features[j];
    }
    moment_[i] = kForgetting * moment_[i] + weight * features[i] * seconds;
  }
  ++num_steps_;
  Solve();
}

// Minimises the squares plus kProximal * |coefficients - last coefficients|^2, over coefficients >= 0.
void StepTimeModel::Solve() {
  const Features last = coefficients_;
  for (int round = 0; round < kDescentRounds; ++round) {
    for (int i = 0; i < kNumFeatures; ++i) {
      double rest = moment_[i] + kProximal * last[i];
      for (int j = 0; j < kNumFeatures; ++j) rest -= j == i ? 0 : gram_[i][j] * coefficients_[j];
      coefficients_[i] = std::max(0.0, rest / (gram_[i][i] + kProximal));
    }
  }
}

int StepTimeModel::MaxRows(const StepShape& shape, int first_position, int max_tokens, double target_s) const {
  const auto fits = [&](int num_rows) {
    StepShape with = shape;
    with.Add(first_position, num_rows);
    return PredictSeconds(with) + margin_seconds() <= target_s;
  };
  // Predictions grow with the rows, so the border is found by halving.
  int low = 0, high = max_tokens;
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (fits(middle)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace minitron::scheduler
