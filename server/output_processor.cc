#include "server/output_processor.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/log.h"
#include "server/grpc_status.h"

namespace minitron::server {

using scheduler::Duration;
using scheduler::FinishEvent;
using scheduler::RequestId;
using scheduler::StepOutput;
using scheduler::TimePoint;
using scheduler::TokenEvent;

OutputProcessor::OutputProcessor(const OutputProcessorOptions& options, const Tokenizer* tokenizer, Metrics* metrics,
                                 std::function<TimePoint()> now)
    : options_(options), tokenizer_(tokenizer), metrics_(metrics), now_(std::move(now)) {}

OutputProcessor::~OutputProcessor() { Stop(); }

void OutputProcessor::Start() {
  CHECK(!thread_.joinable());
  thread_ = std::thread([this] { Run(); });
}

void OutputProcessor::Stop() {
  {
    std::lock_guard<std::mutex> lock(outbox_mutex_);
    stopping_ = true;
  }
  outbox_changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void OutputProcessor::OnStep(StepOutput output) {
  std::unique_lock<std::mutex> lock(outbox_mutex_);
  if (outbox_.size() >= options_.max_outbox_steps && !stopping_) {
    const TimePoint start = now_();
    outbox_changed_.wait(lock, [this] { return outbox_.size() < options_.max_outbox_steps || stopping_; });
    metrics_->AddOutboxWait(now_() - start);
  }
  outbox_.push_back(std::move(output));
  lock.unlock();
  outbox_changed_.notify_all();
}

void OutputProcessor::Run() {
  // Often enough that a stall is noticed at most a quarter late, rarely enough to cost nothing.
  const Duration tick =
      std::clamp<Duration>(options_.write_stall_timeout / 4, std::chrono::milliseconds(5), std::chrono::seconds(1));
  TimePoint next_check = scheduler::Clock::now() + tick;
  std::unique_lock<std::mutex> lock(outbox_mutex_);
  while (true) {
    outbox_changed_.wait_until(lock, next_check, [this] { return !outbox_.empty() || !end_status_.ok() || stopping_; });
    if (!end_status_.ok()) {
      const absl::Status status = std::exchange(end_status_, absl::OkStatus());
      lock.unlock();
      FailLiveCalls(status);
    } else if (!outbox_.empty()) {
      StepOutput output = std::move(outbox_.front());
      outbox_.pop_front();
      lock.unlock();
      outbox_changed_.notify_all();
      Process(std::move(output));
    } else if (stopping_) {
      return;
    } else {
      lock.unlock();
    }
    if (scheduler::Clock::now() >= next_check) {
      CutOffStalledCalls();
      next_check = scheduler::Clock::now() + tick;
    }
    lock.lock();
  }
}

void OutputProcessor::EndLiveCalls(absl::Status status) {
  std::lock_guard<std::mutex> lock(outbox_mutex_);
  end_status_ = std::move(status);
  outbox_changed_.notify_all();
}

absl::Status OutputProcessor::Register(RequestId id, CallSpec spec, std::shared_ptr<CallSink> sink) {
  auto call = std::make_shared<LiveCall>(id, tokenizer_, std::move(spec), std::move(sink));
  std::lock_guard<std::mutex> lock(registry_mutex_);
  // Under the lock: FailAll either sees this call or has set the flag already.
  if (failed_.load()) {
    return ReasonError(absl::StatusCode::kInternal, reason::kEngineFailure, "the engine has failed");
  }
  if (!names_.emplace(call->spec.request_id, id).second) {
    absl::Status status = ReasonError(absl::StatusCode::kAlreadyExists, reason::kDuplicateRequestId,
                                      absl::StrCat("request_id: \"", call->spec.request_id, "\" names a live request"));
    SetField(status, "request_id");
    return status;
  }
  sinks_.push_back(call->sink);
  live_[id] = std::move(call);
  return absl::OkStatus();
}

void OutputProcessor::Unregister(RequestId id) {
  if (const CallPtr call = Find(id); call != nullptr) Remove(call);
}

bool OutputProcessor::CancelByName(const std::string& request_id) {
  RequestId id = 0;
  {
    std::lock_guard<std::mutex> lock(registry_mutex_);
    const auto found = names_.find(request_id);
    if (found == names_.end()) return false;
    id = found->second;
  }
  abort_(id, -1);
  return true;
}

OutputProcessor::CallPtr OutputProcessor::Find(RequestId id) const {
  std::lock_guard<std::mutex> lock(registry_mutex_);
  const auto found = live_.find(id);
  return found == live_.end() ? nullptr : found->second;
}

void OutputProcessor::Remove(const CallPtr& call) {
  std::lock_guard<std::mutex> lock(registry_mutex_);
  live_.erase(call->id);
  names_.erase(call->spec.request_id);
}

int OutputProcessor::num_live() const {
  std::lock_guard<std::mutex> lock(registry_mutex_);
  return static_cast<int>(live_.size());
}

scheduler::StepStats OutputProcessor::last_stats() const {
  std::lock_guard<std::mutex> lock(registry_mutex_);
  return last_stats_;
}

StepOutput OutputProcessor::Recycled() {
  const std::lock_guard<std::mutex> lock(outbox_mutex_);
  if (recycled_.empty()) return {};
  StepOutput output = std::move(recycled_.back());
  recycled_.pop_back();
  return output;
}

void OutputProcessor::Process(StepOutput output) {
  observations_.Clear();
  // A token needs to know that it is the last one: the text of a stop token is not part of the answer.
  for (const FinishEvent& event : output.finished) {
    if (const CallPtr call = Find(event.id)) call->sequences[event.index].finish = &event;
  }
  for (auto& event : output.prompt_logprobs) {
    if (const CallPtr call = Find(event.id)) {
      std::move(event.positions.begin(), event.positions.end(), std::back_inserter(call->prompt_logprobs));
    }
  }
  for (const auto& event : output.prompts_done) HandleStarted(event);
  for (TokenEvent& event : output.tokens) HandleToken(event, output.stats.time);
  for (const FinishEvent& event : output.finished) HandleFinish(event);
  {
    std::lock_guard<std::mutex> lock(registry_mutex_);
    last_stats_ = output.stats;
  }
  metrics_->RecordStep(output.stats, observations_);
  // Only now: who sees the end of a call finds it counted.
  for (const std::shared_ptr<CallSink>& sink : completed_) sink->OnComplete();
  completed_.clear();
  if (!output.engine_error.empty()) {
    base::LogError(absl::StrCat("engine failed error=\"", output.engine_error, "\""));
    FailAll();
  }
  const std::lock_guard<std::mutex> lock(outbox_mutex_);
  if (recycled_.size() < options_.max_outbox_steps) recycled_.push_back(std::move(output));
}

void OutputProcessor::HandleStarted(const scheduler::PromptDoneEvent& event) {
  const CallPtr call = Find(event.id);
  if (call == nullptr || call->failed) return;
  call->num_cached_tokens = event.num_cached_tokens;
  if (call->spec.charge != nullptr) call->spec.charge->OnStarted();
  observations_.num_prompt_tokens += event.num_prompt_tokens;
  call->sink->OnStarted({event.num_prompt_tokens, event.num_cached_tokens, std::move(call->prompt_logprobs)});
}

void OutputProcessor::HandleToken(TokenEvent& event, TimePoint time) {
  const CallPtr call = Find(event.id);
  if (call == nullptr) return;
  SequenceState& sequence = call->sequences[event.index];
  if (call->failed || sequence.stop_sequence.has_value() || event.output.failed) return;
  CHECK(event.output_position == sequence.num_tokens);
  ++sequence.num_tokens;
  ++observations_.num_generated_tokens;
  if (sequence.num_tokens == 1) {
    sequence.first_token = time;
    observations_.time_to_first_token.push_back(std::chrono::duration<double>(now_() - call->spec.arrival).count());
  } else {
    observations_.inter_token_latency.push_back(std::chrono::duration<double>(time - sequence.last_token).count());
  }
  sequence.last_token = time;
  const bool ends_by_token = sequence.finish != nullptr &&
                             (sequence.finish->reason == scheduler::FinishReason::kEosToken ||
                              sequence.finish->reason == scheduler::FinishReason::kStopToken) &&
                             sequence.num_tokens == sequence.finish->num_output_tokens;
  std::string text = ends_by_token ? std::string() : sequence.detokenizer.Append(event.output.token_id);
  DeltaEvent delta;
  delta.index = event.index;
  delta.token = std::move(event.output);
  EmitText(*call, sequence, std::move(delta), text);
  if (!sequence.stop_sequence.has_value() || sequence.finish != nullptr) return;
  const bool all_stopped = std::all_of(call->sequences.begin(), call->sequences.end(), [](const SequenceState& other) {
    return other.finished || other.stop_sequence.has_value();
  });
  abort_(call->id, all_stopped ? -1 : event.index);
}

// Sends `text` as far as it is certain, together with what `delta` already holds.
void OutputProcessor::EmitText(LiveCall& call, SequenceState& sequence, DeltaEvent delta, const std::string& text) {
  StopChecker::Result result = sequence.stop_checker.Append(text, sequence.num_tokens >= call.spec.min_tokens);
  delta.text = std::move(result.text);
  sequence.stop_sequence = std::move(result.stop);
  if (delta.token.has_value() || !delta.text.empty()) call.sink->OnDelta(std::move(delta));
}

void OutputProcessor::HandleFinish(const FinishEvent& event) {
  const CallPtr call = Find(event.id);
  if (call == nullptr) return;
  SequenceState& sequence = call->sequences[event.index];
  sequence.finish = nullptr;
  CHECK(!sequence.finished);
  sequence.finished = true;
  ++call->num_finished;
  const bool ended_by_us = sequence.stop_sequence.has_value();
  if (!call->failed) {
    if (event.reason == scheduler::FinishReason::kError) {
      FailCall(*call,
               ReasonError(absl::StatusCode::kInternal, reason::kNonFiniteLogits,
                           "the model produced logits that are not finite for this request"),
               CallOutcome::kError);
    } else if (event.reason == scheduler::FinishReason::kDeadline && !ended_by_us) {
      FailCall(*call, call->DeadlineError(), CallOutcome::kDeadline);
    } else if (event.reason == scheduler::FinishReason::kCancelled && !ended_by_us) {
      FailCall(*call, ReasonError(absl::StatusCode::kCancelled, reason::kCancelled, "the request was cancelled"),
               CallOutcome::kCancelled);
    } else {
      if (!sequence.stop_sequence.has_value() && !call->spec.scoring) EmitTail(*call, sequence, event.index);
      ObserveSequence(event, sequence);
      call->sink->OnFinished(call->Finish(event));
    }
  }
  if (call->num_finished == call->spec.num_sequences) CloseCall(call);
}

// The text that waited for more: half a character, or what could have become a stop sequence.
void OutputProcessor::EmitTail(LiveCall& call, SequenceState& sequence, int index) {
  DeltaEvent tail;
  tail.index = index;
  StopChecker::Result rest =
      sequence.stop_checker.Append(sequence.detokenizer.Finish(), sequence.num_tokens >= call.spec.min_tokens);
  tail.text = std::move(rest.text);
  sequence.stop_sequence = std::move(rest.stop);
  if (!sequence.stop_sequence.has_value()) tail.text += sequence.stop_checker.Finish();
  if (!tail.text.empty()) call.sink->OnDelta(std::move(tail));
}

void OutputProcessor::ObserveSequence(const FinishEvent& event, const SequenceState& sequence) {
  const auto seconds = [](Duration duration) { return std::chrono::duration<double>(duration).count(); };
  if (event.first_scheduled == TimePoint{}) return;
  observations_.queue_time.push_back(seconds(event.first_scheduled - event.arrival));
  observations_.generation_tokens.push_back(sequence.num_tokens);
  if (sequence.num_tokens == 0) return;
  const Duration decode = sequence.last_token - sequence.first_token;
  observations_.prefill_time.push_back(seconds(sequence.first_token - event.first_scheduled));
  observations_.decode_time.push_back(seconds(decode));
  observations_.inference_time.push_back(seconds(sequence.last_token - event.first_scheduled));
  if (sequence.num_tokens > 1)
    observations_.time_per_output_token.push_back(seconds(decode) / (sequence.num_tokens - 1));
}

// Sends the sink its last event. What was generated so far is told in the details, because it was computed.
void OutputProcessor::FailCall(LiveCall& call, const absl::Status& status, CallOutcome outcome) {
  absl::Status with_usage = status;
  AddMetadata(with_usage, "prompt_tokens", absl::StrCat(call.spec.num_prompt_tokens));
  AddMetadata(with_usage, "cached_tokens", absl::StrCat(call.num_cached_tokens));
  AddMetadata(with_usage, "completion_tokens", absl::StrCat(call.NumGenerated()));
  call.failed = true;
  call.outcome = outcome;
  if (call.num_finished < call.spec.num_sequences) abort_(call.id, -1);
  call.sink->OnFailed(ToGrpcStatus(with_usage));
}

// Unregisters first: a client that sees the end may use the name again at once.
void OutputProcessor::CloseCall(const CallPtr& call) {
  const double seconds = std::chrono::duration<double>(now_() - call->spec.arrival).count();
  ++observations_.outcomes[static_cast<int>(call->outcome)];
  observations_.outcome_seconds[static_cast<int>(call->outcome)] += seconds;
  observations_.e2e_latency.push_back(seconds);
  observations_.prompt_tokens.push_back(call->spec.num_prompt_tokens);
  if (call->spec.charge != nullptr) call->spec.charge->Settle(call->spec.num_prompt_tokens + call->NumGenerated());
  Remove(call);
  if (!call->failed) completed_.push_back(call->sink);
}

void OutputProcessor::FailAll() {
  std::unordered_map<RequestId, CallPtr> live;
  {
    std::lock_guard<std::mutex> lock(registry_mutex_);
    failed_.store(true);
    live.swap(live_);
    names_.clear();
  }
  metrics_->CountEngineError();
  const absl::Status status = ReasonError(absl::StatusCode::kInternal, reason::kEngineFailure,
                                          "the engine has failed; this server will restart");
  StepObservations lost;
  for (const auto& [id, call] : live) {
    ++lost.outcomes[static_cast<int>(CallOutcome::kError)];
    if (!call->failed) FailCall(*call, status, CallOutcome::kError);
  }
  metrics_->RecordStep(scheduler::StepStats{}, lost);
  on_engine_failure_();
}

// The calls stay registered until the engine's last events of them, as after any other failure.
void OutputProcessor::FailLiveCalls(const absl::Status& status) {
  std::unordered_map<RequestId, CallPtr> live;
  {
    std::lock_guard<std::mutex> lock(registry_mutex_);
    live = live_;
  }
  for (const auto& [id, call] : live) {
    if (!call->failed) FailCall(*call, status, CallOutcome::kCancelled);
  }
}

void OutputProcessor::CutOffStalledCalls() {
  std::vector<std::shared_ptr<CallSink>> open;
  {
    std::lock_guard<std::mutex> lock(registry_mutex_);
    std::erase_if(sinks_, [](const std::weak_ptr<CallSink>& sink) { return sink.expired(); });
    for (const std::weak_ptr<CallSink>& sink : sinks_) {
      if (std::shared_ptr<CallSink> alive = sink.lock()) open.push_back(std::move(alive));
    }
  }
  const TimePoint limit = now_() - options_.write_stall_timeout;
  for (const std::shared_ptr<CallSink>& sink : open) {
    if (sink->CutOffIfStalled(limit)) metrics_->CountWriteStall();
  }
}

}  // namespace minitron::server
