// Pushdown: the rules of a grammar as deterministic automata over bytes that call each other. A text is in the grammar
// if some sequence of calls and returns reads it; Parses are all sequences that are open, each a state and a stack of
// states to return to.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/constraint/byte_automaton.h"
#include "server/constraint/grammar_rules.h"

namespace minitron::server::constraint {

// Stacks of states, equal ones with equal ids. One thread at a time.
class Stacks {
 public:
  using Id = uint32_t;
  static constexpr Id kBottom = 0;

  Id Push(Id stack, uint32_t state);
  uint32_t Top(Id stack) const { return nodes_[stack].state; }  // requires a stack above the bottom
  Id Pop(Id stack) const { return nodes_[stack].below; }
  int size() const { return static_cast<int>(nodes_.size()); }
  // Forgets all but `used` and what is below them; returns their new ids.
  std::vector<Id> KeepOnly(const std::vector<Id>& used);

  // Parses that were looked at with these stacks so far: what the time went into.
  int64_t num_looked_at = 0;

 private:
  struct Node {
    Id below;
    uint32_t state;
  };
  std::vector<Node> nodes_ = {{kBottom, 0}};
  std::unordered_map<uint64_t, Id> ids_;
};

struct Parse {
  uint32_t state = 0;
  Stacks::Id stack = Stacks::kBottom;
  friend bool operator<(const Parse& a, const Parse& b) {
    return std::tie(a.state, a.stack) < std::tie(b.state, b.stack);
  }
};

struct Parses {
  std::vector<Parse> open;  // sorted; those that can read a byte
  bool ended = false;       // one came to its end with its stack at the bottom
  bool too_many = false;    // more than kMax: nothing else is known then

  static constexpr size_t kMax = 256;

  bool empty() const { return open.empty() && !ended; }
  friend bool operator<(const Parses& a, const Parses& b) {
    return std::tie(a.ended, a.open) < std::tie(b.ended, b.open);
  }
};

class Pushdown {
 public:
  // Errors: as ByteAutomaton::Compile, with the limits for all rules together; INVALID_ARGUMENT for left recursion
  // that is left.
  static absl::StatusOr<Pushdown> Compile(const GrammarRules& rules, AutomatonLimits limits);

  // Ids of states go from 1; 0 is dead.
  int num_states() const { return static_cast<int>(states_.size()); }
  bool reads(uint32_t state) const { return states_[state].reads; }
  int rule_of(uint32_t state) const { return states_[state].rule; }
  // What may lie on top of a stack while `rule` is read.
  const std::vector<uint32_t>& returns_to(int rule) const { return returns_to_[rule]; }

  Parses Start(Stacks& stacks) const { return Close({{start_of_[0], Stacks::kBottom}}, stacks); }
  Parses Step(const Parses& parses, unsigned char byte, Stacks& stacks) const;
  // What `pending` may read next: behind calls, and behind returns where a rule is at its end.
  Parses Close(std::vector<Parse> pending, Stacks& stacks) const;

 private:
  struct Call {
    uint32_t start;      // of the called rule
    uint32_t return_to;  // 0: nothing would be left to do there
  };
  struct State {
    std::array<uint32_t, 256> next;
    std::vector<Call> calls;
    int rule = 0;
    bool is_end = false;
    bool reads = false;
  };

  void AddRule(int rule, const ByteAutomaton& automaton);
  void ResolveCalls();
  absl::Status FindReturns(int num_rules, int64_t max_work);
  absl::Status CheckLeftRecursion(const std::vector<std::string>& names) const;

  std::vector<State> states_ = {State{}};
  std::vector<uint32_t> start_of_;  // by rule
  std::vector<std::vector<uint32_t>> returns_to_;
};

}  // namespace minitron::server::constraint
