// ByteAutomaton: a deterministic automaton over bytes, made from a Pattern. From every state an end can be reached,
// where rules that the pattern names are taken to derive something; it only says where they would be called.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "server/constraint/pattern.h"

namespace minitron::server::constraint {

struct AutomatonLimits {
  int max_nfa_states = 50'000;
  int max_states = 4096;
  int64_t max_work = 20'000'000;  // edges looked at while states are made; about a tenth of a second
};

class ByteAutomaton {
 public:
  using State = uint32_t;
  static constexpr State kDead = 0;
  static constexpr State kStart = 1;
  struct Call {
    int rule;
    State target;  // once the rule has been read
  };

  // Errors: RESOURCE_EXHAUSTED (names the limit), INVALID_ARGUMENT (nothing matches).
  static absl::StatusOr<ByteAutomaton> Compile(const Pattern& pattern, const AutomatonLimits& limits);

  State Next(State state, unsigned char byte) const { return next_[state][byte]; }
  bool IsEnd(State state) const { return is_end_[state]; }
  const std::vector<Call>& calls(State state) const { return calls_[state]; }
  int num_states() const { return static_cast<int>(next_.size()); }  // with kDead
  int64_t work() const { return work_; }                             // what of max_work it took

 private:
  std::vector<std::array<State, 256>> next_;
  std::vector<bool> is_end_;
  std::vector<std::vector<Call>> calls_;
  int64_t work_ = 0;
};

}  // namespace minitron::server::constraint
