#include "tests/testing/fake_model_runner.h"

#include <algorithm>
#include <bit>
#include <set>
#include <utility>

#include "engine/base/check.h"

namespace minitron::testing {
namespace {

using engine::TokenId;

constexpr uint64_t kPoison = 0xDEADBEEFDEADBEEFull;
constexpr uint64_t kBroken = 0xBADBADBADBADBADBull;  // as not-a-number does, it spreads to all that is made of it

uint64_t Mix(uint64_t a, uint64_t b) {
  uint64_t x = (a ^ (b + 0x9E3779B97F4A7C15ull + (a << 6) + (a >> 2)));
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

uint64_t HashTokens(uint64_t hash, const std::vector<TokenId>& tokens) {
  for (const TokenId token : tokens) hash = Mix(hash, token);
  return Mix(hash, tokens.size());
}

uint64_t HashParams(uint64_t hash, const engine::SamplingParams& params) {
  hash = Mix(hash, params.seed);
  for (const float value : {params.temperature, params.top_p, params.min_p, params.repetition_penalty,
                            params.presence_penalty, params.frequency_penalty}) {
    hash = Mix(hash, std::bit_cast<uint32_t>(value));
  }
  return Mix(hash, params.top_k);
}

engine::TokenLogprob MakeLogprob(uint64_t context, TokenId token) {
  const uint64_t hash = Mix(context, token);
  return {token, -static_cast<float>(hash % 100000) / 1000.0f, static_cast<int32_t>(hash % 97) + 1};
}

}  // namespace

FakeModelRunner::FakeModelRunner(const FakeModelRunnerOptions& options)
    : options_(options),
      slots_(static_cast<size_t>(options.num_kv_blocks) * options.block_size, kPoison),
      histories_(2 * options.max_num_sequences) {
  info_.architecture = "fake";
  info_.backend = "fake";
  info_.weight_type = "f32";
  info_.vocab_size = options.vocab_size;
  info_.max_context_tokens = options.max_context_tokens;
  info_.eos_token_ids = options.eos_token_ids;
}

absl::Status FakeModelRunner::Submit(const engine::Batch& batch) {
  if (options_.fail_at_step >= 0 && num_steps_ > options_.fail_at_step) return absl::InternalError("fake: lost");
  if (options_.fail_at_submit >= 0 && num_submitted_++ >= options_.fail_at_submit) {
    return absl::ResourceExhaustedError("fake: out of device memory");
  }
  CHECK(outstanding_.size() < 2);
  CheckWellFormed(batch);
  outstanding_.push_back({.batch = &batch, .result = {}});
  if (!options_.compute_late) Compute(outstanding_.back());
  return absl::OkStatus();
}

void FakeModelRunner::Compute(Outstanding& step) {
  const engine::Batch& batch = *step.batch;
  CheckWellFormed(batch);
  std::vector<TokenId> tokens = batch.token_ids;
  std::vector<bool> follows_failure(batch.num_sequences(), false);
  for (int s = 0; s < batch.num_sequences(); ++s) {
    for (int t = batch.query_start[s]; t < batch.query_start[s + 1]; ++t) {
      if (!engine::IsFromPreviousResult(tokens[t])) continue;
      CHECK(t == batch.query_start[s]);
      const engine::ResultRowOutput& previous = previous_rows_.at(engine::PreviousResultRow(tokens[t]));
      tokens[t] = previous.token_id;
      if (!previous.failed && tokens[t] >= 0 && tokens[t] < options_.vocab_size) continue;
      follows_failure[s] = true;
      tokens[t] = 0;
    }
  }
  for (const TokenId token : tokens) CHECK(token >= 0 && token < options_.vocab_size);
  for (const engine::HistoryReset& reset : batch.history_resets) {
    histories_[reset.slot] = {.prompt = reset.prompt, .output = reset.output, .in_use = true};
  }
  WriteKv(batch, tokens);
  for (const engine::ResultRow& row : batch.results) {
    if (!follows_failure[row.sequence]) {
      step.result.rows.push_back(Produce(batch, row, tokens));
      continue;
    }
    // Nobody reads what follows a failure, and its history is not what the row says.
    step.result.rows.emplace_back().failed = true;
  }
  previous_rows_ = step.result.rows;
}

absl::StatusOr<engine::StepResult> FakeModelRunner::Collect() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    held_ = hold_;
    if (held_) gate_.notify_all();
    gate_.wait(lock, [this] { return !hold_; });
    held_ = false;
  }
  CHECK(!outstanding_.empty());
  if (options_.compute_late) Compute(outstanding_.front());
  engine::StepResult result = std::move(outstanding_.front().result);
  outstanding_.pop_front();
  if (num_steps_++ == options_.fail_at_step) return absl::InternalError("fake: device lost");
  return result;
}

