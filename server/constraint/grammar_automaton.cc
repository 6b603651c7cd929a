#include "server/constraint/grammar_automaton.h"

#include <algorithm>
#include <array>
#include <map>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"

namespace minitron::server::constraint {

// Fills a GrammarAutomaton: which tokens lead where, for a state whose stack is not known.
class GrammarCompiler {
 public:
  GrammarCompiler(GrammarAutomaton& automaton, const TokenAutomatonLimits& limits)
      : automaton_(automaton), pushdown_(automaton.pushdown_), vocabulary_(automaton.vocabulary_), limits_(limits) {}

  absl::Status Run() {
    NumberOf({});  // kDead
    InternSet({});
    leaving_ids_[{}] = 0;
    leaving_.push_back(&leaving_ids_.begin()->first);
    automaton_.own_.resize(pushdown_.num_states());
    for (uint32_t state = 1; state < static_cast<uint32_t>(pushdown_.num_states()); ++state) {
      if (!pushdown_.reads(state)) continue;
      Found found;
      const Parses only{.open = {{state, Stacks::kBottom}}};
      RETURN_IF_ERROR(Explore(0, static_cast<uint32_t>(vocabulary_.nodes().size()), NumberOf(only), found));
      automaton_.own_[state] = Intern(std::move(found));
      RETURN_IF_ERROR(CheckBytes());
      AddReturns(automaton_.own_[state].leaving, pushdown_.rule_of(state));
    }
    while (!pending_.empty()) {
      const auto [leaving, return_to] = pending_.back();
      pending_.pop_back();
      RETURN_IF_ERROR(ExploreReturn(leaving, return_to));
    }
    automaton_.num_bytes_ = int64_t{pushdown_.num_states()} * 1100 + num_set_bytes_ +
                            static_cast<int64_t>(automaton_.behind_return_.size()) * 48;
    return absl::OkStatus();
  }

 private:
  static constexpr uint32_t kDead = 0;
  static constexpr uint32_t kUnknown = UINT32_MAX;
  static constexpr int kMaxParses = 20'000;  // different ones; each has a table of a kibibyte

  struct Found {
    std::vector<uint32_t> tokens;
    std::vector<uint32_t> leaving;
  };

  absl::Status TooBig(const char* what, int64_t limit) const {
    return absl::ResourceExhaustedError(absl::StrCat("needs more than ", limit, " ", what));
  }

  absl::Status CheckBytes() const {
    if (num_set_bytes_ + num_leaving_bytes_ <= limits_.max_bytes) return absl::OkStatus();
    return TooBig("bytes", limits_.max_bytes);
  }

  uint32_t NumberOf(const Parses& parses) {
    const auto [found, is_new] = numbers_.emplace(parses, static_cast<uint32_t>(parses_.size()));
    if (is_new) {
      parses_.push_back(&found->first);
      next_.emplace_back();
      next_.back().fill(kUnknown);
    }
    return found->second;
  }

  absl::StatusOr<uint32_t> Next(uint32_t number, unsigned char byte) {
    uint32_t next = next_[number][byte];
    if (next != kUnknown) return next;
    const Parses parses = pushdown_.Step(*parses_[number], byte, stacks_);
    if (parses.too_many) return TooBig("parses at a time", Parses::kMax);
    next = NumberOf(parses);
    if (static_cast<int>(parses_.size()) > kMaxParses) return TooBig("sets of parses", kMaxParses);
    next_[number][byte] = next;
    return next;
  }

  // Walks the nodes [begin, end) of the vocabulary's tree, the children of one node and all below them.
  absl::Status Explore(uint32_t begin, uint32_t end, uint32_t start, Found& found) {
    const std::vector<Vocabulary::Node>& nodes = vocabulary_.nodes();
    const int base = begin < end ? nodes[begin].depth - 1 : 0;
    std::vector<uint32_t> path = {start};  // by depth
    for (uint32_t i = begin; i < end;) {
      const Vocabulary::Node& node = nodes[i];
      if (++work_ + 16 * stacks_.num_looked_at > limits_.max_work) return TooBig("steps to compile", limits_.max_work);
      path.resize(node.depth - base);
      ASSIGN_OR_RETURN(const uint32_t next, Next(path.back(), node.byte));
      if (next == kDead) {
        i = node.after;
        continue;
      }
      path.push_back(next);
      for (int t = 0; t < node.num_tokens; ++t) {
        found.tokens.push_back(static_cast<uint32_t>(vocabulary_.token(node.first_token + t)));
      }
      if (parses_[next]->ended && node.after > i + 1) found.leaving.push_back(i);
      ++i;
    }
    return absl::OkStatus();
  }

