#include "server/hang_detector.h"

#include <gtest/gtest.h>

namespace minitron::server {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// A virtual clock that looks every quarter of a second.
class HangDetectorTest : public ::testing::Test {
 protected:
  // Looks for `duration`; every step takes `step` (0: none finishes). Returns whether it was ever found hung.
  bool Run(HangDetector& detector, milliseconds duration, milliseconds step, bool has_work = true) {
    bool hung = false;
    const scheduler::TimePoint end = now_ + duration;
    scheduler::TimePoint next_step = now_ + step;
    while (now_ < end) {
      now_ += milliseconds(250);
      while (step.count() > 0 && next_step <= now_) {
        ++steps_;
        next_step += step;
      }
      hung = detector.Look({steps_, has_work}, now_) || hung;
    }
    return hung;
  }

  uint64_t steps_ = 0;
  scheduler::TimePoint now_{seconds(1000)};
};

TEST_F(HangDetectorTest, IdleIsNotHung) {
  HangDetector detector(seconds(10), {});
  EXPECT_FALSE(Run(detector, std::chrono::hours(24), milliseconds(0), /*has_work=*/false));
  EXPECT_EQ(detector.age(), scheduler::Duration{});
}

TEST_F(HangDetectorTest, BusyIsNotHungHoweverLong) {
  HangDetector detector(seconds(10), {});
  EXPECT_FALSE(Run(detector, std::chrono::hours(24), milliseconds(900)));
}

TEST_F(HangDetectorTest, WorkWithoutStepsIsHungAfterTheTimeout) {
  HangDetector detector(seconds(10), {});
  EXPECT_FALSE(Run(detector, seconds(60), milliseconds(100)));
  EXPECT_FALSE(Run(detector, seconds(10), milliseconds(0)));
  EXPECT_TRUE(Run(detector, seconds(2), milliseconds(0)));
}

TEST_F(HangDetectorTest, IdleTimeBeforeTheWorkDoesNotCount) {
  HangDetector detector(seconds(10), {});
  Run(detector, seconds(3600), milliseconds(0), false);
  EXPECT_FALSE(Run(detector, seconds(9), milliseconds(0)));
  EXPECT_TRUE(Run(detector, seconds(3), milliseconds(0)));
}

TEST_F(HangDetectorTest, ASlowModelIsGivenTenOfItsSteps) {
  HangDetector detector(seconds(10), {});
  EXPECT_FALSE(Run(detector, seconds(40), seconds(8)));
  EXPECT_FALSE(Run(detector, seconds(60), milliseconds(0))) << "less than 10 s + 10 x 8 s";
  EXPECT_TRUE(Run(detector, seconds(60), milliseconds(0)));
}

TEST_F(HangDetectorTest, TheSelfTestTellsOfSlowStepsBeforeThereWasOne) {
  HangDetector detector(seconds(10), seconds(30));
  EXPECT_FALSE(Run(detector, seconds(300), milliseconds(0)));
  EXPECT_TRUE(Run(detector, seconds(30), milliseconds(0)));
}

TEST_F(HangDetectorTest, OneAbsurdlyLongStepDoesNotSwitchItOff) {
  HangDetector detector(seconds(10), std::chrono::hours(5));
  EXPECT_EQ(detector.limit(), seconds(610));
}

}  // namespace
}  // namespace minitron::server
