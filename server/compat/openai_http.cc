#include "server/compat/openai_http.h"

#include <atomic>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/admission.h"
#include "server/compat/page.h"
#include "server/grpc_status.h"

namespace minitron::server::compat {
namespace {

using Json = nlohmann::ordered_json;

// How often a request whose answer comes in one piece looks whether somebody still waits for it.
constexpr std::chrono::milliseconds kLookForClient{100};

// What is not UTF-8 becomes U+FFFD.
std::string Serialize(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

int64_t UnixSeconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// All tokens of the prompt are targets: their log-probabilities, and nothing generated.
absl::StatusOr<BuiltRequest> BuildPromptScore(const v1::GenerationTask& task, const ServedModel& model,
                                              const CallContext& caller) {
  v1::ScoreRequest score;
  score.set_model(task.model());
  score.set_top_logprobs(task.output().prompt_logprobs());
  score.set_priority(task.priority());
  score.set_cache_salt(task.cache_salt());
  *score.mutable_tokenize_options() = task.tokenize_options();
  if (task.has_text()) {
    score.set_target_text(task.text());
  } else {
    *score.mutable_target_token_ids() = task.token_ids();
  }
  return BuildScore(score, model, caller);
}

const char* KnownPath(const std::string& path) {
  static constexpr const char* kPaths[] = {"/",         "/v1/models",  "/v1/completions", "/v1/chat/completions",
                                           "/tokenize", "/detokenize", "/tokenizer_info", "/load",
                                           "/healthz",  "/readyz"};
  for (const char* known : kPaths) {
    if (path == known) return known;
  }
  return "other";
}

}  // namespace

class OpenAiHttp::Events {
 public:
  struct Complete {};
  using Event = std::variant<StartedEvent, DeltaEvent, FinishedEvent, Complete, grpc::Status>;

  explicit Events(size_t num_prompts) : ids_(num_prompts) {}

  void Push(size_t prompt, Event event) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.emplace_back(prompt, std::move(event));
    }
    changed_.notify_one();
  }
  // Waits. Every admitted request sends Complete or a status at last: it has a deadline.
  std::pair<size_t, Event> Pop() {
    while (!WaitFor(std::chrono::hours(1))) {
    }
    std::lock_guard<std::mutex> lock(mutex_);
    auto event = std::move(queue_.front());
    queue_.pop_front();
    return event;
  }
  // Whether there is an event, after at most `time`.
  bool WaitFor(scheduler::Duration time) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, time, [this] { return !queue_.empty(); });
  }
  std::atomic<scheduler::RequestId>& id(size_t prompt) { return ids_[prompt]; }
  void Abort(const ServerContext& server) {
    for (const auto& id : ids_) {
      if (id.load() != 0) server.abort(id.load());
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<size_t, Event>> queue_;
  std::vector<std::atomic<scheduler::RequestId>> ids_;  // 0: not admitted
};

class OpenAiHttp::Sink final : public CallSink {
 public:
  Sink(std::shared_ptr<Events> events, size_t prompt) : events_(std::move(events)), prompt_(prompt) {}

  void OnStarted(StartedEvent event) override { events_->Push(prompt_, std::move(event)); }
  void OnDelta(DeltaEvent event) override { events_->Push(prompt_, std::move(event)); }
  void OnFinished(FinishedEvent event) override { events_->Push(prompt_, std::move(event)); }
  void OnComplete() override { events_->Push(prompt_, Events::Complete{}); }
  void OnFailed(const grpc::Status& status) override { events_->Push(prompt_, status); }
  bool CutOffIfStalled(scheduler::TimePoint) override { return false; }  // the HTTP server's own timeout does

 private:
  const std::shared_ptr<Events> events_;
  const size_t prompt_;
};

absl::StatusOr<std::unique_ptr<OpenAiHttp>> OpenAiHttp::Start(const HttpOptions& options, ChatTemplate chat_template,
                                                              ServerContext* server) {
  std::unique_ptr<OpenAiHttp> self(new OpenAiHttp(chat_template, options.max_body_bytes, server));
  OpenAiHttp* handler = self.get();
  ASSIGN_OR_RETURN(self->http_,
                   HttpServer::Start(options, [handler](HttpExchange& exchange) { handler->Handle(exchange); }));
  return self;
}

OpenAiHttp::~OpenAiHttp() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    for (const std::shared_ptr<Events>& events : running_) events->Abort(*server_);
  }
  http_.reset();
}

