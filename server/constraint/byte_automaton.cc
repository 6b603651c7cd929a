#include "server/constraint/byte_automaton.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace minitron::server::constraint {
namespace {

absl::Status TooBig(const char* what, int64_t limit) {
  return absl::ResourceExhaustedError(absl::StrCat("needs more than ", limit, " ", what));
}

// Thompson's construction: each pattern becomes states between an entry and an exit.
class Nfa {
 public:
  struct Edge {
    unsigned char first;
    unsigned char last;
    int target;
  };
  struct Call {
    int rule;
    int target;
  };
  struct State {
    std::vector<Edge> edges;
    std::vector<Call> calls;
    std::vector<int> epsilon;
  };

  explicit Nfa(int max_states) : max_states_(max_states) {}

  // Adds `pattern` behind `from`; returns its exit.
  absl::StatusOr<int> Add(const Pattern& pattern, int from) {
    // Repeating what matches nothing makes no states, and must end too.
    if (++num_added_ > 4 * int64_t{max_states_}) return TooBig("parts", 4 * int64_t{max_states_});
    switch (pattern.kind()) {
      case Pattern::Kind::kBytes:
        for (const char byte : pattern.bytes()) {
          ASSIGN_OR_RETURN(from, Step(from, static_cast<unsigned char>(byte), static_cast<unsigned char>(byte)));
        }
        return from;
      case Pattern::Kind::kChars:
        return AddChars(pattern.chars(), from);
      case Pattern::Kind::kConcat:
        for (const Pattern& part : pattern.parts()) {
          ASSIGN_OR_RETURN(from, Add(part, from));
        }
        return from;
      case Pattern::Kind::kAlternate:
        return AddAlternate(pattern.parts(), from);
      case Pattern::Kind::kRepeat:
        return AddRepeat(pattern, from);
      case Pattern::Kind::kSeparated:
        return AddSeparated(pattern, from);
      case Pattern::Kind::kRule: {
        ASSIGN_OR_RETURN(const int to, NewState());
        states_[from].calls.push_back({pattern.rule(), to});
        return to;
      }
    }
    return absl::InternalError("unknown pattern");
  }

  absl::StatusOr<int> NewState() {
    if (static_cast<int>(states_.size()) >= max_states_) return TooBig("states", max_states_);
    states_.emplace_back();
    return static_cast<int>(states_.size()) - 1;
  }
  const State& state(int id) const { return states_[id]; }
  int num_states() const { return static_cast<int>(states_.size()); }
  int64_t num_added() const { return num_added_; }

 private:
  absl::StatusOr<int> Step(int from, unsigned char first, unsigned char last) {
    ASSIGN_OR_RETURN(const int to, NewState());
    states_[from].edges.push_back({first, last, to});
    return to;
  }

  void Join(int from, int to) { states_[from].epsilon.push_back(to); }

  absl::StatusOr<int> AddAlternate(const std::vector<Pattern>& parts, int from) {
    ASSIGN_OR_RETURN(const int exit, NewState());
    for (const Pattern& part : parts) {
      ASSIGN_OR_RETURN(const int entry, NewState());
      Join(from, entry);
      ASSIGN_OR_RETURN(const int end, Add(part, entry));
      Join(end, exit);
    }
    return exit;
  }

  absl::StatusOr<int> AddRepeat(const Pattern& pattern, int from) {
    const Pattern& part = pattern.parts().front();
    for (int i = 0; i < pattern.min(); ++i) {
      ASSIGN_OR_RETURN(from, Add(part, from));
    }
    ASSIGN_OR_RETURN(const int exit, NewState());
    if (pattern.max() == Pattern::kUnbounded) {
      ASSIGN_OR_RETURN(const int loop, NewState());
      Join(from, loop);
      ASSIGN_OR_RETURN(const int end, Add(part, loop));
      Join(end, loop);
      Join(loop, exit);
      return exit;
    }
    for (int i = pattern.min(); i < pattern.max(); ++i) {
      Join(from, exit);
      ASSIGN_OR_RETURN(const int entry, NewState());
      Join(from, entry);
      ASSIGN_OR_RETURN(from, Add(part, entry));
    }
    Join(from, exit);
    return exit;
  }

  // Two chains: nothing was there so far, or something was and the next one needs the separator.
  absl::StatusOr<int> AddSeparated(const Pattern& pattern, int from) {
    const Pattern& separator = pattern.parts().back();
    int none = from;
    ASSIGN_OR_RETURN(int some, NewState());
    for (size_t i = 0; i + 1 < pattern.parts().size(); ++i) {
      ASSIGN_OR_RETURN(const int after, NewState());
      ASSIGN_OR_RETURN(const int first, Add(pattern.parts()[i], none));
      Join(first, after);
      ASSIGN_OR_RETURN(const int separated, Add(separator, some));
      ASSIGN_OR_RETURN(const int later, Add(pattern.parts()[i], separated));
      Join(later, after);
      if (pattern.required()[i]) {
        ASSIGN_OR_RETURN(none, NewState());  // not reachable: this one is always there
      } else {
        Join(some, after);
      }
      some = after;
    }
    ASSIGN_OR_RETURN(const int exit, NewState());
    Join(none, exit);
    Join(some, exit);
    return exit;
  }