void FakeModelRunner::CheckWellFormed(const engine::Batch& batch) const {
  const int num_tokens = batch.num_tokens();
  const int num_sequences = batch.num_sequences();
  CHECK(num_tokens > 0 && num_tokens <= options_.max_num_tokens);
  CHECK(num_sequences > 0 && num_sequences <= options_.max_num_sequences);
  CHECK(batch.positions.size() == batch.token_ids.size() && batch.slot_mapping.size() == batch.token_ids.size());
  CHECK(batch.query_start.size() == batch.kv_lens.size() + 1 && batch.query_start[0] == 0);
  CHECK(batch.block_start.size() == batch.kv_lens.size() + 1 && batch.block_start[0] == 0);
  CHECK(batch.query_start.back() == num_tokens);
  CHECK(batch.block_start.back() == static_cast<int>(batch.block_ids.size()));
  const std::set<int64_t> written(batch.slot_mapping.begin(), batch.slot_mapping.end());
  CHECK(written.size() == batch.slot_mapping.size());  // no two rows write the same slot
  for (const engine::BlockId block : batch.block_ids) CHECK(block >= 0 && block < options_.num_kv_blocks);
  for (int s = 0; s < num_sequences; ++s) {
    const int begin = batch.query_start[s];
    const int end = batch.query_start[s + 1];
    CHECK(begin < end);
    CHECK(batch.kv_lens[s] == batch.positions[end - 1] + 1 && batch.kv_lens[s] <= options_.max_context_tokens);
    const int num_blocks = (batch.kv_lens[s] + options_.block_size - 1) / options_.block_size;
    CHECK(batch.block_start[s + 1] - batch.block_start[s] == num_blocks);
    for (int t = begin; t < end; ++t) {
      const int position = batch.positions[t];
      CHECK(position == batch.positions[begin] + (t - begin) && position >= 0);
      const int64_t block = batch.block_ids[batch.block_start[s] + position / options_.block_size];
      CHECK(batch.slot_mapping[t] == block * options_.block_size + position % options_.block_size);
    }
  }
  std::set<int> reset_slots;
  for (const engine::HistoryReset& reset : batch.history_resets) {
    CHECK(reset.slot >= 0 && reset.slot < static_cast<int>(histories_.size()));
    CHECK(reset_slots.insert(reset.slot).second);
  }
  for (const engine::ResultRow& row : batch.results) CheckResultRow(batch, row);
}

void FakeModelRunner::CheckResultRow(const engine::Batch& batch, const engine::ResultRow& row) const {
  CHECK(row.sequence >= 0 && row.sequence < batch.num_sequences());
  CHECK(row.token_row >= batch.query_start[row.sequence] && row.token_row < batch.query_start[row.sequence + 1]);
  if (row.target != engine::kNone) {
    CHECK(row.target < options_.vocab_size && row.params == nullptr && row.history_slot == engine::kNone);
    return;
  }
  CHECK(row.params != nullptr && row.token_row == batch.query_start[row.sequence + 1] - 1);
  CHECK(row.params->NeedsHistory() == (row.history_slot != engine::kNone));
  CHECK(row.history_slot < static_cast<int>(histories_.size()));
}

void FakeModelRunner::WriteKv(const engine::Batch& batch, const std::vector<TokenId>& tokens) {
  for (int s = 0; s < batch.num_sequences(); ++s) {
    const engine::BlockId* table = &batch.block_ids[batch.block_start[s]];
    for (int t = batch.query_start[s]; t < batch.query_start[s + 1]; ++t) {
      const int position = batch.positions[t];
      uint64_t before = 0;
      if (position > 0) {
        const int64_t block = table[(position - 1) / options_.block_size];
        before = slots_[block * options_.block_size + (position - 1) % options_.block_size];
      }
      slots_[batch.slot_mapping[t]] = before == kBroken ? kBroken : Mix(Mix(before, tokens[t]), position);
    }
  }
}

