// Sequence: one completion of a request. The request is shared by its n sequences; tokens, block table and progress are
// this sequence's own.
// Engine thread only; not synchronized. Plans in flight share ownership, because a batch borrows params from it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/batch.h"
#include "scheduler/prefix_cache.h"
#include "scheduler/request.h"
#include "scheduler/step_output.h"

namespace minitron::scheduler {

using engine::BlockId;
using BlockTable = std::vector<BlockId>;  // block i holds positions [i*block_size, (i+1)*block_size)

// A sequence's part of the KV cache; KvCacheManager's own.
struct KvState {
  BlockTable blocks;
  int num_reserved = 0;  // blocks it may still take, whatever others need
  int num_chained = 0;   // leading blocks that the prefix cache knows by their tokens
  int num_computed = 0;  // of these, those it knows as computed
  PrefixChain chain;     // behind num_chained blocks
};

enum class SequenceState {
  kWaiting,   // owns no blocks: new, or preempted
  kRunning,   // owns the blocks of all its tokens
  kFinished,  // its FinishEvent is made; owns blocks only as long as a step in flight may touch them
};

struct FairShareAccount;  // FairQueue's own

class Sequence : public std::enable_shared_from_this<Sequence> {
 public:
  // `order` is the request's place in the order of arrival. `cache_salt`: prefixes are shared between equal ones only.
  Sequence(std::shared_ptr<const Request> request, int index, uint64_t order, std::string cache_salt = {});

  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  // Fixed.
  const Request& request() const { return *request_; }
  RequestId id() const { return request_->id; }
  int index() const { return index_; }
  bool is_leader() const { return index_ == 0; }
  uint64_t order() const { return order_; }
  const std::string& cache_salt() const { return cache_salt_; }
  const SamplingParams& params() const { return params_; }                      // with this sequence's own seed
  const std::vector<TokenId>& banned_tokens() const { return banned_tokens_; }  // before min_tokens
  int num_prompt_tokens() const { return static_cast<int>(request_->prompt_token_ids.size()); }
  bool wants_prompt_logprobs() const { return is_leader() && request_->num_prompt_top_logprobs >= 0; }

  // Tokens: prompt, then output.
  const std::vector<TokenId>& tokens() const { return tokens_; }
  int num_tokens() const { return static_cast<int>(tokens_.size()); }
  int num_output_tokens() const { return num_tokens() - num_prompt_tokens(); }
  std::vector<TokenId> OutputTokens() const;

  // Progress. The rows of tokens [0, num_computed_tokens) have been computed and their results were read; those up to
  // num_planned_tokens are in steps in flight. The last of these may have sampled tokens that are not read yet.
  SequenceState state() const { return state_; }
  int num_computed_tokens() const { return num_computed_tokens_; }
  int num_planned_tokens() const { return num_planned_tokens_; }
  int num_unread_tokens() const { return num_unread_tokens_; }
  int num_wanted_tokens() const { return num_tokens() + num_unread_tokens_ - num_planned_tokens_; }  // rows to plan
  bool is_decoding() const { return num_output_tokens() + num_unread_tokens_ > 0 && num_wanted_tokens() == 1; }
  int num_steps_in_flight() const { return num_steps_in_flight_; }
  int unread_row() const { return unread_row_; }                // result row of the latest step, for its unread token
  int num_cached_tokens() const { return num_cached_tokens_; }  // not computed at its first start: shared
  int num_block_waits() const { return num_block_waits_; }      // steps it waited for blocks that others computed
  int num_preemptions() const { return num_preemptions_; }
  bool ever_scheduled() const { return ever_scheduled_; }
  bool abort_requested() const { return abort_requested_; }
  int history_slot() const { return history_slot_; }                // or engine::kNone
  bool history_reset_due() const { return history_reset_due_; }     // in its next step
  int next_prompt_logprob() const { return next_prompt_logprob_; }  // first prompt position not reported yet
  int next_planned_prompt_logprob() const { return next_planned_prompt_logprob_; }  // not in a step in flight either
  bool prompt_logprobs_pending() const { return wants_prompt_logprobs() && next_prompt_logprob_ < num_prompt_tokens(); }

  // FairQueue's account of this sequence's tenant; it is null before and after the sequence is live.
  FairShareAccount* fair_share() const { return fair_share_; }
  void set_fair_share(FairShareAccount* account) { fair_share_ = account; }
  double start_tag() const { return start_tag_; }  // service its tenant had received when it was started
  void set_start_tag(double tag) { start_tag_ = tag; }

  const BlockTable& block_table() const { return kv_.blocks; }
  const KvState& kv() const { return kv_; }
  KvState& mutable_kv() { return kv_; }  // for KvCacheManager

  // Transitions; each CHECKs that it is legal in the current state.
  void Start(int num_cached_tokens, int history_slot, TimePoint now);  // waiting -> running
  void Preempt();      // running -> waiting; nothing is in flight, its blocks are released
  void Finish();       // any -> finished
  void ReleaseSlot();  // finished, nothing in flight: its blocks are released and its history slot is free
  void RequestAbort() { abort_requested_ = true; }
  void CountBlockWait() { ++num_block_waits_; }

  // A step takes up its next num_tokens rows, of which the last num_prompt_logprobs before the end of the prompt
  // report; with unread_row other than kNone the last row samples a token, as this result row of the step.
  void BeginStep(int num_tokens, int num_prompt_logprobs, int unread_row);
  // The oldest step in flight is read: its part, as it was begun. Then AppendOutput if it samples.
  void EndStep(int num_tokens, int num_prompt_logprobs);
  void AppendOutput(TokenId token, TimePoint now);
  // The same, when it has finished meanwhile and nobody wants the results.
  void DropStep();

  FinishEvent MakeFinishEvent(FinishReason reason, TokenId stop_token) const;

 private:
  const std::shared_ptr<const Request> request_;
  const int index_;
  const uint64_t order_;
  const std::string cache_salt_;
  SamplingParams params_;
  std::vector<TokenId> banned_tokens_;
  std::vector<TokenId> tokens_;
  KvState kv_;
  FairShareAccount* fair_share_ = nullptr;  // owned by FairQueue
  double start_tag_ = 0;
  SequenceState state_ = SequenceState::kWaiting;
  int num_computed_tokens_ = 0;
  int num_planned_tokens_ = 0;
  int num_unread_tokens_ = 0;
  int num_steps_in_flight_ = 0;
  int unread_row_ = engine::kNone;
  int num_cached_tokens_ = 0;
  int num_preemptions_ = 0;
  int num_block_waits_ = 0;
  int next_prompt_logprob_ = 0;
  int next_planned_prompt_logprob_ = 0;
  int history_slot_ = engine::kNone;
  bool history_reset_due_ = false;
  bool ever_scheduled_ = false;
  bool abort_requested_ = false;
  TimePoint first_scheduled_;
  TimePoint first_token_;
  TimePoint last_token_;
};

// Whether `a` is served before `b`: priority, then preempted ones (they hold a promise already), then arrival, index.
struct ServedBefore {
  bool operator()(const Sequence& a, const Sequence& b) const;
  bool operator()(const std::shared_ptr<Sequence>& a, const std::shared_ptr<Sequence>& b) const {
    return (*this)(*a, *b);
  }
};

// Puts `sequence` behind all that are served before it or are its equals.
void InsertInOrder(const std::shared_ptr<Sequence>& sequence, std::vector<std::shared_ptr<Sequence>>& queue);

}  // namespace minitron::scheduler
