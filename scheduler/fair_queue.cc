#include "scheduler/fair_queue.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"

namespace minitron::scheduler {

// One tenant in one class.
struct FairShareAccount {
  std::string tenant;
  int priority = 0;
  double counter = 0;  // the virtual token counter
  double charge = 0;   // to be added to it
  int num_live = 0;
  int num_waiting = 0;  // in `queue`, or popped and not yet started or put back
  std::set<FairQueue::SequencePtr, ServedBefore> queue;
};

bool FairQueue::ByCounter::operator()(const Account* a, const Account* b) const {
  if (a->counter != b->counter) return a->counter < b->counter;
  if (a->queue.empty() || b->queue.empty()) return a->tenant < b->tenant;  // idle accounts
  const Sequence& head_a = **a->queue.begin();
  const Sequence& head_b = **b->queue.begin();
  if (ServedBefore()(head_a, head_b)) return true;
  return !ServedBefore()(head_b, head_a) && a->tenant < b->tenant;
}

struct FairQueue::Class {
  std::map<std::string, std::unique_ptr<Account>> accounts;
  std::set<Account*, ByCounter> ready;  // with a non-empty queue
  std::set<Account*, ByCounter> idle;   // without a live sequence
  int num_live = 0;
  int num_waiting = 0;
  double last_level = 0;                // counter of the account that stopped waiting last, then or since
  const Account* last_ready = nullptr;  // that account, while it exists
  TimePoint passed_over_since{};        // valid while num_waiting > 0
};

FairQueue::FairQueue(const FairQueueOptions& options) : options_(options) {}
FairQueue::~FairQueue() = default;

FairQueue::Class& FairQueue::ClassOf(const Account& account) { return *classes_.at(account.priority); }

void FairQueue::Attach(Sequence& sequence) {
  CHECK(sequence.fair_share() == nullptr);
  const Request& request = sequence.request();
  std::unique_ptr<Class>& slot = classes_[request.priority];
  if (slot == nullptr) slot = std::make_unique<Class>();
  Class& level = *slot;
  const auto [it, inserted] = level.accounts.try_emplace(request.tenant);
  if (inserted) {
    it->second = std::make_unique<Account>();
    it->second->tenant = request.tenant;
    it->second->priority = request.priority;
  }
  Account& account = *it->second;
  if (!inserted && account.num_live == 0) level.idle.erase(&account);
  ++account.num_live;
  ++level.num_live;
  sequence.set_fair_share(&account);
}

void FairQueue::Detach(Sequence& sequence) {
  ApplyCharges();
  Account& account = *sequence.fair_share();
  sequence.set_fair_share(nullptr);
  Class& level = ClassOf(account);
  --level.num_live;
  if (--account.num_live == 0) {
    CHECK(account.num_waiting == 0);
    level.idle.insert(&account);
  }
  // Nobody competes in a class without live sequences, so nobody is owed anything.
  if (level.num_live == 0) {
    classes_.erase(account.priority);
  } else {
    ForgetIdle(level);
  }
}

double FairQueue::LiftLevel(const Class& level) const {
  if (!level.ready.empty()) return (*level.ready.begin())->counter;
  return level.last_ready != nullptr ? level.last_ready->counter : level.last_level;
}

// An idle account whose counter would be lifted on its return says nothing.
void FairQueue::ForgetIdle(Class& level) {
  const double lift = LiftLevel(level) - options_.burst_credit;
  while (!level.idle.empty()) {
    Account* const account = *level.idle.begin();
    if (account->counter > lift && level.idle.size() <= kMaxIdleAccounts) return;
    level.idle.erase(level.idle.begin());
    if (level.last_ready == account) {
      level.last_level = account->counter;
      level.last_ready = nullptr;
    }
    level.accounts.erase(account->tenant);
  }
}

void FairQueue::Add(const SequencePtr& sequence, TimePoint now) {
  ApplyCharges();
  Account& account = *sequence->fair_share();
  Class& level = ClassOf(account);
  if (account.num_waiting == 0) account.counter = std::max(account.counter, LiftLevel(level) - options_.burst_credit);
  if (level.num_waiting == 0) level.passed_over_since = now;
  ++account.num_waiting;
  ++level.num_waiting;
  ++num_waiting_;
  Insert(level, account, sequence);
}

void FairQueue::Remove(const SequencePtr& sequence) {
  ApplyCharges();
  Account& account = *sequence->fair_share();
  Class& level = ClassOf(account);
  Erase(level, account, sequence);
  StopsWaiting(level, account);
}

FairQueue::SequencePtr FairQueue::Pop(TimePoint now) {
  ApplyCharges();
  Class* const level = NextClass(now);
  if (level == nullptr) return nullptr;
  Account& account = **level->ready.begin();
  SequencePtr sequence = *account.queue.begin();
  Erase(*level, account, sequence);
  return sequence;
}

FairQueue::Class* FairQueue::NextClass(TimePoint now) {
  Class* next = nullptr;
  Class* overdue = nullptr;
  for (auto& [priority, level] : classes_) {
    if (level->ready.empty()) continue;
    if (next == nullptr) {
      next = level.get();  // nobody passes over the highest
      continue;
    }
    if (now - level->passed_over_since < options_.wait_bound) continue;
    if (overdue == nullptr || level->passed_over_since < overdue->passed_over_since) overdue = level.get();
  }
  return overdue != nullptr ? overdue : next;
}

const Sequence* FairQueue::Peek(TimePoint now) {
  ApplyCharges();
  const Class* const level = NextClass(now);
  return level == nullptr ? nullptr : (*(*level->ready.begin())->queue.begin()).get();
}

bool FairQueue::GoesBefore(const Sequence& waiting, const Sequence& running) {
  if (waiting.request().priority != running.request().priority) {
    return waiting.request().priority > running.request().priority;
  }
  return waiting.fair_share()->counter < running.start_tag();
}

bool FairQueue::IsBehindOthers(const Sequence& sequence) const {
  const Account& own = *sequence.fair_share();
  const auto& ready = classes_.at(own.priority)->ready;
  // Only the first can be the sequence's own: what comes after it has received as much or more.
  const auto other =
      std::find_if(ready.begin(), ready.end(), [&own](const Account* account) { return account != &own; });
  return other != ready.end() && own.counter < (*other)->counter;
}

void FairQueue::PutBack(const SequencePtr& sequence) {
  Account& account = *sequence->fair_share();
  Insert(ClassOf(account), account, sequence);
}

void FairQueue::Started(Sequence& sequence, int num_prompt_tokens, TimePoint now) {
  Account& account = *sequence.fair_share();
  Class& level = ClassOf(account);
  level.passed_over_since = now;
  sequence.set_start_tag(account.counter);
  Charge(account, options_.prompt_token_weight * num_prompt_tokens);
  StopsWaiting(level, account);
  if (account.num_waiting == 0 && level.num_waiting > 0) light_tenant_until_ = now + options_.light_tenant_memory;
}

void FairQueue::ChargeOutput(Sequence& sequence, int num_tokens) {
  Charge(*sequence.fair_share(), options_.output_token_weight * num_tokens);
}

void FairQueue::Charge(Account& account, double service) {
  if (service == 0) return;
  if (account.charge == 0) charged_.push_back(&account);
  account.charge += service;
}

void FairQueue::ApplyCharges() {
  for (Account* account : charged_) {
    Class& level = ClassOf(*account);
    // The counter is part of the place in the set. A node taken out and put back allocates nothing.
    auto node = account->queue.empty() ? decltype(level.ready)::node_type() : level.ready.extract(account);
    account->counter += std::exchange(account->charge, 0);
    if (!node.empty()) level.ready.insert(std::move(node));
  }
  charged_.clear();
}

void FairQueue::Insert(Class& level, Account& account, const SequencePtr& sequence) {
  if (!account.queue.empty()) level.ready.erase(&account);
  CHECK(account.queue.insert(sequence).second);
  level.ready.insert(&account);
}

void FairQueue::Erase(Class& level, Account& account, const SequencePtr& sequence) {
  level.ready.erase(&account);
  CHECK(account.queue.erase(sequence) == 1);
  if (!account.queue.empty()) level.ready.insert(&account);
}

void FairQueue::StopsWaiting(Class& level, Account& account) {
  --num_waiting_;
  --level.num_waiting;
  if (--account.num_waiting > 0) return;
  level.last_ready = &account;
}

void FairQueue::ForEach(const std::function<void(const SequencePtr&)>& visit) const {
  for (const auto& [priority, level] : classes_) {
    for (const auto& [tenant, account] : level->accounts) {
      for (const SequencePtr& sequence : account->queue) visit(sequence);
    }
  }
}

double FairQueue::counter(int priority, const std::string& tenant) const {
  const auto level = classes_.find(priority);
  if (level == classes_.end()) return 0;
  const auto account = level->second->accounts.find(tenant);
  return account == level->second->accounts.end() ? 0 : account->second->counter + account->second->charge;
}

int FairQueue::num_accounts() const {
  size_t count = 0;
  for (const auto& [priority, level] : classes_) count += level->accounts.size();
  return static_cast<int>(count);
}

absl::Status FairQueue::CheckConsistent() const {
  int num_waiting = 0;
  for (const auto& [priority, owned] : classes_) {
    const Class& level = *owned;
    int num_live = 0;
    size_t num_ready = 0, num_idle = 0;
    for (const auto& [tenant, account] : level.accounts) {
      num_live += account->num_live;
      num_waiting += account->num_waiting;
      num_ready += account->queue.empty() ? 0 : 1;
      num_idle += account->num_live == 0 ? 1 : 0;
      if (static_cast<int>(account->queue.size()) != account->num_waiting || account->num_waiting > account->num_live) {
        return absl::InternalError(absl::StrCat("tenant has ", account->queue.size(), " queued, ", account->num_waiting,
                                                " waiting, ", account->num_live, " live sequences"));
      }
    }
    if (num_live != level.num_live || num_live == 0) return absl::InternalError("a class miscounts its live sequences");
    if (num_ready != level.ready.size() || num_idle != level.idle.size() || num_idle > kMaxIdleAccounts) {
      return absl::InternalError("a class has accounts in the wrong set");
    }
    if (!std::is_sorted(level.ready.begin(), level.ready.end(), ByCounter())) {
      return absl::InternalError("accounts are out of order");
    }
  }
  if (num_waiting != num_waiting_) return absl::InternalError("the queue miscounts its sequences");
  return absl::OkStatus();
}

}  // namespace minitron::scheduler