uint64_t FakeModelRunner::ReadContext(const engine::Batch& batch, int sequence, int position) const {
  const engine::BlockId* table = &batch.block_ids[batch.block_start[sequence]];
  uint64_t context = 0;
  for (int p = 0; p <= position; ++p) {
    const int64_t block = table[p / options_.block_size];
    const uint64_t slot = slots_[block * options_.block_size + p % options_.block_size];
    if (slot == kBroken) return kBroken;
    context = Mix(context, slot);
  }
  return context;
}

void FakeModelRunner::BreakWrittenSlots(const engine::Batch& batch, int sequence) {
  for (int t = batch.query_start[sequence]; t < batch.query_start[sequence + 1]; ++t) {
    slots_[batch.slot_mapping[t]] = kBroken;
  }
}

engine::ResultRowOutput FakeModelRunner::Produce(const engine::Batch& batch, const engine::ResultRow& row,
                                                 const std::vector<TokenId>& tokens) {
  const int position = batch.positions[row.token_row];
  const uint64_t context = ReadContext(batch, row.sequence, position);
  engine::ResultRowOutput output;
  if (options_.accident_one_in > 0 && Mix(++num_rows_produced_, 0x414343) % options_.accident_one_in == 0) {
    ++num_accidents_;
    BreakWrittenSlots(batch, row.sequence);
    output.failed = true;
  }
  output.failed = output.failed || context == kBroken ||
                  (options_.nan_one_in > 0 && Mix(context, 0x4E614E) % options_.nan_one_in == 0);
  output.token_id = row.target != engine::kNone ? row.target : Sample(context, row, tokens[row.token_row], position);
  if (output.failed) return output;
  if (options_.wild_token_one_in > 0 && row.target == engine::kNone &&
      Mix(context, 0x57494C44) % options_.wild_token_one_in == 0) {
    output.token_id = context % 2 == 0 ? -1 : options_.vocab_size;
    return output;
  }
  if (row.history_slot != engine::kNone) histories_[row.history_slot].output.push_back(output.token_id);
  if (row.num_top_logprobs >= 0) {
    output.chosen = MakeLogprob(context, output.token_id);
    for (TokenId token = 0; token < row.num_top_logprobs; ++token) output.top.push_back(MakeLogprob(context, token));
  }
  return output;
}

TokenId FakeModelRunner::Sample(uint64_t context, const engine::ResultRow& row, TokenId last, int position) const {
  uint64_t hash = Mix(HashParams(context, *row.params), row.output_position);
  if (row.history_slot != engine::kNone) {
    const History& history = histories_[row.history_slot];
    CHECK(history.in_use && static_cast<int>(history.output.size()) == row.output_position);
    CHECK(static_cast<int>(history.prompt.size() + history.output.size()) == position + 1);
    hash = HashTokens(HashTokens(hash, history.prompt), history.output);
  }
  auto token = static_cast<TokenId>(hash % options_.vocab_size);
  if (options_.choose_token) token = options_.choose_token(last, position);
  if (row.banned_tokens == nullptr) return token;
  const auto is_banned = [&](TokenId candidate) {
    return std::find(row.banned_tokens->begin(), row.banned_tokens->end(), candidate) != row.banned_tokens->end();
  };
  for (int i = 0; i < options_.vocab_size && is_banned(token); ++i) token = (token + 1) % options_.vocab_size;
  return token;
}

void FakeModelRunner::Poison(engine::BlockId block) {
  const auto begin = slots_.begin() + static_cast<int64_t>(block) * options_.block_size;
  std::fill(begin, begin + options_.block_size, kPoison);
}

void FakeModelRunner::Hold() {
  const std::lock_guard<std::mutex> lock(mutex_);
  hold_ = true;
}

void FakeModelRunner::Release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  hold_ = false;
  gate_.notify_all();
}

bool FakeModelRunner::IsHeld() {
  std::lock_guard<std::mutex> lock(mutex_);
  return held_;
}

void FakeModelRunner::WaitUntilHeld() {
  std::unique_lock<std::mutex> lock(mutex_);
  gate_.wait(lock, [this] { return held_; });
}

}  // namespace minitron::testing
