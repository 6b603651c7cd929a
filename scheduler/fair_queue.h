// FairQueue: the waiting sequences, and whose turn it is.
//
// Order. Classes of priority are strict: a higher one goes first. Inside a class the tenant that has received the
// least service goes first (a virtual token counter per tenant; Sheng et al., "Fairness in Serving Large Language
// Models"), and inside a tenant preempted sequences, then order of arrival.
//
// Service is prompt tokens computed and output tokens, each with a weight. A tenant that starts to wait is lifted to
// the least counter of the waiting ones less a credit, so staying away saves up no more than a burst. While two tenants
// have work waiting, the service they receive differs by at most
//   credit + 2 * max(prompt weight * longest prompt, output weight * most output tokens of the running sequences).
//
// Wait bound. A class that has work and was passed over for that long is next, once; then its clock starts again. So
// the head of every class starts within the bound (once there is room for it), and a flood of low priority cannot turn
// the order around.
//
// Accounts are kept for tenants with live sequences and for those of the idle ones whose counter still matters: at
// most kMaxIdleAccounts of a class, and none of a class without live sequences. Engine thread only.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "scheduler/sequence.h"

namespace minitron::scheduler {

struct FairQueueOptions {
  double prompt_token_weight = 1.0;
  double output_token_weight = 2.0;  // a token of output keeps a whole step busy, one of a prompt shares it
  // What a tenant that uses less than its share may be ahead: a few requests of it are served before a flood's.
  double burst_credit = 4096;
  Duration wait_bound = std::chrono::seconds(5);
  // How long after a start that left a tenant without waiting sequences, while others still had some, that tenant's
  // next request is expected (ExpectsLightTenant).
  Duration light_tenant_memory = std::chrono::seconds(1);
};

class FairQueue {
 public:
  using SequencePtr = std::shared_ptr<Sequence>;
  static constexpr size_t kMaxIdleAccounts = 1024;

  explicit FairQueue(const FairQueueOptions& options);
  ~FairQueue();
  FairQueue(const FairQueue&) = delete;
  FairQueue& operator=(const FairQueue&) = delete;

  // A sequence begins and ends to be live; it has an account in between. Detach requires that it does not wait.
  void Attach(Sequence& sequence);
  void Detach(Sequence& sequence);

  // A live sequence begins to wait: new, or preempted.
  void Add(const SequencePtr& sequence, TimePoint now);
  // It ends to wait without having been started.
  void Remove(const SequencePtr& sequence);

  // The next, or null; and whether it goes before a running sequence of which not all prompt is computed.
  const Sequence* Peek(TimePoint now);
  static bool GoesBefore(const Sequence& waiting, const Sequence& running);

  // Whether the tenant of a live sequence has received less than every other one of its class that waits, and there is
  // one.
  bool IsBehindOthers(const Sequence& sequence) const;

  // Whether a tenant that asks for less than its share was served lately, so that its next request may come any moment
  // while others always have some waiting.
  bool ExpectsLightTenant(TimePoint now) const { return now < light_tenant_until_; }

  // Takes the next out of the queue, or null. It must be given to Started or PutBack before time goes on; until then
  // it still counts as waiting.
  SequencePtr Pop(TimePoint now);
  void PutBack(const SequencePtr& sequence);
  // It runs, with its tenant's counter as start tag; `num_prompt_tokens` of its prompt will be computed for the first
  // time and are charged.
  void Started(Sequence& sequence, int num_prompt_tokens, TimePoint now);

  // Charges a live sequence's tenant.
  void ChargeOutput(Sequence& sequence, int num_tokens);

  int size() const { return num_waiting_; }
  // In order of class, then tenant name, then service inside the tenant; not the order between tenants.
  void ForEach(const std::function<void(const SequencePtr&)>& visit) const;

  // For tests: the service charged to a tenant in a class; 0 for an unknown one. Counters of forgotten and lifted
  // tenants are not service received.
  double counter(int priority, const std::string& tenant) const;
  int num_accounts() const;
  // INTERNAL with the first contradiction.
  absl::Status CheckConsistent() const;

 private:
  using Account = FairShareAccount;
  struct Class;
  // Least service first; the head that arrived first among equals.
  struct ByCounter {
    bool operator()(const Account* a, const Account* b) const;
  };

  Class& ClassOf(const Account& account);
  double LiftLevel(const Class& level) const;
  void ApplyCharges();
  void Charge(Account& account, double service);
  void Insert(Class& level, Account& account, const SequencePtr& sequence);
  void Erase(Class& level, Account& account, const SequencePtr& sequence);
  void StopsWaiting(Class& level, Account& account);
  Class* NextClass(TimePoint now);
  void ForgetIdle(Class& level);

  const FairQueueOptions options_;
  std::map<int, std::unique_ptr<Class>, std::greater<>> classes_;  // by priority
  std::vector<Account*> charged_;  // accounts with charges to apply; a step charges many times
  int num_waiting_ = 0;
  TimePoint light_tenant_until_{};
};

}  // namespace minitron::scheduler
