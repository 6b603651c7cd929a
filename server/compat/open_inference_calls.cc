#include "server/compat/open_inference_calls.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/grpc_status.h"

namespace minitron::server::compat {
namespace {

// Requests of one stream that are open at once; more wait unread, in the client.
constexpr size_t kMaxOpenRequests = 1024;

// The native request, with the options of its answer put into `options`.
absl::StatusOr<BuiltRequest> Build(const inference::ModelInferRequest& request, const ServedModel& model,
                                   CallContext call, InferOptions& options) {
  options.id = request.id();
  ASSIGN_OR_RETURN(InferTask task, ReadInferRequest(request));
  options = std::move(task.options);
  if (task.timeout.has_value()) {
    call.deadline =
        std::min(call.deadline, call.arrival + std::min<scheduler::Duration>(*task.timeout, std::chrono::hours(24)));
  }
  return BuildGenerate(task.task, model, call);
}

}  // namespace

InferCall::InferCall(ServerContext* server, grpc::CallbackServerContext* context,
                     inference::ModelInferResponse* response)
    : UnaryEngineCall(server, context, "ModelInfer"), response_(response) {}

grpc::ServerUnaryReactor* InferCall::Start(ServerContext* server, grpc::CallbackServerContext* context,
                                           const inference::ModelInferRequest& request,
                                           inference::ModelInferResponse* response) {
  auto call = std::make_shared<InferCall>(server, context, response);
  InferCall& self = *call;
  call->Run([&](const CallContext& caller) { return Build(request, server->model, caller, self.options_); }, call);
  return call.get();
}

void InferCall::OnAdmitting(const BuiltRequest& built) {
  answer_.emplace(std::move(options_), built.spec.num_sequences, &server()->model);
}

void InferCall::OnStarted(StartedEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  answer_->Add(event);
}

void InferCall::OnDelta(DeltaEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  answer_->Add(std::move(event));
}

void InferCall::OnFinished(FinishedEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  scope().AddUsage(event.num_prompt_tokens, event.num_output_tokens);
  answer_->Add(event);
}

void InferCall::Complete() { answer_->Take(*response_); }

// The sink of one request. Its state is guarded by the stream's mutex; it keeps the stream alive.
class StreamInferCall::Entry final : public CallSink, public std::enable_shared_from_this<Entry> {
 public:
  explicit Entry(std::shared_ptr<StreamInferCall> call) : stream(std::move(call)) {}

  void OnStarted(StartedEvent event) override {
    std::lock_guard<std::mutex> lock(stream->mutex_);
    answer->Add(event);
  }
  void OnDelta(DeltaEvent event) override {
    std::lock_guard<std::mutex> lock(stream->mutex_);
    answer->Add(std::move(event));
    if (answer->options().stream) stream->Enqueue(shared_from_this());
  }
  void OnFinished(FinishedEvent event) override {
    std::lock_guard<std::mutex> lock(stream->mutex_);
    answer->Add(event);
    if (stream->finished_) return;
    if (event.index == 0) stream->num_prompt_tokens_ += event.num_prompt_tokens;
    stream->scope_.AddUsage(stream->num_prompt_tokens_, event.num_output_tokens);
  }
  void OnComplete() override {
    std::lock_guard<std::mutex> lock(stream->mutex_);
    complete = true;
    stream->Enqueue(shared_from_this());
  }
  void OnFailed(const grpc::Status& status) override { stream->Fail(shared_from_this(), status); }
  bool CutOffIfStalled(scheduler::TimePoint limit) override { return stream->CutOffIfStalled(limit); }

  const std::shared_ptr<StreamInferCall> stream;
  InferOptions options;               // until there is an answer
  std::optional<InferAnswer> answer;  // set before admission
  std::atomic<scheduler::RequestId> id{0};
  bool complete = false;
  std::optional<grpc::Status> failed;
  bool queued = false;
};

StreamInferCall::StreamInferCall(ServerContext* server, grpc::CallbackServerContext* context)
    : server_(server), scope_(server, context, "ModelStreamInfer") {
  const auto found = context->client_metadata().find("triton_grpc_error");
  errors_end_the_stream_ = found != context->client_metadata().end() && found->second == "true";
  server_->metrics->StreamOpened();
  server_->open_calls.Enter();
}

StreamInferCall* StreamInferCall::Start(ServerContext* server, grpc::CallbackServerContext* context) {
  auto call = std::make_shared<StreamInferCall>(server, context);
  call->self_ = call;
  const absl::Status begun = call->scope_.Begin().status();
  if (!begun.ok()) CountRefusal(*server, begun, call->scope_.tenant());
  std::lock_guard<std::mutex> lock(call->mutex_);
  if (!begun.ok()) call->end_ = ToGrpcStatus(begun);
  call->Advance();
  return call.get();
}

void StreamInferCall::OnReadDone(bool ok) {
  EntryPtr entry;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!ok || finished_) {
      reading_ = false;
      reads_done_ = true;
      Advance();
      return;
    }
    entry = std::make_shared<Entry>(self_);
    open_.insert(entry);
  }
  if (const absl::Status status = Admit(incoming_, entry); !status.ok()) Fail(entry, ToGrpcStatus(status));
  bool ended = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ended = end_.has_value();  // while the request was admitted: whoever ended the stream did not know it yet
    reading_ = false;
    Advance();
  }
  if (ended) server_->abort(entry->id.load());
}

