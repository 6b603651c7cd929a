// HttpServer: HTTP/1.1 on a port of its own, over civetweb (which serves /metrics too). One thread per request that is
// being answered, a fixed number of them; more connections wait, then in the kernel. No keep-alive, so that no thread
// belongs to an idle client. Bodies and headers are bounded.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"

struct mg_connection;
struct mg_context;

namespace minitron::server::compat {

struct HttpOptions {
  std::string host = "127.0.0.1";
  int port = 0;  // 0: any free one
  int num_threads = 32;
  int64_t max_body_bytes = 4 << 20;
  int timeout_ms = 30'000;  // of one read or write
};

// Address and port as civetweb wants them: the one of IPv6 in brackets.
std::string ListeningPort(const HttpOptions& options);

// One request and its answer. Only on the thread of its handler.
class HttpExchange {
 public:
  explicit HttpExchange(mg_connection* connection) : connection_(connection) {}

  std::string method() const;
  std::string path() const;
  std::string Header(const char* name) const;  // empty when it is not there
  std::string peer() const;

  // Reads the whole body. Errors: RESOURCE_EXHAUSTED (longer than allowed), CANCELLED (the client went away).
  absl::StatusOr<std::string> ReadBody(int64_t max_bytes);

  // Sends a whole answer. `headers` are lines that end in "\r\n". Either this, once, or the three below.
  void Respond(int code, const std::string& content_type, const std::string& body, const std::string& headers = "");

  // Lines that end in "\r\n" and go into the head of whatever answer comes.
  void AddHeaders(const std::string& headers) { headers_ += headers; }

  // Whether the client closed its side while it waits for the answer, or is gone. A client that half-closes counts as
  // gone, as it does for most proxies. False when it cannot be told.
  bool ClientIsGone();

  // Starts an answer of server-sent events; sends one; ends it. False when the client is gone.
  bool BeginEvents();
  bool SendEvent(const std::string& data);
  void EndEvents();

  int code() const { return code_; }  // of the answer; 0 before there is one

 private:
  mg_connection* connection_;  // civetweb's, for the length of the handler
  int code_ = 0;
  std::string headers_;
  std::optional<int> socket_;  // looked for once; -1: not found
};

class HttpServer {
 public:
  using Handler = std::function<void(HttpExchange&)>;

  // Error: UNAVAILABLE when the port cannot be bound (names host and port). `handler` runs on many threads.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const HttpOptions& options, Handler handler);
  ~HttpServer();  // waits for the handlers that run

  int port() const { return port_; }

 private:
  explicit HttpServer(Handler handler) : handler_(std::move(handler)) {}

  const Handler handler_;
  mg_context* context_ = nullptr;
  int port_ = 0;
};

}  // namespace minitron::server::compat
