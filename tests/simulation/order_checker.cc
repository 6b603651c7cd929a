#include "tests/simulation/order_checker.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace minitron::simulation {

using scheduler::QueuedWork;
using scheduler::Request;
using scheduler::Sequence;
using scheduler::TimePoint;

int64_t OrderChecker::Queued(const std::string* tenant, int64_t QueuedWork::*amount) const {
  int64_t sum = 0;
  for (const auto& [key, entry] : entries_) {
    if (entry.started || entry.ended || (tenant != nullptr && entry.account.second != *tenant)) continue;
    sum += entry.work.*amount;
  }
  return sum;
}

void OrderChecker::OnRefused(const Request& request, const absl::Status& status) {
  const auto payload = status.GetPayload(scheduler::kReasonTypeUrl);
  const std::string reason = payload.has_value() ? std::string(*payload) : "";
  violations_->Expect(status.GetPayload(scheduler::kRetryTypeUrl).has_value() &&
                          status.GetPayload(scheduler::kQueueDepthTypeUrl) ==
                              absl::Cord(absl::StrCat(Queued(nullptr, &QueuedWork::num_sequences))),
                      "a refusal says when to come back and how deep the queue is:", request.id);
  if (reason == scheduler::kReasonDeadlineUnreachable) {
    violations_->Expect(std::min(request.deadline, request.first_token_deadline) < TimePoint::max() &&
                            Queued(&request.tenant, &QueuedWork::num_sequences) > 0,
                        "only a wait behind one's own can put a deadline out of reach:", request.id);
    return marks_->Hit("refused: deadline out of reach");
  }
  const bool tokens = reason == scheduler::kReasonQueuedTokensFull;
  const bool bytes = reason == scheduler::kReasonQueuedBytesFull;
  violations_->Expect(tokens || bytes || reason == scheduler::kReasonQueueFull,
                      "a refusal names its reason:", request.id);
  const int64_t limit = tokens ? limits_.max_prompt_tokens : bytes ? limits_.max_bytes : limits_.max_sequences;
  int64_t QueuedWork::*const amount = tokens  ? &QueuedWork::num_prompt_tokens
                                      : bytes ? &QueuedWork::num_bytes
                                              : &QueuedWork::num_sequences;
  const int64_t wanted = scheduler::WorkOf(request).*amount;
  const bool is_full = Queued(nullptr, amount) + wanted > limit;
  // Tenants that left a minute ago may count or not; the least part there is assumes that all ever seen are about.
  const auto num_tenants = static_cast<int64_t>(tenants_.size() + 1 - tenants_.count(request.tenant));
  const bool over_share = Queued(&request.tenant, amount) + wanted > std::max<int64_t>(1, limit / num_tenants);
  violations_->Expect(is_full || (num_tenants > 1 && over_share),
                      "only a full queue, or a full share of it, refuses:", request.id);
  marks_->Hit(tokens    ? "refused: tokens full"
              : bytes   ? "refused: bytes full"
              : is_full ? "refused: queue full"
                        : "refused: queue share full");
}

void OrderChecker::OnAccepted(const Request& request) {
  const auto num_prompt = static_cast<int64_t>(request.prompt_token_ids.size());
  const int64_t tokens = Queued(nullptr, &QueuedWork::num_prompt_tokens);
  const int64_t bytes = Queued(nullptr, &QueuedWork::num_bytes);
  violations_->Expect(Queued(nullptr, &QueuedWork::num_sequences) + request.num_sequences <= limits_.max_sequences &&
                          (tokens == 0 || tokens + num_prompt <= limits_.max_prompt_tokens) &&
                          (bytes == 0 || bytes + scheduler::WorkOf(request).num_bytes <= limits_.max_bytes),
                      "the queue bounds are kept:", request.id);
  longest_prompt_ = std::max(longest_prompt_, static_cast<double>(num_prompt));
  longest_output_ = std::max(longest_output_, static_cast<double>(request.max_tokens));
  tenants_.insert(request.tenant);
  for (int index = 0; index < request.num_sequences; ++index) {
    Entry& entry = entries_[{request.id, index}];
    entry.account = {request.priority, request.tenant};
    entry.num_prompt_tokens = num_prompt;
    entry.work = scheduler::WorkOf(request, index);
    entry.is_single = request.num_sequences == 1;
  }
}

