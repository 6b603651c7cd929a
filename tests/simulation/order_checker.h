// OrderChecker: whether the queue keeps its promises, seen from outside: nobody is refused without need, nobody jumps
// the queue, classes are strict but for the wait bound, and tenants are charged for what they got. It keeps its own
// books; of the scheduler it reads only which sequences wait and run, and the counters it checks.
#pragma once

#include <map>
#include <set>
#include <string>
#include <utility>

#include "scheduler/queue_ledger.h"
#include "scheduler/scheduler.h"
#include "tests/simulation/marks.h"

namespace minitron::simulation {

class OrderChecker {
 public:
  // `marks` and `violations` must outlive this object.
  OrderChecker(const scheduler::FairQueueOptions& fairness, const scheduler::QueueLimits& limits, Marks* marks,
               Violations* violations)
      : fairness_(fairness), limits_(limits), marks_(marks), violations_(violations) {}

  // A request that was refused with UNAVAILABLE while the server neither drained nor failed; or taken.
  void OnRefused(const scheduler::Request& request, const absl::Status& status);
  void OnAccepted(const scheduler::Request& request);

  void BeforeStep(const scheduler::Scheduler& scheduler);
  void OnToken(const scheduler::TokenEvent& event);
  void OnFinish(const scheduler::FinishEvent& event);
  // Whatever was started was so between `start` and `end`.
  void AfterStep(const scheduler::Scheduler& scheduler, scheduler::TimePoint start, scheduler::TimePoint end);

 private:
  using Key = std::pair<scheduler::RequestId, int>;
  using Account = std::pair<int, std::string>;  // priority, tenant
  struct Entry {
    Account account;
    int64_t num_prompt_tokens = 0;
    scheduler::QueuedWork work;
    bool is_single = false;  // the only sequence of its request: waits for no sibling
    bool started = false;
    bool ended = false;
    bool waited_before = false;  // at the beginning of the step, and for nobody's work
    bool started_now = false;
    bool preempted_before = false;
  };
  struct Before {
    double counter = 0;
    int num_waiting = 0;
    int num_preemptions = 0;
  };

  // How far the service of two tenants of a class has drifted apart while both kept waiting.
  struct Drift {
    double now = 0, least = 0, most = 0;
    int num_steps = 0;
  };

  // What never ran, of one tenant or of all.
  int64_t Queued(const std::string* tenant, int64_t scheduler::QueuedWork::*amount) const;
  void NoteStarted(Entry& entry, int num_cached_tokens);
  void CheckTurns(const scheduler::Scheduler& scheduler, scheduler::TimePoint start, scheduler::TimePoint end);
  void CheckTurn(const Key& started, const Key& waiting, scheduler::TimePoint end);
  void CheckCharges(const scheduler::Scheduler& scheduler);
  // Two tenants of a class that both keep waiting get the same, up to a bound.
  void CheckServiceGap(const scheduler::Scheduler& scheduler);

  const scheduler::FairQueueOptions fairness_;
  const scheduler::QueueLimits limits_;
  Marks* const marks_;            // owned by the caller of the constructor
  Violations* const violations_;  // likewise
  std::map<Key, Entry> entries_;
  std::set<std::string> tenants_;
  std::map<int, scheduler::TimePoint> last_start_;  // by priority
  std::map<Account, Before> before_;
  std::map<Account, double> rendered_;  // in this step
  std::map<std::pair<Account, Account>, Drift> drifts_;
  double longest_prompt_ = 0, longest_output_ = 0;  // tokens, of all accepted so far
};

}  // namespace minitron::simulation
