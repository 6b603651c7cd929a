#include "scheduler/sequence.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "engine/base/check.h"

namespace minitron::scheduler {

Sequence::Sequence(std::shared_ptr<const Request> request, int index, uint64_t order, std::string cache_salt)
    : request_(std::move(request)),
      index_(index),
      order_(order),
      cache_salt_(std::move(cache_salt)),
      params_(request_->params),
      banned_tokens_(request_->eos_token_ids),
      tokens_(request_->prompt_token_ids),
      next_prompt_logprob_(std::max(1, request_->prompt_logprobs_start)),
      next_planned_prompt_logprob_(next_prompt_logprob_) {
  params_.seed = SequenceSeed(request_->params.seed, index);
  banned_tokens_.insert(banned_tokens_.end(), request_->stop_token_ids.begin(), request_->stop_token_ids.end());
  tokens_.reserve(tokens_.size() + request_->max_tokens);
}

std::vector<TokenId> Sequence::OutputTokens() const { return {tokens_.begin() + num_prompt_tokens(), tokens_.end()}; }

void Sequence::Start(int num_cached_tokens, int history_slot, TimePoint now) {
  CHECK(state_ == SequenceState::kWaiting && num_planned_tokens_ == 0 && num_steps_in_flight_ == 0);
  state_ = SequenceState::kRunning;
  num_computed_tokens_ = num_planned_tokens_ = num_cached_tokens;
  history_slot_ = history_slot;
  history_reset_due_ = history_slot != engine::kNone;
  if (ever_scheduled_) return;
  ever_scheduled_ = true;
  num_cached_tokens_ = num_cached_tokens;
  first_scheduled_ = now;
}

void Sequence::Preempt() {
  CHECK(state_ == SequenceState::kRunning && num_steps_in_flight_ == 0 && kv_.blocks.empty());
  state_ = SequenceState::kWaiting;
  num_computed_tokens_ = num_planned_tokens_ = 0;
  history_slot_ = engine::kNone;
  history_reset_due_ = false;
  ++num_preemptions_;
}

void Sequence::Finish() {
  CHECK(state_ != SequenceState::kFinished);
  state_ = SequenceState::kFinished;
}

void Sequence::ReleaseSlot() {
  CHECK(state_ == SequenceState::kFinished && num_steps_in_flight_ == 0 && kv_.blocks.empty());
  history_slot_ = engine::kNone;
  history_reset_due_ = false;
}

void Sequence::BeginStep(int num_tokens, int num_prompt_logprobs, int unread_row) {
  CHECK(state_ == SequenceState::kRunning && num_tokens > 0 && num_tokens <= num_wanted_tokens());
  num_planned_tokens_ += num_tokens;
  next_planned_prompt_logprob_ += num_prompt_logprobs;
  num_unread_tokens_ += unread_row == engine::kNone ? 0 : 1;
  unread_row_ = unread_row;
  ++num_steps_in_flight_;
  history_reset_due_ = false;
}

void Sequence::EndStep(int num_tokens, int num_prompt_logprobs) {
  CHECK(state_ == SequenceState::kRunning && num_steps_in_flight_ > 0);
  --num_steps_in_flight_;
  num_computed_tokens_ += num_tokens;
  next_prompt_logprob_ += num_prompt_logprobs;
  CHECK(num_computed_tokens_ <= num_planned_tokens_ && next_prompt_logprob_ <= next_planned_prompt_logprob_);
}

void Sequence::AppendOutput(TokenId token, TimePoint now) {
  CHECK(state_ == SequenceState::kRunning && num_computed_tokens_ == num_tokens() && num_unread_tokens_ > 0);
  if (num_output_tokens() == 0) first_token_ = now;
  last_token_ = now;
  tokens_.push_back(token);
  --num_unread_tokens_;
}

void Sequence::DropStep() {
  CHECK(state_ == SequenceState::kFinished && num_steps_in_flight_ > 0);
  --num_steps_in_flight_;
}

FinishEvent Sequence::MakeFinishEvent(FinishReason reason, TokenId stop_token) const {
  FinishEvent event;
  event.id = id();
  event.index = index_;
  event.reason = reason;
  event.stop_token = stop_token;
  event.num_prompt_tokens = num_prompt_tokens();
  event.num_cached_tokens = num_cached_tokens_;
  event.num_output_tokens = num_output_tokens();
  event.num_preemptions = num_preemptions_;
  event.arrival = request_->arrival;
  event.first_scheduled = first_scheduled_;
  event.first_token = first_token_;
  event.last_token = last_token_;
  return event;
}

bool ServedBefore::operator()(const Sequence& a, const Sequence& b) const {
  const auto key = [](const Sequence& s) {
    const bool is_new = s.state() == SequenceState::kWaiting && s.num_preemptions() == 0;
    return std::make_tuple(-static_cast<int64_t>(s.request().priority), is_new, s.order(), s.index());
  };
  return key(a) < key(b);
}

void InsertInOrder(const std::shared_ptr<Sequence>& sequence, std::vector<std::shared_ptr<Sequence>>& queue) {
  queue.insert(std::upper_bound(queue.begin(), queue.end(), sequence, ServedBefore()), sequence);
}

}  // namespace minitron::scheduler