void OpenAiHttp::Handle(HttpExchange& exchange) {
  const std::string path = KnownPath(exchange.path());
  HttpCall call(server_, &exchange, KnownPath(exchange.path()));
  const bool is_healthy = !server_->output->failed();
  if (path == "other") {
    const std::string shown = exchange.path().substr(0, 128);
    return call.RespondError(absl::NotFoundError(absl::StrCat("there is no ", shown)));
  }
  const bool wants_post =
      path == "/v1/completions" || path == "/v1/chat/completions" || path == "/tokenize" || path == "/detokenize";
  if (exchange.method() != (wants_post ? "POST" : "GET")) {
    return exchange.Respond(405, "application/json",
                            ErrorJson(FieldError("method", absl::StrCat(path, " takes ", wants_post ? "POST" : "GET"))),
                            absl::StrCat("Allow: ", wants_post ? "POST" : "GET", "\r\n"));
  }
  if (path == "/") return exchange.Respond(200, "text/html; charset=utf-8", kPage, kPageHeaders);
  if (path == "/healthz")
    return exchange.Respond(is_healthy ? 200 : 503, "text/plain", is_healthy ? "ok\n" : "failed\n");
  if (path == "/readyz") {
    const bool is_ready = is_healthy && server_->ready.load();
    return exchange.Respond(is_ready ? 200 : 503, "text/plain", is_ready ? "ready\n" : "not ready\n");
  }
  if (path == "/v1/completions" || path == "/v1/chat/completions") return Complete(call, path != "/v1/completions");
  const absl::Status allowed = call.Authorize(path == "/load" ? Role::kAdmin : Role::kUser);
  if (!allowed.ok()) return call.RespondError(allowed);
  const absl::StatusOr<std::string> json = path == "/v1/models"    ? Models()
                                           : path == "/tokenize"   ? Tokenize(exchange)
                                           : path == "/detokenize" ? Detokenize(exchange)
                                           : path == "/load"       ? Load()
                                                                   : TokenizerInfo();
  json.ok() ? call.RespondJson(*json) : call.RespondError(json.status());
}

void OpenAiHttp::Complete(HttpCall& call, bool is_chat) {
  const auto read = [&]() -> absl::StatusOr<CompletionRequest> {
    RETURN_IF_ERROR(call.Begin());
    ASSIGN_OR_RETURN(const std::string body, call.exchange().ReadBody(max_body_bytes_));
    return is_chat ? ReadChat(body, chat_template_, server_->model) : ReadCompletion(body);
  };
  const absl::StatusOr<CompletionRequest> request = read();
  if (!request.ok()) {
    CountRefusal(*server_, request.status(), call.tenant());
    return call.RespondError(request.status());
  }
  CompletionAnswer answer(&*request, &server_->model,
                          absl::StrCat(is_chat ? "chatcmpl-" : "cmpl-", server_->names.FreshName()), UnixSeconds());
  const auto events = std::make_shared<Events>(request->tasks.size());
  {
    std::lock_guard<std::mutex> lock(mutex_);
    running_.insert(events);
  }
  const absl::Status admitted = AdmitAll(call, *request, answer, events);
  if (!admitted.ok()) {
    events->Abort(*server_);
    call.RespondError(admitted);
  } else if (request->stream) {
    Stream(call, *request, answer, *events);
  } else {
    Answer(call, *request, answer, *events);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  running_.erase(events);
}

absl::Status OpenAiHttp::AdmitAll(HttpCall& call, const CompletionRequest& request, CompletionAnswer& answer,
                                  const std::shared_ptr<Events>& events) {
  // All are built before the first is admitted: one bad prompt costs the engine nothing.
  std::vector<BuiltRequest> built;
  for (size_t i = 0; i < request.tasks.size(); ++i) {
    const CallContext caller = call.NextRequest(i, request.tasks.size());
    absl::StatusOr<BuiltRequest> one = request.score_only ? BuildPromptScore(request.tasks[i], server_->model, caller)
                                                          : BuildGenerate(request.tasks[i], server_->model, caller);
    if (!one.ok()) {
      CountRefusal(*server_, one.status(), call.tenant());
      return one.status();
    }
    answer.SetPrompt(i, *one);
    built.push_back(*std::move(one));
  }
  for (size_t i = 0; i < built.size(); ++i) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stopping_) return ReasonError(absl::StatusCode::kUnavailable, reason::kDraining, "the server is stopping");
    }
    RETURN_IF_ERROR(Admit(*server_, std::move(built[i]), std::make_shared<Sink>(events, i), events->id(i)));
  }
  // Whoever stopped the server before the last id was known did not abort that one.
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) events->Abort(*server_);
  return absl::OkStatus();
}

void OpenAiHttp::Answer(HttpCall& call, const CompletionRequest& request, CompletionAnswer& answer, Events& events) {
  auto next_look = scheduler::Clock::now() + kLookForClient;
  for (size_t num_complete = 0; num_complete < request.tasks.size();) {
    const bool has_event = events.WaitFor(kLookForClient);
    if (const auto now = scheduler::Clock::now(); now >= next_look) {
      next_look = now + kLookForClient;
      if (call.exchange().ClientIsGone()) {
        events.Abort(*server_);
        return call.RespondError(ReasonError(absl::StatusCode::kCancelled, reason::kCancelled, "the client is gone"));
      }
    }
    if (!has_event) continue;
    const auto [prompt, event] = events.Pop();
    if (const auto* status = std::get_if<grpc::Status>(&event)) {
      events.Abort(*server_);
      return call.RespondError(FromGrpcStatus(*status));
    }
    if (const auto* started = std::get_if<StartedEvent>(&event)) answer.Add(prompt, *started);
    if (const auto* delta = std::get_if<DeltaEvent>(&event)) answer.Add(prompt, *delta);
    if (const auto* finished = std::get_if<FinishedEvent>(&event)) {
      call.AddUsage(finished->index == 0 ? finished->num_prompt_tokens : 0, finished->num_output_tokens);
      answer.Add(prompt, *finished);
    }
    if (std::holds_alternative<Events::Complete>(event)) ++num_complete;
  }
  call.RespondJson(answer.Whole());
}

