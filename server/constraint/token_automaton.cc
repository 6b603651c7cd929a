#include "server/constraint/token_automaton.h"

#include <algorithm>
#include <array>
#include <map>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"

namespace minitron::server::constraint {

Vocabulary::Vocabulary(const Tokenizer& tokenizer, std::vector<TokenId> end_tokens)
    : bytes_(tokenizer.vocab_size()), end_tokens_(std::move(end_tokens)) {
  std::array<bool, 256> has_byte{};
  for (TokenId id = 0; id < tokenizer.num_pieces(); ++id) {
    if (tokenizer.IsSpecial(id) || id == tokenizer.spm().unk_id()) continue;
    bytes_[id] = tokenizer.TokenBytes(id, /*skip_special=*/true);
    if (bytes_[id].empty()) continue;
    ids_.push_back(id);
    if (bytes_[id].size() == 1) has_byte[static_cast<unsigned char>(bytes_[id][0])] = true;
  }
  has_all_bytes_ = std::all_of(has_byte.begin(), has_byte.end(), [](bool has) { return has; });
  std::sort(ids_.begin(), ids_.end(),
            [this](TokenId a, TokenId b) { return bytes_[a] != bytes_[b] ? bytes_[a] < bytes_[b] : a < b; });
  std::vector<uint32_t> path;  // nodes of the token before
  std::string_view last;
  for (uint32_t index = 0; index < ids_.size(); ++index) {
    const std::string_view text = bytes_[ids_[index]];
    const size_t common = std::mismatch(last.begin(), last.end(), text.begin(), text.end()).first - last.begin();
    for (size_t depth = common; depth < path.size(); ++depth) {
      nodes_[path[depth]].after = static_cast<uint32_t>(nodes_.size());
    }
    path.resize(common);
    for (size_t depth = common; depth < text.size(); ++depth) {
      path.push_back(static_cast<uint32_t>(nodes_.size()));
      nodes_.push_back({static_cast<unsigned char>(text[depth]), static_cast<uint16_t>(depth + 1), 0, index, 0});
    }
    ++nodes_[path.back()].num_tokens;
    last = text;
  }
  for (const uint32_t node : path) nodes_[node].after = static_cast<uint32_t>(nodes_.size());
}

absl::Status Vocabulary::CheckUsable() const {
  if (has_all_bytes_ && !end_tokens_.empty()) return absl::OkStatus();
  return absl::UnimplementedError("the model's tokenizer lacks a token for some byte, or an end token");
}

absl::StatusOr<std::shared_ptr<const TokenAutomaton>> TokenAutomaton::Make(ByteAutomaton bytes,
                                                                           const Vocabulary& vocabulary,
                                                                           const TokenAutomatonLimits& limits) {
  RETURN_IF_ERROR(vocabulary.CheckUsable());
  std::shared_ptr<TokenAutomaton> result(new TokenAutomaton(std::move(bytes), vocabulary));
  std::map<std::vector<uint64_t>, uint32_t> known;
  int64_t num_bytes = 0;
  int64_t work = 0;
  result->set_of_state_.assign(result->bytes_.num_states(), 0);
  for (State state = ByteAutomaton::kStart; state < result->set_of_state_.size(); ++state) {
    std::vector<uint64_t> set;
    work += result->Collect(state, set);
    if (work > limits.max_work) {
      return absl::ResourceExhaustedError(absl::StrCat("needs more than ", limits.max_work, " steps to compile"));
    }
    const auto [found, is_new] = known.emplace(std::move(set), static_cast<uint32_t>(known.size()));
    if (is_new) num_bytes += static_cast<int64_t>(found->first.size() * sizeof(uint64_t));
    if (num_bytes > limits.max_bytes) {
      return absl::ResourceExhaustedError(absl::StrCat("needs more than ", limits.max_bytes, " bytes"));
    }
    result->set_of_state_[state] = found->second;
  }
  result->sets_.resize(known.size());
  for (auto& [set, index] : known) result->sets_[index] = set;
  return result;
}

int64_t TokenAutomaton::Collect(State state, std::vector<uint64_t>& set) const {
  set.assign((vocabulary_.size() + 63) / 64, 0);
  const auto add = [&set](TokenId id) { set[id / 64] |= uint64_t{1} << (id % 64); };
  if (bytes_.IsEnd(state)) {
    for (const TokenId id : vocabulary_.end_tokens()) add(id);
  }
  const std::vector<Vocabulary::Node>& nodes = vocabulary_.nodes();
  std::vector<State> path = {state};  // by depth
  int64_t num_visited = 0;
  for (uint32_t i = 0; i < nodes.size(); ++num_visited) {
    const Vocabulary::Node& node = nodes[i];
    path.resize(node.depth);
    const State next = bytes_.Next(path.back(), node.byte);
    if (next == ByteAutomaton::kDead) {
      i = node.after;
      continue;
    }
    path.push_back(next);
    for (int t = 0; t < node.num_tokens; ++t) add(vocabulary_.token(node.first_token + t));
    ++i;
  }
  return num_visited;
}

namespace {

class AutomatonWalk final : public engine::TokenWalk {
 public:
  explicit AutomatonWalk(const TokenAutomaton& automaton) : automaton_(automaton) {}
  void Advance(TokenId token) override { state_ = automaton_.Advance(state_, token); }
  absl::Span<const uint64_t> Allowed() override { return automaton_.Allowed(state_); }

 private:
  const TokenAutomaton& automaton_;  // owned by the sequence's params
  TokenAutomaton::State state_ = ByteAutomaton::kStart;
};

}  // namespace

std::unique_ptr<engine::TokenWalk> TokenAutomaton::NewWalk() const { return std::make_unique<AutomatonWalk>(*this); }

TokenAutomaton::State TokenAutomaton::Advance(State state, TokenId token) const {
  for (const char byte : vocabulary_.bytes(token)) state = bytes_.Next(state, static_cast<unsigned char>(byte));
  CHECK(state != ByteAutomaton::kDead);
  return state;
}

int64_t TokenAutomaton::num_bytes() const {
  int64_t num_bytes = int64_t{bytes_.num_states()} * 256 * 4;
  for (const auto& set : sets_) num_bytes += static_cast<int64_t>(set.size() * sizeof(uint64_t));
  return num_bytes;
}

}  // namespace minitron::server::constraint