absl::Status StreamInferCall::Admit(const inference::ModelInferRequest& request, const EntryPtr& entry) {
  CallContext call = scope_.NextRequest();
  call.request_id.clear();  // the header names the stream; its requests are told apart by their ids
  absl::StatusOr<BuiltRequest> built = Build(request, server_->model, std::move(call), entry->options);
  if (!built.ok()) {
    CountRefusal(*server_, built.status(), scope_.tenant());
    return built.status();
  }
  entry->answer.emplace(entry->options, built->spec.num_sequences, &server_->model);
  return server::Admit(*server_, *std::move(built), entry, entry->id);
}

void StreamInferCall::Fail(const EntryPtr& entry, const grpc::Status& status) {
  std::vector<scheduler::RequestId> others;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (entry->complete) return;
    entry->complete = true;
    entry->failed = status;
    if (errors_end_the_stream_) {
      end_ = status;
      others = TakeLiveIds();
      Advance();
    } else {
      Enqueue(entry);
    }
  }
  for (const scheduler::RequestId id : others) server_->abort(id);
}

void StreamInferCall::Enqueue(const EntryPtr& entry) {
  if (!entry->queued && !finished_) {
    entry->queued = true;
    ready_.push_back(entry);
  }
  Advance();
}

void StreamInferCall::Advance() {
  if (finished_) return;
  if (!reading_ && !reads_done_ && !end_.has_value() && open_.size() < kMaxOpenRequests) {
    reading_ = true;
    StartRead(&incoming_);
  }
  if (writing_ != nullptr) return;
  const bool all_answered = reads_done_ && open_.empty();
  if (end_.has_value() || (all_answered && ready_.empty())) {
    finished_ = true;
    ready_.clear();
    Finish(scope_.Close(end_.value_or(grpc::Status::OK)));
    return;
  }
  if (ready_.empty()) return;
  writing_ = std::move(ready_.front());
  ready_.pop_front();
  writing_->queued = false;
  if (FillMessage(*writing_)) {
    open_.erase(writing_);
  } else if (writing_->complete) {
    // The end came together with the last text, and the client asked for an empty last message.
    writing_->queued = true;
    ready_.push_front(writing_);
  }
  write_started_ = server_->now();
  StartWrite(&in_flight_);
}

bool StreamInferCall::FillMessage(Entry& entry) {
  in_flight_.Clear();
  inference::ModelInferResponse& response = *in_flight_.mutable_infer_response();
  bool is_last = entry.complete;
  if (entry.failed.has_value()) {
    in_flight_.set_error_message(entry.failed->error_message());
    response.set_model_name(server_->model.name);
    response.set_id(entry.options.id);
  } else if (entry.answer->has_news() || !entry.answer->options().empty_final) {
    is_last = is_last && !entry.answer->options().empty_final;
    entry.answer->Take(response);
  } else {
    entry.answer->TakeNothing(response);
  }
  (*response.mutable_parameters())["triton_final_response"].set_bool_param(is_last);
  return is_last;
}

std::vector<scheduler::RequestId> StreamInferCall::TakeLiveIds() {
  std::vector<scheduler::RequestId> ids;
  for (const EntryPtr& entry : open_) {
    if (!entry->complete) ids.push_back(entry->id.load());
  }
  return ids;
}

void StreamInferCall::OnWriteDone(bool ok) {
  std::vector<scheduler::RequestId> live;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    writing_.reset();
    if (!ok && !end_.has_value()) {
      end_ = ToGrpcStatus(ReasonError(absl::StatusCode::kCancelled, reason::kCancelled, "the client is gone"));
      live = TakeLiveIds();
    }
    Advance();
  }
  for (const scheduler::RequestId id : live) server_->abort(id);
}

void StreamInferCall::OnCancel() {
  std::vector<scheduler::RequestId> live;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    live = TakeLiveIds();
    if (!end_.has_value()) {
      end_ = ToGrpcStatus(ReasonError(absl::StatusCode::kCancelled, reason::kCancelled, "the client cancelled"));
    }
    Advance();
  }
  for (const scheduler::RequestId id : live) server_->abort(id);
}

bool StreamInferCall::CutOffIfStalled(scheduler::TimePoint limit) {
  std::vector<scheduler::RequestId> live;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (writing_ == nullptr || gone_ || cut_off_ || write_started_ > limit) return false;
    cut_off_ = true;
    if (!end_.has_value()) {
      end_ =
          ToGrpcStatus(ReasonError(absl::StatusCode::kCancelled, reason::kWriteStalled, "the client stopped reading"));
    }
    live = TakeLiveIds();
    scope_.context()->TryCancel();
  }
  for (const scheduler::RequestId id : live) server_->abort(id);
  return true;
}

void StreamInferCall::OnDone() {
  const std::shared_ptr<StreamInferCall> self = std::move(self_);
  server_->metrics->StreamClosed();
  server_->open_calls.Leave();
  std::lock_guard<std::mutex> lock(mutex_);
  gone_ = true;
  open_.clear();  // they keep this object alive while the engine still knows them
  ready_.clear();
}

}  // namespace minitron::server::compat
