// The OpenAI-compatible HTTP port: completions, chat, tokenizer, models, health, and a page for people. An adapter:
// what a body asks for becomes native tasks, built and admitted as gRPC's are. A request blocks its thread until it is
// done.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <variant>

#include "server/compat/http_call.h"
#include "server/compat/http_server.h"
#include "server/compat/openai_answer.h"
#include "server/server_context.h"

namespace minitron::server::compat {

class OpenAiHttp {
 public:
  // Error: UNAVAILABLE when the port cannot be bound. `server` must outlive this object.
  static absl::StatusOr<std::unique_ptr<OpenAiHttp>> Start(const HttpOptions& options, ChatTemplate chat_template,
                                                           ServerContext* server);
  // Aborts what runs, so that its handlers end, and waits for them. The engine must still run, or have failed.
  ~OpenAiHttp();

  int port() const { return http_->port(); }

 private:
  class Events;  // of all prompts of one HTTP request, in order of arrival
  class Sink;

  OpenAiHttp(ChatTemplate chat_template, int64_t max_body_bytes, ServerContext* server)
      : chat_template_(chat_template), max_body_bytes_(max_body_bytes), server_(server) {}

  void Handle(HttpExchange& exchange);
  void Complete(HttpCall& call, bool is_chat);
  absl::Status AdmitAll(HttpCall& call, const CompletionRequest& request, CompletionAnswer& answer,
                        const std::shared_ptr<Events>& events);
  void Answer(HttpCall& call, const CompletionRequest& request, CompletionAnswer& answer, Events& events);
  void Stream(HttpCall& call, const CompletionRequest& request, CompletionAnswer& answer, Events& events);

  // Each fills in the answer of a path that needs no engine.
  absl::StatusOr<std::string> Models() const;
  absl::StatusOr<std::string> Tokenize(HttpExchange& exchange) const;
  absl::StatusOr<std::string> Detokenize(HttpExchange& exchange) const;
  absl::StatusOr<std::string> TokenizerInfo() const;
  absl::StatusOr<std::string> Load() const;

  const ChatTemplate chat_template_;
  const int64_t max_body_bytes_;
  ServerContext* server_;  // owned by Serving
  std::mutex mutex_;
  std::set<std::shared_ptr<Events>> running_;
  bool stopping_ = false;
  std::unique_ptr<HttpServer> http_;
};

}  // namespace minitron::server::compat