void OrderChecker::BeforeStep(const scheduler::Scheduler& scheduler) {
  before_.clear();
  rendered_.clear();
  for (auto& [key, entry] : entries_) entry.waited_before = entry.started_now = entry.preempted_before = false;
  const auto account_of = [](const Sequence& s) { return Account{s.request().priority, s.request().tenant}; };
  scheduler.fair_queue().ForEach([&](const std::shared_ptr<Sequence>& sequence) {
    Entry& entry = entries_.at({sequence->id(), sequence->index()});
    entry.waited_before = entry.is_single && sequence->num_block_waits() == 0;
    entry.preempted_before = sequence->num_preemptions() > 0;
    Before& before = before_[account_of(*sequence)];
    ++before.num_waiting;
    before.num_preemptions += sequence->num_preemptions();
  });
  for (const auto& sequence : scheduler.running()) {
    before_[account_of(*sequence)].num_preemptions += sequence->num_preemptions();
  }
  for (auto& [account, before] : before_)
    before.counter = scheduler.fair_queue().counter(account.first, account.second);
}

void OrderChecker::NoteStarted(Entry& entry, int num_cached_tokens) {
  entry.started = entry.started_now = true;
  rendered_[entry.account] +=
      fairness_.prompt_token_weight * static_cast<double>(entry.num_prompt_tokens - num_cached_tokens);
}

void OrderChecker::OnToken(const scheduler::TokenEvent& event) {
  rendered_[entries_.at({event.id, event.index}).account] += fairness_.output_token_weight;
}

void OrderChecker::OnFinish(const scheduler::FinishEvent& event) {
  Entry& entry = entries_.at({event.id, event.index});
  if (event.first_scheduled != TimePoint{} && !entry.started) NoteStarted(entry, event.num_cached_tokens);
  entry.ended = true;
}

void OrderChecker::AfterStep(const scheduler::Scheduler& scheduler, TimePoint start, TimePoint end) {
  const auto look = [this](const std::shared_ptr<Sequence>& sequence) {
    Entry& entry = entries_.at({sequence->id(), sequence->index()});
    if (sequence->ever_scheduled() && !entry.started) NoteStarted(entry, sequence->num_cached_tokens());
  };
  for (const auto& sequence : scheduler.running()) look(sequence);
  scheduler.fair_queue().ForEach(look);
  CheckTurns(scheduler, start, end);
  CheckCharges(scheduler);
  CheckServiceGap(scheduler);
}

void OrderChecker::CheckTurns(const scheduler::Scheduler& scheduler, TimePoint start, TimePoint end) {
  std::vector<Key> started, waiting;
  for (const auto& [key, entry] : entries_) {
    if (entry.started_now) started.push_back(key);
  }
  if (started.empty()) return;
  scheduler.fair_queue().ForEach([&](const std::shared_ptr<Sequence>& sequence) {
    const Key key{sequence->id(), sequence->index()};
    // Who waited all the step and was not even popped had everything that the started ones had, but the turn.
    if (entries_.at(key).waited_before && sequence->num_block_waits() == 0) waiting.push_back(key);
  });
  for (const Key& s : started) {
    for (const Key& w : waiting) CheckTurn(s, w, end);
  }
  for (const Key& key : started) last_start_[entries_.at(key).account.first] = start;
  // Between tenants of a class it is the turn of who has received less.
  for (const auto& sequence : scheduler.running()) {
    const Account& account = entries_.at({sequence->id(), sequence->index()}).account;
    if (!entries_.at({sequence->id(), sequence->index()}).started_now) continue;
    for (const Key& w : waiting) {
      const Account& other = entries_.at(w).account;
      if (other == account || other.first != account.first) continue;
      violations_->Expect(sequence->start_tag() <= scheduler.fair_queue().counter(other.first, other.second),
                          "it is the turn of the tenant that has received least:", sequence->id(), w.first);
    }
  }
}

