#include "scheduler/fair_queue.h"

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace minitron::scheduler {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::ElementsAre;
using SequencePtr = FairQueue::SequencePtr;

class FairQueueTest : public ::testing::Test {
 protected:
  ~FairQueueTest() override { EXPECT_TRUE(queue_.CheckConsistent().ok()) << queue_.CheckConsistent().ToString(); }

  SequencePtr Make(const std::string& tenant, int num_prompt = 10, int priority = 0) {
    auto request = std::make_shared<Request>();
    request->id = ++num_made_;
    request->tenant = tenant;
    request->priority = priority;
    request->prompt_token_ids.assign(num_prompt, 4);
    request->max_tokens = 100;
    return std::make_shared<Sequence>(request, 0, num_made_);
  }
  SequencePtr Add(const std::string& tenant, int num_prompt = 10, int priority = 0) {
    const SequencePtr sequence = Make(tenant, num_prompt, priority);
    queue_.Attach(*sequence);
    queue_.Add(sequence, now_);
    return sequence;
  }
  // Starts the next; returns its id, 0 if there is none.
  RequestId StartNext() {
    const SequencePtr sequence = queue_.Pop(now_);
    if (sequence == nullptr) return 0;
    queue_.Started(*sequence, sequence->num_prompt_tokens(), now_);
    started_.push_back(sequence);
    return sequence->id();
  }
  void End(const SequencePtr& sequence) { queue_.Detach(*sequence); }

  FairQueue queue_{{.prompt_token_weight = 1, .output_token_weight = 2, .burst_credit = 0, .wait_bound = seconds(5)}};
  TimePoint now_ = TimePoint(seconds(100));
  std::vector<SequencePtr> started_;
  uint64_t num_made_ = 0;
};

TEST_F(FairQueueTest, OneTenantIsServedInOrderOfArrival) {
  for (int i = 0; i < 3; ++i) Add("a");
  EXPECT_EQ(queue_.size(), 3);
  EXPECT_EQ(StartNext(), 1u);
  EXPECT_EQ(StartNext(), 2u);
  EXPECT_EQ(StartNext(), 3u);
  EXPECT_EQ(StartNext(), 0u);
}

TEST_F(FairQueueTest, ANewTenantGoesAheadOfABacklog) {
  for (int i = 0; i < 50; ++i) Add("flood");
  EXPECT_EQ(StartNext(), 1u);
  const RequestId polite = Add("polite")->id();
  // Both have waited for nothing yet: "polite" was lifted to the least counter, and ties go to who came first.
  StartNext();
  EXPECT_EQ(StartNext(), polite);
}

TEST_F(FairQueueTest, LongPromptsUseUpTheShareSooner) {
  for (int i = 0; i < 10; ++i) Add("long", 100);
  for (int i = 0; i < 30; ++i) Add("short", 10);
  int num_long = 0, num_short = 0;
  for (int i = 0; i < 22; ++i) {
    StartNext();
    (started_.back()->request().tenant == "long" ? num_long : num_short) += 1;
  }
  EXPECT_EQ(num_long, 2);
  EXPECT_EQ(num_short, 20);
}

TEST_F(FairQueueTest, OutputTokensCountTwice) {
  Add("a");
  StartNext();
  const double before = queue_.counter(0, "a");
  queue_.ChargeOutput(*started_[0], 3);
  EXPECT_EQ(queue_.counter(0, "a"), before + 6);
}

TEST_F(FairQueueTest, AbsenceSavesNothingUp) {
  Add("away");
  StartNext();
  for (int i = 0; i < 100; ++i) Add("busy", 100);
  for (int i = 0; i < 50; ++i) StartNext();
  for (int i = 0; i < 10; ++i) Add("away", 100);
  // Not ten in a row, though "busy" has received 5000 tokens more: from now on they alternate.
  std::map<std::string, int> counts;
  for (int i = 0; i < 10; ++i) {
    StartNext();
    ++counts[started_.back()->request().tenant];
  }
  EXPECT_EQ(counts["away"], 5);
  EXPECT_EQ(counts["busy"], 5);
}

TEST_F(FairQueueTest, LeavingForAMomentDoesNotClearTheAccount) {
  const SequencePtr heavy = Add("heavy", 1000);
  Add("light", 10);
  Add("light", 10);
  EXPECT_EQ(StartNext(), 1u);
  EXPECT_EQ(StartNext(), 2u);
  End(heavy);  // no live sequence of "heavy" any more, but it is still 990 ahead
  Add("heavy", 10);
  for (int i = 0; i < 5; ++i) Add("light", 10);
  for (int i = 0; i < 6; ++i) {
    StartNext();
    EXPECT_EQ(started_.back()->request().tenant, "light");
  }
  EXPECT_EQ(StartNext(), 4u);
}

TEST_F(FairQueueTest, ATenantWhoseLastWaitingSequenceStartsWhileOthersWaitIsExpectedForAWhile) {
  for (int i = 0; i < 4; ++i) Add("flood");
  StartNext();
  EXPECT_FALSE(queue_.ExpectsLightTenant(now_));
  Add("light");
  while (started_.back()->request().tenant != "light") StartNext();
  EXPECT_TRUE(queue_.ExpectsLightTenant(now_ + milliseconds(999)));
  EXPECT_FALSE(queue_.ExpectsLightTenant(now_ + seconds(1)));
  // A queue that runs empty as a whole leaves nobody to keep room from.
  now_ += seconds(1);
  while (StartNext() != 0 && queue_.size() > 0) {
  }
  EXPECT_FALSE(queue_.ExpectsLightTenant(now_));
}

TEST_F(FairQueueTest, PreemptedSequencesComeFirstInsideTheirTenant) {
  const SequencePtr first = Add("a");
  Add("a");
  StartNext();
  first->Start(0, engine::kNone, now_);
  first->Preempt();
  queue_.Add(first, now_);
  EXPECT_EQ(StartNext(), first->id());
}

TEST_F(FairQueueTest, ClassesAreStrict) {
  for (int i = 0; i < 3; ++i) Add("a", 10, 0);
  const RequestId urgent = Add("a", 10, 1)->id();
  const RequestId more_urgent = Add("b", 1000, 2)->id();
  EXPECT_EQ(StartNext(), more_urgent);
  EXPECT_EQ(StartNext(), urgent);
  EXPECT_EQ(StartNext(), 1u);
}

TEST_F(FairQueueTest, AClassThatWasPassedOverForTheBoundIsNextOnce) {
  const RequestId low = Add("low", 10, -1)->id();
  const RequestId low_too = Add("low", 10, -1)->id();
  for (int i = 0; i < 20; ++i) Add("high", 10, 1);
  for (int i = 0; i < 5; ++i) {
    EXPECT_NE(StartNext(), low) << i;
    now_ += milliseconds(999);
  }
  EXPECT_NE(StartNext(), low);
  now_ += milliseconds(5);
  EXPECT_EQ(StartNext(), low);
  EXPECT_NE(StartNext(), low_too);  // the clock starts again
  now_ += seconds(5);
  EXPECT_EQ(StartNext(), low_too);
}

TEST_F(FairQueueTest, PopAndPutBackChangeNothing) {
  for (int i = 0; i < 3; ++i) Add("a", 10);
  for (int i = 0; i < 3; ++i) Add("b", 10);
  StartNext();
  std::vector<SequencePtr> popped;
  for (int i = 0; i < 5; ++i) popped.push_back(queue_.Pop(now_));
  EXPECT_EQ(queue_.Pop(now_), nullptr);
  EXPECT_EQ(queue_.size(), 5);
  for (const SequencePtr& sequence : popped) queue_.PutBack(sequence);
  EXPECT_EQ(queue_.counter(0, "a"), 10);
  EXPECT_EQ(queue_.counter(0, "b"), 0);
  EXPECT_EQ(StartNext(), 4u);
}

TEST_F(FairQueueTest, RemovedSequencesAreNotServed) {
  const SequencePtr first = Add("a");
  Add("b");
  queue_.Remove(first);
  queue_.Detach(*first);
  EXPECT_EQ(queue_.size(), 1);
  EXPECT_EQ(StartNext(), 2u);
}

TEST_F(FairQueueTest, IdleTenantsAreForgotten) {
  const SequencePtr keeps_class_live = Add("z", 1);
  StartNext();
  for (int i = 0; i < 3000; ++i) {
    const SequencePtr sequence = Add("tenant" + std::to_string(i), 10);
    while (StartNext() != 0) {
    }
    End(sequence);
  }
  EXPECT_LE(queue_.num_accounts(), static_cast<int>(FairQueue::kMaxIdleAccounts) + 1);
  End(keeps_class_live);
  EXPECT_EQ(queue_.num_accounts(), 0);
}

// A server of a few slots over random tenants, lengths and arrivals, as a model of the scheduler around the queue.
class Server {
 public:
  Server(uint64_t seed, int num_tenants) : random_(seed), queue_({.burst_credit = 0, .wait_bound = seconds(1000000)}) {
    for (int t = 0; t < num_tenants; ++t) service_["t" + std::to_string(t)] = 0;
  }

  static constexpr int kSlots = 8, kMaxPrompt = 64, kMaxOutput = 32;
  // Both weights and the bound of the paper: whatever is larger, the longest prompt or all outputs of the batch.
  static constexpr double kBound = 2 * std::max(1.0 * kMaxPrompt, 2.0 * kSlots * kMaxOutput);

  void Submit(const std::string& tenant) {
    auto request = std::make_shared<Request>();
    request->id = ++num_made_;
    request->tenant = tenant;
    request->prompt_token_ids.assign(Draw(1, kMaxPrompt), 4);
    request->max_tokens = Draw(1, kMaxOutput);
    const auto sequence = std::make_shared<Sequence>(request, 0, num_made_);
    queue_.Attach(*sequence);
    queue_.Add(sequence, TimePoint{});
    ++num_waiting_[tenant];
  }

  void Step() {
    for (Running& running : running_) {
      queue_.ChargeOutput(*running.sequence, 1);
      service_[running.sequence->request().tenant] += 2;
      ++running.num_tokens;
    }
    std::erase_if(running_, [this](const Running& running) {
      if (running.num_tokens < running.sequence->request().max_tokens) return false;
      queue_.Detach(*running.sequence);
      return true;
    });
    while (running_.size() < kSlots) {
      const SequencePtr next = queue_.Pop(TimePoint{});
      if (next == nullptr) return;
      const std::string& tenant = next->request().tenant;
      queue_.Started(*next, next->num_prompt_tokens(), TimePoint{});
      service_[tenant] += next->num_prompt_tokens();
      --num_waiting_[tenant];
      running_.push_back({next, 0});
    }
  }

  int Draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  double service(const std::string& tenant) const { return service_.at(tenant); }
  bool is_backlogged(const std::string& tenant) { return num_waiting_[tenant] > 0; }
  const std::map<std::string, double>& all_service() const { return service_; }
  absl::Status CheckConsistent() const { return queue_.CheckConsistent(); }

 private:
  struct Running {
    SequencePtr sequence;
    int num_tokens = 0;
  };
  std::mt19937_64 random_;
  FairQueue queue_;
  std::vector<Running> running_;
  std::map<std::string, double> service_;
  std::map<std::string, int> num_waiting_;
  uint64_t num_made_ = 0;
};

TEST(FairQueueBound, BackloggedTenantsReceiveTheSameServiceWithinTheBound) {
  double widest = 0;
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    Server server(seed, 3);
    // The gap of any pair, over every stretch in which both wait: widest minus narrowest of the difference.
    std::map<std::pair<std::string, std::string>, std::pair<double, double>> range;
    for (int step = 0; step < 1500; ++step) {
      // t0 floods; t1 always has some work waiting; t2 comes and goes.
      for (int i = 0; i < 3; ++i) server.Submit("t0");
      if (step % 5 == 0 || !server.is_backlogged("t1")) server.Submit("t1");
      if (step / 200 % 2 == 0) server.Submit("t2");
      server.Step();
      ASSERT_TRUE(server.CheckConsistent().ok()) << server.CheckConsistent().ToString();
      for (const auto& [a, unused] : server.all_service()) {
        for (const auto& [b, unused_too] : server.all_service()) {
          if (a >= b) continue;
          if (!server.is_backlogged(a) || !server.is_backlogged(b)) {
            range.erase({a, b});
            continue;
          }
          const double gap = server.service(a) - server.service(b);
          const auto [it, inserted] = range.try_emplace({a, b}, gap, gap);
          it->second.first = std::min(it->second.first, gap);
          it->second.second = std::max(it->second.second, gap);
          const double width = it->second.second - it->second.first;
          widest = std::max(widest, width);
          ASSERT_LE(width, Server::kBound) << a << " " << b << " seed " << seed << " step " << step;
        }
      }
    }
  }
  std::printf("widest gap %.0f of %.0f\n", widest, Server::kBound);
  EXPECT_GT(widest, 0.1 * Server::kBound);  // the bound is not met for want of trying
}

TEST(FairQueueBound, ATenantWithinItsShareNeverWaitsForAFlood) {
  // t1 has one request at a time; each starts within the time two requests of the flood need to leave a slot.
  Server server(7, 2);
  for (int step = 0; step < 3000; ++step) {
    for (int i = 0; i < 20; ++i) server.Submit("t0");
    int waited = 0;
    if (step % 100 == 0) server.Submit("t1");
    for (; server.is_backlogged("t1"); ++waited) server.Step();
    EXPECT_LE(waited, 2 * Server::kMaxOutput) << step;
    server.Step();
  }
}

TEST(FairQueueBound, TheSameArrivalsGiveTheSameOrder) {
  const auto run = [](uint64_t seed) {
    Server server(seed, 3);
    for (int step = 0; step < 500; ++step) {
      server.Submit("t" + std::to_string(server.Draw(0, 2)));
      server.Step();
    }
    return server.all_service();
  };
  EXPECT_EQ(run(3), run(3));
}

}  // namespace
}  // namespace minitron::scheduler
