#include "scheduler/step_time_model.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace minitron::scheduler {
namespace {

StepShape Decode(int num_sequences, int context) {
  StepShape shape;
  for (int i = 0; i < num_sequences; ++i) shape.Add(context - 1, 1);
  return shape;
}

StepShape Mixed(int num_sequences, int context, int first_position, int num_rows) {
  StepShape shape = Decode(num_sequences, context);
  shape.Add(first_position, num_rows);
  return shape;
}

// Seconds by a linear law of all features.
double Linear(const StepShape& s) {
  return 3e-3 + 20e-6 * s.num_tokens + 5e-6 * s.num_sequences + 30e-9 * s.context_tokens + 1e-9 * s.num_pairs;
}

// Memory or compute, whichever takes longer: what a GPU does.
double Roofline(const StepShape& s) {
  return std::max(3.36e-3, 18.3e-6 * s.num_tokens) + 30.5e-9 * s.context_tokens + 1e-9 * s.num_pairs;
}

// Steps as a server sees them: mostly decoding, now and then a prompt in chunks.
std::vector<StepShape> Workload(int num_steps, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  std::vector<StepShape> shapes;
  while (static_cast<int>(shapes.size()) < num_steps) {
    const int num_sequences = pick(1, 64), context = pick(100, 3000);
    for (int i = pick(1, 10); i > 0; --i) shapes.push_back(Decode(num_sequences, context + i));
    const int chunk = pick(16, 512);
    for (int i = 0; i < pick(0, 6); ++i) shapes.push_back(Mixed(num_sequences, context, i * chunk, chunk));
  }
  return shapes;
}

TEST(StepTimeModel, LearnsALinearLawFromAMixOfSteps) {
  StepTimeModel model;
  for (const StepShape& shape : Workload(600, 1)) model.Observe(shape, Linear(shape));
  for (const StepShape& shape : Workload(100, 2)) {
    EXPECT_NEAR(model.PredictSeconds(shape), Linear(shape), 0.05 * Linear(shape));
  }
}

TEST(StepTimeModel, NeverPredictsLessForMore) {
  // A law that falls with the number of sequences cannot be followed, and is not.
  StepTimeModel model;
  for (const StepShape& shape : Workload(400, 3)) model.Observe(shape, 0.02 - 1e-4 * shape.num_sequences);
  EXPECT_LE(model.PredictSeconds(Decode(1, 500)), model.PredictSeconds(Decode(2, 500)));
  EXPECT_LE(model.PredictSeconds(Mixed(4, 500, 0, 10)), model.PredictSeconds(Mixed(4, 500, 0, 20)));
}

TEST(StepTimeModel, AHiccupHardlyMovesIt) {
  StepTimeModel model;
  int i = 0;
  for (const StepShape& shape : Workload(600, 4)) {
    model.Observe(shape, Linear(shape) * (++i % 40 == 0 ? 100 : 1));  // every 40th step takes a hundred times as long
  }
  double worst = 0;
  for (const StepShape& shape : Workload(100, 5)) {
    worst = std::max(worst, std::abs(model.PredictSeconds(shape) / Linear(shape) - 1));
  }
  EXPECT_LT(worst, 0.35);
}

TEST(StepTimeModel, FollowsAMachineThatBecomesSlower) {
  StepTimeModel model;
  for (const StepShape& shape : Workload(600, 6)) model.Observe(shape, Linear(shape));
  for (const StepShape& shape : Workload(1500, 7)) model.Observe(shape, 3 * Linear(shape));
  for (const StepShape& shape : Workload(100, 8)) {
    EXPECT_NEAR(model.PredictSeconds(shape), 3 * Linear(shape), 0.3 * Linear(shape));
  }
}

TEST(StepTimeModel, KeepsThePriceOfPromptsThroughALongTimeWithoutAny) {
  StepTimeModel model;
  for (const StepShape& shape : Workload(600, 9)) model.Observe(shape, Linear(shape));
  const StepShape prompt = Mixed(16, 800, 512, 256);
  for (int i = 0; i < 20000; ++i) {
    const StepShape shape = Decode(16, 200 + i % 1800);
    model.Observe(shape, Linear(shape));
  }
  EXPECT_NEAR(model.PredictSeconds(prompt), Linear(prompt), 0.25 * Linear(prompt));
}

TEST(StepTimeModel, ChosenRowsMeetTheTargetOnARoofline) {
  constexpr double kTarget = 9e-3;
  StepTimeModel model;
  std::mt19937_64 random(10);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  int num_late = 0, num_chunks = 0;
  double total_rows = 0;
  for (int prompt = 0; prompt < 300; ++prompt) {
    const int num_sequences = pick(8, 40), context = pick(200, 2500);
    for (int i = 0; i < 20; ++i)
      model.Observe(Decode(num_sequences, context + i), Roofline(Decode(num_sequences, context + i)));
    for (int position = 0; position < 4000;) {
      const StepShape base = Decode(num_sequences, context);
      const int rows = std::clamp(model.MaxRows(base, position, 4000 - position, kTarget), 16, 4000 - position);
      const StepShape step = Mixed(num_sequences, context, position, rows);
      model.Observe(step, Roofline(step));
      position += rows;
      if (prompt < 5) continue;  // learning
      ++num_chunks;
      total_rows += rows;
      if (Roofline(step) > 1.05 * kTarget) ++num_late;
    }
  }
  EXPECT_LT(num_late, num_chunks / 100);
  // And the target is used: what is left of 9 ms after decoding is worth about 300 rows.
  EXPECT_GT(total_rows / num_chunks, 180);
}

TEST(StepTimeModel, MaxRowsIsTheLargestThatFits) {
  StepTimeModel model;
  for (const StepShape& shape : Workload(600, 11)) model.Observe(shape, Linear(shape));
  const StepShape base = Decode(8, 300);
  const double target = 0.012;
  const int rows = model.MaxRows(base, 100, 5000, target);
  const auto with = [&](int n) {
    StepShape shape = base;
    shape.Add(100, n);
    return model.PredictSeconds(shape) + model.margin_seconds();
  };
  ASSERT_GT(rows, 0);
  ASSERT_LT(rows, 5000);
  EXPECT_LE(with(rows), target);
  EXPECT_GT(with(rows + 1), target);
  EXPECT_EQ(model.MaxRows(base, 100, 5000, 1e-6), 0);
  EXPECT_EQ(model.MaxRows(base, 100, 7, 10.0), 7);
}

TEST(StepTimeModel, IgnoresTimesThatAreNone) {
  StepTimeModel model;
  for (const StepShape& shape : Workload(100, 12)) model.Observe(shape, Linear(shape));
  const double before = model.PredictSeconds(Decode(4, 100));
  model.Observe(Decode(4, 100), -1);
  model.Observe(Decode(4, 100), std::nan(""));
  model.Observe(Decode(4, 100), INFINITY);
  EXPECT_EQ(model.PredictSeconds(Decode(4, 100)), before);
}

}  // namespace
}  // namespace minitron::scheduler