void OrderChecker::CheckTurn(const Key& started, const Key& waiting, TimePoint end) {
  const Entry& s = entries_.at(started);
  const Entry& w = entries_.at(waiting);
  if (s.account == w.account) {
    // Ids are given in order of arrival.
    violations_->Expect(started < waiting && !w.preempted_before,
                        "inside a tenant the preempted go first, then who came first:", started.first, waiting.first);
  } else if (s.account.first < w.account.first) {
    const auto last = last_start_.find(s.account.first);
    violations_->Expect(last == last_start_.end() || end - last->second >= fairness_.wait_bound,
                        "a lower class goes first only once per wait bound:", started.first, waiting.first);
    marks_->Hit("passed-over class had its turn");
  }
}

void OrderChecker::CheckCharges(const scheduler::Scheduler& scheduler) {
  std::map<Account, int> num_preemptions;
  const auto look = [&](const std::shared_ptr<Sequence>& s) {
    num_preemptions[{s->request().priority, s->request().tenant}] += s->num_preemptions();
  };
  for (const auto& sequence : scheduler.running()) look(sequence);
  scheduler.fair_queue().ForEach(look);
  for (const auto& [account, preemptions] : num_preemptions) {
    const auto found = before_.find(account);
    if (found == before_.end()) continue;
    const double charged = scheduler.fair_queue().counter(account.first, account.second) - found->second.counter;
    const double rendered = rendered_[account];
    constexpr double kRounding = 1e-6;
    violations_->Expect(charged >= rendered - kRounding, "a tenant is charged for all it got:", charged, rendered);
    // Who kept waiting is not lifted; who began to wait again, as a preempted one does, may be.
    if (found->second.num_waiting == 0 || preemptions > found->second.num_preemptions) continue;
    violations_->Expect(std::abs(charged - rendered) < kRounding, "a tenant is charged for nothing else:", charged,
                        rendered);
  }
}

void OrderChecker::CheckServiceGap(const scheduler::Scheduler& scheduler) {
  // Who kept waiting, and for nothing but its turn.
  std::map<Account, bool> waits;
  scheduler.fair_queue().ForEach([&](const std::shared_ptr<Sequence>& sequence) {
    const Entry& entry = entries_.at({sequence->id(), sequence->index()});
    const auto [it, is_first] = waits.try_emplace(entry.account, before_.count(entry.account) > 0);
    if (!entry.is_single || sequence->num_block_waits() > 0) it->second = false;
  });
  std::erase_if(drifts_, [&waits](const auto& drift) {
    const auto both_wait = [&waits](const Account& account) {
      const auto found = waits.find(account);
      return found != waits.end() && found->second;
    };
    return !both_wait(drift.first.first) || !both_wait(drift.first.second);
  });
  const double longest = std::max(
      fairness_.prompt_token_weight * longest_prompt_,
      fairness_.output_token_weight * longest_output_ * static_cast<double>(scheduler.max_running_sequences()));
  // And one chunk: the step under way may hold one of one of the two, planned before the other's turn.
  const double chunk = std::min<double>(longest_prompt_, scheduler.max_step_tokens());
  const double bound = fairness_.burst_credit + 2 * longest + fairness_.prompt_token_weight * chunk;
  for (auto a = waits.begin(); a != waits.end(); ++a) {
    for (auto b = std::next(a); b != waits.end() && b->first.first == a->first.first; ++b) {
      if (!a->second || !b->second) continue;
      Drift& drift = drifts_[{a->first, b->first}];
      drift.now += rendered_[a->first] - rendered_[b->first];
      drift.least = std::min(drift.least, drift.now);
      drift.most = std::max(drift.most, drift.now);
      if (++drift.num_steps == 20) marks_->Hit("two tenants kept waiting");
      violations_->Expect(drift.most - drift.least <= bound,
                          "two tenants that keep waiting get the same, up to a bound:", drift.most - drift.least,
                          bound);
    }
  }
}

}  // namespace minitron::simulation
