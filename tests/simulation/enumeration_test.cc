// Small-scope enumeration: up to three requests in up to four blocks, and every interleaving of submit, abort, expiry
// and step within the first steps of their lives. Each is run to its end; the world checks every state against the
// invariants and every token against the oracle. Most bugs of a scheduler show with two requests that meet at the wrong
// moment; here all moments are tried.
//
// MINITRON_ENUM_STEPS=n moves the events among the first n steps instead of four.
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/simulation/world.h"

namespace minitron::simulation {
namespace {

using scheduler::Request;
using std::chrono::milliseconds;

constexpr int kNumRequests = 3;
constexpr int kNever = -1;

// Before which step each event happens. Events before the same step are seen by it together, in any order, because the
// inbox hands over requests first and then cancellations.
struct Schedule {
  int submit[kNumRequests];
  int abort[kNumRequests];
  int expire;  // time passes the deadline of request 1

  std::string Describe() const {
    std::string text;
    for (int i = 0; i < kNumRequests; ++i) {
      text += "request " + std::to_string(i + 1) + " at " + std::to_string(submit[i]) + ", cancelled at " +
              std::to_string(abort[i]) + "; ";
    }
    return text + "expiry at " + std::to_string(expire);
  }
};

struct Scope {
  WorldOptions world;
  std::vector<Request> requests;
};

Request MakeRequest(int index, std::vector<engine::TokenId> prompt, int max_tokens) {
  Request request;
  request.id = index + 1;
  request.prompt_token_ids = std::move(prompt);
  request.max_tokens = max_tokens;
  request.params.seed = 77 + index;
  return request;
}

// Three requests for a pool of so many blocks of two tokens: the first has a deadline, the second may share the first's
// prefix and has a sibling, the third is of another tenant and class.
Scope MakeScope(int num_blocks, scheduler::AdmissionMode mode, scheduler::Overlap overlap) {
  Scope scope;
  testing::FakeModelRunnerOptions& runner = scope.world.runner;
  runner.num_kv_blocks = num_blocks;
  runner.block_size = 2;
  runner.max_num_tokens = 4;
  runner.max_num_sequences = 2;
  runner.max_context_tokens = 8;
  runner.vocab_size = 16;
  runner.compute_late = overlap == scheduler::Overlap::kOn;
  scope.world.core.scheduler.max_prefill_chunk = 2;
  scope.world.core.scheduler.admission_mode = mode;
  scope.world.core.scheduler.max_preemptions = 1;
  scope.world.core.scheduler.fairness.wait_bound = milliseconds(3);
  scope.world.core.overlap = overlap;
  scope.world.step_time = milliseconds(1);
  const int room = 2 * num_blocks;  // tokens
  const int num_prompt = std::min(3, room - 1);
  std::vector<engine::TokenId> prompt = {5, 6, 7};
  prompt.resize(num_prompt);
  const int max_tokens = std::min(3, room - num_prompt);
  scope.requests.push_back(MakeRequest(0, prompt, max_tokens));
  scope.requests[0].deadline = scheduler::TimePoint(std::chrono::seconds(50));
  scope.requests.push_back(MakeRequest(1, prompt, max_tokens));
  scope.requests[1].num_sequences = 2;
  scope.requests[1].eos_token_ids = {0, 1, 2, 3, 4, 5, 6, 7};  // half of the vocabulary: often the row ahead is wasted
  scope.requests[1].params.repetition_penalty = 1.5f;
  scope.requests.push_back(MakeRequest(2, {9}, std::min(2, room - 1)));
  scope.requests[2].priority = 1;
  scope.requests[2].tenant = "other";
  return scope;
}

std::string current;  // for the signal handler

void PrintOnAbort(int) {
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, current.data(), current.size());
}

// Returns the number of steps.
int RunSchedule(const Scope& scope, const Schedule& schedule, Marks* marks) {
  Violations violations;
  World world(scope.world, marks, &violations);
  int step = 0;
  const auto events_are_over = [&] {
    for (int i = 0; i < kNumRequests; ++i) {
      if (schedule.submit[i] >= step || schedule.abort[i] >= step) return false;
    }
    return schedule.expire < step;
  };
  for (; !events_are_over() || !world.idle(); ++step) {
    for (int i = 0; i < kNumRequests; ++i) {
      if (schedule.submit[i] == step) world.Submit(scope.requests[i]);
    }
    for (int i = 0; i < kNumRequests; ++i) {
      if (schedule.abort[i] == step) world.Abort(scope.requests[i].id);
    }
    if (schedule.expire == step) world.Advance(std::chrono::seconds(100));
    world.Step();
    violations.Expect(step < 200, "the work ends");
    if (!violations.empty()) break;
  }
  if (violations.empty()) world.CheckNothingIsLeft();
  for (const std::string& violation : violations.list()) {
    ADD_FAILURE() << "violated: " << violation << "\n" << schedule.Describe();
  }
  return step;
}

// All schedules with events before steps 0 to num_steps - 1, or never; the first request comes at step 0.
template <typename Visit>
void ForEachSchedule(int num_steps, const Visit& visit) {
  Schedule schedule{};
  for (int second = 0; second < num_steps; ++second) {
    for (int third = 0; third < num_steps; ++third) {
      schedule.submit[1] = second;
      schedule.submit[2] = third;
      for (int a = kNever; a < num_steps; ++a) {
        for (int b = kNever; b < num_steps; ++b) {
          // A cancellation before its request is one of an unknown id, which the swarm tries.
          if (b != kNever && b < second) continue;
          for (int c = kNever; c < num_steps; ++c) {
            if (c != kNever && c < third) continue;
            schedule.abort[0] = a;
            schedule.abort[1] = b;
            schedule.abort[2] = c;
            for (schedule.expire = kNever; schedule.expire < num_steps; ++schedule.expire) visit(schedule);
          }
        }
      }
    }
  }
}

TEST(Enumeration, EveryInterleavingKeepsTheInvariants) {
  std::signal(SIGABRT, PrintOnAbort);
  const char* const asked = std::getenv("MINITRON_ENUM_STEPS");
  const int num_steps = asked == nullptr ? 4 : std::atoi(asked);
  Marks marks;
  int64_t num_runs = 0, num_run_steps = 0;
  for (int num_blocks = 1; num_blocks <= 4; ++num_blocks) {
    for (const auto mode : {scheduler::AdmissionMode::kOptimistic, scheduler::AdmissionMode::kReserve}) {
      for (const auto overlap : {scheduler::Overlap::kOff, scheduler::Overlap::kOn}) {
        const Scope scope = MakeScope(num_blocks, mode, overlap);
        ForEachSchedule(num_steps, [&](const Schedule& schedule) {
          if (HasFailure()) return;
          current = "aborted at " + std::to_string(num_blocks) + " blocks: " + schedule.Describe() + "\n";
          num_run_steps += RunSchedule(scope, schedule, &marks);
          ++num_runs;
        });
      }
    }
  }
  std::printf("%lld interleavings, %lld steps\n", static_cast<long long>(num_runs),
              static_cast<long long>(num_run_steps));
  if (HasFailure()) return;
  for (const char* mark :
       {"preempted", "waited for a block being computed", "cancelled in prefill", "deadline in queue",
        "deadline after tokens", "cancelled follower in queue", "hit on block of another request",
        "two steps in flight", "blocks held for a row in flight"}) {
    EXPECT_GT(marks.counts().at(mark), 0) << mark << " never happened";
  }
}

}  // namespace
}  // namespace minitron::simulation