  absl::StatusOr<int> AddChars(const CharRanges& ranges, int from) {
    ASSIGN_OR_RETURN(const int exit, NewState());
    for (const auto& [first, last] : ranges) RETURN_IF_ERROR(AddUtf8(first, last, from, exit));
    return exit;
  }

  static std::string Utf8(uint32_t c) {
    std::string s;
    if (c < 0x80) {
      s = {static_cast<char>(c)};
    } else if (c < 0x800) {
      s = {static_cast<char>(0xC0 | (c >> 6)), static_cast<char>(0x80 | (c & 0x3F))};
    } else if (c < 0x10000) {
      s = {static_cast<char>(0xE0 | (c >> 12)), static_cast<char>(0x80 | ((c >> 6) & 0x3F)),
           static_cast<char>(0x80 | (c & 0x3F))};
    } else {
      s = {static_cast<char>(0xF0 | (c >> 18)), static_cast<char>(0x80 | ((c >> 12) & 0x3F)),
           static_cast<char>(0x80 | ((c >> 6) & 0x3F)), static_cast<char>(0x80 | (c & 0x3F))};
    }
    return s;
  }

  // A range whose encodings have one length and, after a common start, full continuation bytes is one chain of byte
  // ranges; any other is cut until its pieces are.
  absl::Status AddUtf8(uint32_t first, uint32_t last, int from, int exit) {
    for (const uint32_t border : {0x7Fu, 0x7FFu, 0xFFFFu}) {
      if (first <= border && last > border) {
        RETURN_IF_ERROR(AddUtf8(first, border, from, exit));
        return AddUtf8(border + 1, last, from, exit);
      }
    }
    if (last >= 0x80) {
      for (int bits = 6; bits <= 18; bits += 6) {
        const uint32_t mask = (1u << bits) - 1;
        if ((first & ~mask) == (last & ~mask)) break;
        if ((first & mask) != 0) {
          RETURN_IF_ERROR(AddUtf8(first, first | mask, from, exit));
          return AddUtf8((first | mask) + 1, last, from, exit);
        }
        if ((last & mask) != mask) {
          RETURN_IF_ERROR(AddUtf8(first, (last & ~mask) - 1, from, exit));
          return AddUtf8(last & ~mask, last, from, exit);
        }
      }
    }
    const std::string low = Utf8(first), high = Utf8(last);
    for (size_t i = 0; i + 1 < low.size(); ++i) {
      ASSIGN_OR_RETURN(from, Step(from, static_cast<unsigned char>(low[i]), static_cast<unsigned char>(high[i])));
    }
    states_[from].edges.push_back(
        {static_cast<unsigned char>(low.back()), static_cast<unsigned char>(high.back()), exit});
    return absl::OkStatus();
  }

  const int max_states_;
  int64_t num_added_ = 0;
  std::vector<State> states_;
};

// The subset construction. A deterministic state is a set of the NFA's that have edges or are the exit.
class Determinizer {
 public:
  Determinizer(const Nfa& nfa, int exit, const AutomatonLimits& limits)
      : nfa_(nfa), exit_(exit), limits_(limits), seen_(nfa.num_states(), 0) {}

  using Subset = std::vector<int>;

  absl::Status Run(int entry, std::vector<std::array<uint32_t, 256>>& next, std::vector<bool>& is_end,
                   std::vector<std::vector<ByteAutomaton::Call>>& calls) {
    calls.assign(1, {});
    next.assign(1, {});  // kDead: the empty set
    is_end.assign(1, false);
    ids_[{}] = ByteAutomaton::kDead;
    RETURN_IF_ERROR(IdOf({entry}, next, is_end).status());
    for (size_t i = 0; i < subsets_.size(); ++i) {
      const Subset subset = *subsets_[i];
      std::vector<Subset> targets(256);
      std::array<bool, 257> border{};  // where the set of matching edges may change
      for (const int state : subset) {
        for (const Nfa::Edge& edge : nfa_.state(state).edges) border[edge.first] = border[edge.last + 1] = true;
      }
      uint32_t id = ByteAutomaton::kDead;
      for (int byte = 0; byte < 256; ++byte) {
        if (border[byte] || byte == 0) {
          Subset target;
          for (const int state : subset) {
            for (const Nfa::Edge& edge : nfa_.state(state).edges) {
              ++work_;
              if (edge.first <= byte && byte <= edge.last) target.push_back(edge.target);
            }
          }
          ASSIGN_OR_RETURN(id, IdOf(std::move(target), next, is_end));
        }
        next[i + 1][byte] = id;
      }
      calls.emplace_back();
      for (auto& [rule, target] : CalledFrom(subset)) {
        ASSIGN_OR_RETURN(id, IdOf(std::move(target), next, is_end));
        calls[i + 1].push_back({rule, id});
      }
      if (work_ > limits_.max_work) return TooBig("steps to compile", limits_.max_work);
    }
    return absl::OkStatus();
  }

