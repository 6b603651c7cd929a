#include "server/constraint/pushdown.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace minitron::server::constraint {

Stacks::Id Stacks::Push(Id stack, uint32_t state) {
  const auto [found, is_new] = ids_.emplace(uint64_t{stack} << 32 | state, static_cast<Id>(nodes_.size()));
  if (is_new) nodes_.push_back({stack, state});
  return found->second;
}

std::vector<Stacks::Id> Stacks::KeepOnly(const std::vector<Id>& used) {
  constexpr Id kUnused = UINT32_MAX;
  std::vector<Id> new_ids(nodes_.size(), kUnused);
  for (Id id : used) {
    for (; id != kBottom && new_ids[id] == kUnused; id = Pop(id)) new_ids[id] = kBottom;  // used: numbered below
  }
  const std::vector<Node> old = std::exchange(nodes_, {{kBottom, 0}});
  ids_.clear();
  new_ids[kBottom] = kBottom;
  for (Id id = 1; id < old.size(); ++id) {  // what is below has the lower id
    if (new_ids[id] != kUnused) new_ids[id] = Push(new_ids[old[id].below], old[id].state);
  }
  std::vector<Id> result;
  result.reserve(used.size());
  for (const Id id : used) result.push_back(new_ids[id]);
  return result;
}

absl::StatusOr<Pushdown> Pushdown::Compile(const GrammarRules& rules, AutomatonLimits limits) {
  Pushdown pushdown;
  for (size_t rule = 0; rule < rules.patterns.size(); ++rule) {
    const absl::StatusOr<ByteAutomaton> automaton = ByteAutomaton::Compile(rules.patterns[rule], limits);
    if (!automaton.ok()) {
      return absl::Status(automaton.status().code(), absl::StrCat(automaton.status().message(), " for rule ",
                                                                  rules.names[rule], ", beside the other rules"));
    }
    limits.max_states -= automaton->num_states();
    limits.max_work -= automaton->work();
    pushdown.AddRule(static_cast<int>(rule), *automaton);
  }
  pushdown.ResolveCalls();
  RETURN_IF_ERROR(pushdown.FindReturns(static_cast<int>(rules.patterns.size()), limits.max_work));
  RETURN_IF_ERROR(pushdown.CheckLeftRecursion(rules.names));
  return pushdown;
}

// Calls name their rule until all are there.
void Pushdown::AddRule(int rule, const ByteAutomaton& automaton) {
  const auto base = static_cast<uint32_t>(states_.size()) - ByteAutomaton::kStart;
  const auto global = [base](ByteAutomaton::State state) { return state == ByteAutomaton::kDead ? 0 : base + state; };
  start_of_.push_back(global(ByteAutomaton::kStart));
  for (ByteAutomaton::State s = ByteAutomaton::kStart; s < static_cast<uint32_t>(automaton.num_states()); ++s) {
    State state;
    state.rule = rule;
    state.is_end = automaton.IsEnd(s);
    for (int byte = 0; byte < 256; ++byte) {
      state.next[byte] = global(automaton.Next(s, static_cast<unsigned char>(byte)));
      state.reads |= state.next[byte] != 0;
    }
    for (const ByteAutomaton::Call& call : automaton.calls(s)) {
      state.calls.push_back({static_cast<uint32_t>(call.rule), global(call.target)});
    }
    states_.push_back(std::move(state));
  }
}

void Pushdown::ResolveCalls() {
  for (State& state : states_) {
    for (Call& call : state.calls) {
      call.start = start_of_[call.start];
      const State& target = states_[call.return_to];
      if (target.is_end && !target.reads && target.calls.empty()) call.return_to = 0;
    }
  }
}