  absl::Status ExploreReturn(uint32_t leaving, uint32_t return_to) {
    const Parses parses = pushdown_.Close({{return_to, Stacks::kBottom}}, stacks_);
    if (parses.too_many) return TooBig("parses at a time", Parses::kMax);
    const uint32_t start = NumberOf(parses);
    const std::vector<uint32_t>& nodes = *leaving_[leaving];  // a map's key: it stays where it is
    work_ += static_cast<int64_t>(nodes.size());
    Found found;
    for (const uint32_t node : nodes) {
      RETURN_IF_ERROR(Explore(node + 1, vocabulary_.nodes()[node].after, start, found));
    }
    if (parses.ended) found.leaving.insert(found.leaving.end(), nodes.begin(), nodes.end());
    const GrammarAutomaton::Step step = Intern(std::move(found));
    automaton_.behind_return_[GrammarAutomaton::Key(leaving, return_to)] = step;
    RETURN_IF_ERROR(CheckBytes());
    AddReturns(step.leaving, pushdown_.rule_of(return_to));
    return absl::OkStatus();
  }

  void AddReturns(uint32_t leaving, int rule) {
    if (leaving == 0) return;
    for (const uint32_t return_to : pushdown_.returns_to(rule)) {
      if (automaton_.behind_return_.emplace(GrammarAutomaton::Key(leaving, return_to), GrammarAutomaton::Step{})
              .second) {
        pending_.emplace_back(leaving, return_to);
      }
    }
  }

  GrammarAutomaton::Step Intern(Found found) {
    const auto tidy = [](std::vector<uint32_t>& values) {
      std::sort(values.begin(), values.end());
      values.erase(std::unique(values.begin(), values.end()), values.end());
    };
    tidy(found.tokens);
    tidy(found.leaving);
    GrammarAutomaton::Step step;
    step.set = InternSet(std::move(found.tokens));
    const auto num_bytes = static_cast<int64_t>(found.leaving.size() * sizeof(uint32_t));
    const auto [entry, is_new] = leaving_ids_.emplace(std::move(found.leaving), static_cast<uint32_t>(leaving_.size()));
    if (is_new) {
      leaving_.push_back(&entry->first);
      num_leaving_bytes_ += num_bytes;
    }
    step.leaving = entry->second;
    return step;
  }

  uint32_t InternSet(std::vector<uint32_t> tokens) {
    const auto [entry, is_new] = set_ids_.emplace(std::move(tokens), static_cast<uint32_t>(automaton_.sets_.size()));
    if (!is_new) return entry->second;
    const size_t num_words = (static_cast<size_t>(vocabulary_.size()) + 63) / 64;
    GrammarAutomaton::TokenSet set;
    if (entry->first.size() * sizeof(uint32_t) <= num_words * sizeof(uint64_t)) {
      set.ids = entry->first;
    } else {
      set.bits.resize(num_words);
      for (const uint32_t id : entry->first) set.bits[id / 64] |= uint64_t{1} << (id % 64);
    }
    num_set_bytes_ += static_cast<int64_t>(entry->first.size() * sizeof(uint32_t));  // while it compiles; less after
    automaton_.sets_.push_back(std::move(set));
    return entry->second;
  }