  int64_t work() const { return work_; }

 private:
  std::map<int, Subset> CalledFrom(const Subset& subset) {
    std::map<int, Subset> targets;
    for (const int state : subset) {
      for (const Nfa::Call& call : nfa_.state(state).calls) targets[call.rule].push_back(call.target);
      work_ += static_cast<int64_t>(nfa_.state(state).calls.size());
    }
    return targets;
  }

  Subset Close(Subset pending) {
    ++round_;
    Subset closed;
    while (!pending.empty()) {
      const int state = pending.back();
      pending.pop_back();
      if (seen_[state] == round_) continue;
      seen_[state] = round_;
      ++work_;
      const Nfa::State& found = nfa_.state(state);
      if (!found.edges.empty() || !found.calls.empty() || state == exit_) closed.push_back(state);
      const auto& epsilon = nfa_.state(state).epsilon;
      pending.insert(pending.end(), epsilon.begin(), epsilon.end());
    }
    std::sort(closed.begin(), closed.end());
    return closed;
  }

  absl::StatusOr<uint32_t> IdOf(Subset subset, std::vector<std::array<uint32_t, 256>>& next,
                                std::vector<bool>& is_end) {
    subset = Close(std::move(subset));
    const auto [found, is_new] = ids_.emplace(std::move(subset), static_cast<uint32_t>(next.size()));
    if (!is_new) return found->second;
    if (static_cast<int>(next.size()) > limits_.max_states) return TooBig("states", limits_.max_states);
    next.push_back({});
    is_end.push_back(std::binary_search(found->first.begin(), found->first.end(), exit_));
    subsets_.push_back(&found->first);
    return found->second;
  }

  const Nfa& nfa_;
  const int exit_;
  const AutomatonLimits& limits_;
  std::map<Subset, uint32_t> ids_;
  std::vector<const Subset*> subsets_;  // keys of ids_, from id 1 on
  std::vector<int> seen_;               // by NFA state: the round of Close that met it last
  int round_ = 0;
  int64_t work_ = 0;
};

}  // namespace

absl::StatusOr<ByteAutomaton> ByteAutomaton::Compile(const Pattern& pattern, const AutomatonLimits& limits) {
  Nfa nfa(limits.max_nfa_states);
  ASSIGN_OR_RETURN(const int entry, nfa.NewState());
  ASSIGN_OR_RETURN(const int exit, nfa.Add(pattern, entry));
  ByteAutomaton automaton;
  Determinizer determinizer(nfa, exit, limits);
  RETURN_IF_ERROR(determinizer.Run(entry, automaton.next_, automaton.is_end_, automaton.calls_));
  automaton.work_ = determinizer.work() + nfa.num_added();
  if (automaton.next_.size() <= kStart) return absl::InvalidArgumentError("nothing can match");
  // A state from which no end can be reached is as good as dead.
  std::vector<std::vector<State>> sources(automaton.next_.size());
  for (State state = kStart; state < automaton.next_.size(); ++state) {
    const auto add = [&sources, state](State target) {
      if (sources[target].empty() || sources[target].back() != state) sources[target].push_back(state);
    };
    for (const State target : automaton.next_[state]) add(target);
    for (const Call& call : automaton.calls_[state]) add(call.target);
  }
  std::vector<bool> is_alive = automaton.is_end_;
  std::vector<State> pending;
  for (State state = kStart; state < is_alive.size(); ++state) {
    if (is_alive[state]) pending.push_back(state);
  }
  while (!pending.empty()) {
    const State state = pending.back();
    pending.pop_back();
    for (const State source : sources[state]) {
      if (source == kDead || is_alive[source]) continue;
      is_alive[source] = true;
      pending.push_back(source);
    }
  }
  if (!is_alive[kStart]) return absl::InvalidArgumentError("nothing can match");
  for (auto& row : automaton.next_) {
    for (State& target : row) {
      if (!is_alive[target]) target = kDead;
    }
  }
  for (auto& calls : automaton.calls_) {
    std::erase_if(calls, [&is_alive](const Call& call) { return !is_alive[call.target]; });
  }
  return automaton;
}

}  // namespace minitron::server::constraint