absl::Status Pushdown::FindReturns(int num_rules, int64_t max_work) {
  std::vector<std::set<uint32_t>> returns(num_rules);
  int64_t work = 0;
  for (bool changed = true; changed;) {
    changed = false;
    for (const State& state : states_) {
      for (const Call& call : state.calls) {
        std::set<uint32_t>& of_called = returns[states_[call.start].rule];
        const size_t before = of_called.size();
        if (call.return_to != 0) {
          of_called.insert(call.return_to);
        } else if (&of_called != &returns[state.rule]) {
          of_called.insert(returns[state.rule].begin(), returns[state.rule].end());
          work += static_cast<int64_t>(returns[state.rule].size());
        }
        changed |= of_called.size() != before;
        if (++work > max_work)
          return absl::ResourceExhaustedError(absl::StrCat("needs more than ", max_work, " steps"));
      }
    }
  }
  for (const std::set<uint32_t>& of_rule : returns) returns_to_.emplace_back(of_rule.begin(), of_rule.end());
  return absl::OkStatus();
}

// A rule that calls itself before anything is read would never come to an end. Which rules may be empty is found on
// the way, as closing a stack would not end either.
absl::Status Pushdown::CheckLeftRecursion(const std::vector<std::string>& names) const {
  const auto num_rules = static_cast<int>(start_of_.size());
  std::vector<bool> nullable(num_rules, false);
  std::vector<std::set<int>> called(num_rules);  // before anything is read
  for (bool changed = true; changed;) {
    changed = false;
    for (int rule = 0; rule < num_rules; ++rule) {
      std::set<uint32_t> seen;
      std::vector<uint32_t> pending = {start_of_[rule]};
      bool ends = false;
      while (!pending.empty()) {
        const uint32_t id = pending.back();
        pending.pop_back();
        if (!seen.insert(id).second) continue;
        const State& state = states_[id];
        ends |= state.is_end;
        for (const Call& call : state.calls) {
          const int callee = states_[call.start].rule;
          called[rule].insert(callee);
          if (!nullable[callee]) continue;
          if (call.return_to == 0) {
            ends = true;
          } else {
            pending.push_back(call.return_to);
          }
        }
      }
      if (ends && !nullable[rule]) nullable[rule] = changed = true;
    }
  }
  for (int rule = 0; rule < num_rules; ++rule) {
    std::set<int> seen;
    std::vector<int> pending(called[rule].begin(), called[rule].end());
    while (!pending.empty()) {
      const int next = pending.back();
      pending.pop_back();
      if (!seen.insert(next).second) continue;
      pending.insert(pending.end(), called[next].begin(), called[next].end());
    }
    if (seen.count(rule) > 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("rule ", names[rule], " starts with itself through other rules; start it with what it reads"));
    }
  }
  return absl::OkStatus();
}

Parses Pushdown::Step(const Parses& parses, unsigned char byte, Stacks& stacks) const {
  if (parses.too_many) return parses;
  std::vector<Parse> next;
  for (const Parse& parse : parses.open) {
    const uint32_t state = states_[parse.state].next[byte];
    if (state != 0) next.push_back({state, parse.stack});
  }
  return Close(std::move(next), stacks);
}

Parses Pushdown::Close(std::vector<Parse> pending, Stacks& stacks) const {
  Parses closed;
  std::set<Parse> seen;
  while (!pending.empty()) {
    const Parse parse = pending.back();
    pending.pop_back();
    if (!seen.insert(parse).second) continue;
    ++stacks.num_looked_at;
    if (seen.size() > 4 * Parses::kMax || pending.size() > 8 * Parses::kMax || closed.open.size() > Parses::kMax) {
      return {.open = {}, .too_many = true};
    }
    const State& state = states_[parse.state];
    if (state.reads) closed.open.push_back(parse);
    for (const Call& call : state.calls) {
      pending.push_back({call.start, call.return_to == 0 ? parse.stack : stacks.Push(parse.stack, call.return_to)});
    }
    if (!state.is_end) continue;
    if (parse.stack == Stacks::kBottom) {
      closed.ended = true;
    } else {
      pending.push_back({stacks.Top(parse.stack), stacks.Pop(parse.stack)});
    }
  }
  std::sort(closed.open.begin(), closed.open.end());
  return closed;
}

}  // namespace minitron::server::constraint