void OpenAiHttp::Stream(HttpCall& call, const CompletionRequest& request, CompletionAnswer& answer, Events& events) {
  HttpExchange& exchange = call.exchange();
  bool is_open = false;
  const auto send = [&](const std::vector<std::string>& pieces) {
    bool ok = is_open || exchange.BeginEvents();
    is_open = true;
    for (const std::string& piece : pieces) ok = ok && exchange.SendEvent(piece);
    return ok;
  };
  for (size_t num_complete = 0; num_complete < request.tasks.size();) {
    const auto [prompt, event] = events.Pop();
    bool client_is_there = true;
    if (const auto* status = std::get_if<grpc::Status>(&event)) {
      events.Abort(*server_);
      const absl::Status error = FromGrpcStatus(*status);
      if (!is_open) return call.RespondError(error);
      exchange.SendEvent(ErrorJson(error));  // and no [DONE]: the answer is truncated
      return exchange.EndEvents();
    }
    if (const auto* started = std::get_if<StartedEvent>(&event)) client_is_there = send(answer.Add(prompt, *started));
    if (const auto* delta = std::get_if<DeltaEvent>(&event)) client_is_there = send(answer.Add(prompt, *delta));
    if (const auto* finished = std::get_if<FinishedEvent>(&event)) {
      call.AddUsage(finished->index == 0 ? finished->num_prompt_tokens : 0, finished->num_output_tokens);
      client_is_there = send(answer.Add(prompt, *finished));
    }
    if (std::holds_alternative<Events::Complete>(event)) ++num_complete;
    if (!client_is_there) return events.Abort(*server_);
  }
  if (const std::string usage = answer.StreamedUsage(); !usage.empty()) exchange.SendEvent(usage);
  exchange.SendEvent("[DONE]");
  exchange.EndEvents();
}

absl::StatusOr<std::string> OpenAiHttp::Models() const {
  const auto up = std::chrono::duration_cast<std::chrono::seconds>(server_->now() - server_->ready_since).count();
  const Json model = {{"id", server_->model.name},
                      {"object", "model"},
                      {"created", UnixSeconds() - up},
                      {"owned_by", "minitron-server"},
                      {"max_model_len", server_->model.info.max_context_tokens}};
  return Serialize({{"object", "list"}, {"data", Json::array({model})}});
}

absl::StatusOr<std::string> OpenAiHttp::Tokenize(HttpExchange& exchange) const {
  ASSIGN_OR_RETURN(const std::string body, exchange.ReadBody(max_body_bytes_));
  ASSIGN_OR_RETURN(const v1::TokenizeRequest request, ReadTokenize(body));
  ASSIGN_OR_RETURN(const std::vector<engine::TokenId> ids, BuildTokenize(request, server_->model));
  return Serialize({{"tokens", ids}, {"count", ids.size()}, {"max_model_len", server_->model.info.max_context_tokens}});
}

absl::StatusOr<std::string> OpenAiHttp::Detokenize(HttpExchange& exchange) const {
  ASSIGN_OR_RETURN(const std::string body, exchange.ReadBody(max_body_bytes_));
  ASSIGN_OR_RETURN(const v1::DetokenizeRequest request, ReadDetokenize(body));
  ASSIGN_OR_RETURN(const std::string text, BuildDetokenize(request, server_->model));
  return Serialize({{"prompt", text}});
}

absl::StatusOr<std::string> OpenAiHttp::TokenizerInfo() const {
  const ServedModel& model = server_->model;
  const auto spelling = [&](engine::TokenId id) {
    return id < 0 ? Json(nullptr) : Json(model.tokenizer->TokenBytes(id, /*skip_special=*/false));
  };
  const auto& eos = model.info.eos_token_ids;
  return Serialize({{"tokenizer_class", "sentencepiece"},
                    {"vocab_size", model.info.vocab_size},
                    {"model_max_length", model.info.max_context_tokens},
                    {"add_bos_token", model.default_add_bos},
                    {"eos_token", eos.empty() ? Json(nullptr) : spelling(eos.front())},
                    {"bos_token", spelling(model.tokenizer->bos_id())},
                    {"pad_token", nullptr},
                    {"chat_template", nullptr}});
}

absl::StatusOr<std::string> OpenAiHttp::Load() const {
  const scheduler::StepStats stats = server_->output->last_stats();
  return Serialize({{"running", stats.num_running},
                    {"waiting", server_->queue_depth()},
                    {"kv_blocks_used", stats.num_blocks_used},
                    {"kv_blocks", server_->limits.kv_blocks},
                    {"draining", server_->draining.load()}});
}

}  // namespace minitron::server::compat