  GrammarAutomaton& automaton_;
  const Pushdown& pushdown_;
  const Vocabulary& vocabulary_;
  const TokenAutomatonLimits& limits_;
  Stacks stacks_;  // their bottom is what is not known
  std::map<Parses, uint32_t> numbers_;
  std::vector<const Parses*> parses_;            // keys of numbers_
  std::vector<std::array<uint32_t, 256>> next_;  // by number: kUnknown until it is asked for
  std::map<std::vector<uint32_t>, uint32_t> set_ids_;
  std::map<std::vector<uint32_t>, uint32_t> leaving_ids_;
  std::vector<const std::vector<uint32_t>*> leaving_;   // keys of leaving_ids_
  std::vector<std::pair<uint32_t, uint32_t>> pending_;  // leaving, return_to
  int64_t work_ = 0;
  int64_t num_set_bytes_ = 0;
  int64_t num_leaving_bytes_ = 0;
};

absl::StatusOr<std::shared_ptr<const GrammarAutomaton>> GrammarAutomaton::Make(const GrammarRules& rules,
                                                                               const Vocabulary& vocabulary,
                                                                               const AutomatonLimits& automaton_limits,
                                                                               const TokenAutomatonLimits& limits) {
  RETURN_IF_ERROR(vocabulary.CheckUsable());
  ASSIGN_OR_RETURN(Pushdown pushdown, Pushdown::Compile(rules, automaton_limits));
  std::shared_ptr<GrammarAutomaton> automaton(new GrammarAutomaton(std::move(pushdown), vocabulary));
  RETURN_IF_ERROR(GrammarCompiler(*automaton, limits).Run());
  return automaton;
}

void GrammarAutomaton::AddAllowed(const Parse& parse, const Stacks& stacks, std::vector<uint64_t>& allowed) const {
  Step step = own_[parse.state];
  Stacks::Id stack = parse.stack;
  while (true) {
    const TokenSet& set = sets_[step.set];
    for (const uint32_t id : set.ids) allowed[id / 64] |= uint64_t{1} << (id % 64);
    for (size_t word = 0; word < set.bits.size(); ++word) allowed[word] |= set.bits[word];
    if (step.leaving == 0 || stack == Stacks::kBottom) return;
    const auto found = behind_return_.find(Key(step.leaving, stacks.Top(stack)));
    CHECK(found != behind_return_.end());
    step = found->second;
    stack = stacks.Pop(stack);
  }
}

namespace {

class GrammarWalk final : public engine::TokenWalk {
 public:
  explicit GrammarWalk(const GrammarAutomaton& automaton)
      : automaton_(automaton), parses_(automaton.pushdown().Start(stacks_)) {}

  void Advance(TokenId token) override {
    for (const char byte : automaton_.vocabulary().bytes(token)) {
      parses_ = automaton_.pushdown().Step(parses_, static_cast<unsigned char>(byte), stacks_);
    }
    CHECK(parses_.too_many || !parses_.empty());
    if (stacks_.size() > max_stack_nodes_) ForgetUnused();
    is_fresh_ = false;
  }

  absl::Span<const uint64_t> Allowed() override {
    if (is_fresh_) return allowed_;
    is_fresh_ = true;
    allowed_.assign((static_cast<size_t>(automaton_.vocabulary().size()) + 63) / 64, 0);
    for (const Parse& parse : parses_.open) automaton_.AddAllowed(parse, stacks_, allowed_);
    if (parses_.ended) {
      for (const TokenId id : automaton_.vocabulary().end_tokens()) allowed_[id / 64] |= uint64_t{1} << (id % 64);
    }
    return allowed_;
  }

 private:
  // Keeps the stacks of open parses only.
  void ForgetUnused() {
    std::vector<Stacks::Id> used;
    for (const Parse& parse : parses_.open) used.push_back(parse.stack);
    used = stacks_.KeepOnly(used);
    for (size_t i = 0; i < used.size(); ++i) parses_.open[i].stack = used[i];
    std::sort(parses_.open.begin(), parses_.open.end());
    if (stacks_.size() > GrammarAutomaton::kMaxStackNodes) parses_ = {.open = {}, .too_many = true};
    max_stack_nodes_ = std::max(4096, 2 * stacks_.size());
  }

  const GrammarAutomaton& automaton_;  // owned by the sequence's params
  Stacks stacks_;
  Parses parses_;
  int max_stack_nodes_ = 4096;
  bool is_fresh_ = false;
  std::vector<uint64_t> allowed_;
};

}  // namespace

std::unique_ptr<engine::TokenWalk> GrammarAutomaton::NewWalk() const { return std::make_unique<GrammarWalk>(*this); }

}  // namespace minitron::server::constraint
