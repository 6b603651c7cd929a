#include "server/compat/http_server.h"

#include <civetweb.h>
#include <dirent.h>
#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>

#include <cstdlib>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/grpc_status.h"

namespace minitron::server::compat {
namespace {

constexpr char kMaxHeaderBytes[] = "16384";

int Silent(const mg_connection*, const char*) { return 1; }

int Handle(mg_connection* connection, void* handler) {
  HttpExchange exchange(connection);
  (*static_cast<const HttpServer::Handler*>(handler))(exchange);
  return exchange.code();
}

// A numeric address with its port, as civetweb spells the parts.
std::string Spell(const sockaddr_storage& address, socklen_t length) {
  char host[NI_MAXHOST];
  char port[NI_MAXSERV];
  constexpr int kNumeric = NI_NUMERICHOST | NI_NUMERICSERV;
  const auto* plain = reinterpret_cast<const sockaddr*>(&address);
  if (getnameinfo(plain, length, host, sizeof(host), port, sizeof(port), kNumeric) != 0) return "";
  return absl::StrCat(host, " ", port);
}

// One end of a socket, as Spell gives it; empty when the descriptor is no internet socket with such an end.
std::string EndOf(int fd, int (*get)(int, sockaddr*, socklen_t*)) {
  sockaddr_storage address{};
  socklen_t length = sizeof(address);
  if (get(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0) return "";
  if (address.ss_family != AF_INET && address.ss_family != AF_INET6) return "";
  return Spell(address, length);
}

bool IsAtPort(int fd, int port) {
  const std::string local = EndOf(fd, getsockname);
  return !local.empty() && local.substr(local.find(' ') + 1) == absl::StrCat(port);
}

// civetweb keeps its descriptors to itself: they are looked for among those of this process. -1 when there is none. A
// system call per open descriptor.
template <typename Predicate>
int FindDescriptor(const Predicate& is_it) {
  const std::unique_ptr<DIR, int (*)(DIR*)> open(opendir("/proc/self/fd"), closedir);
  while (const dirent* entry = open == nullptr ? nullptr : readdir(open.get())) {
    const int fd = std::atoi(entry->d_name);
    if (is_it(fd)) return fd;
  }
  return -1;
}

// The connection with the request's peer. It stays the connection's as long as its handler runs.
int FindSocket(const mg_request_info& info) {
  const std::string wanted = absl::StrCat(info.remote_addr, " ", info.remote_port);
  return FindDescriptor([&](int fd) { return EndOf(fd, getpeername) == wanted && IsAtPort(fd, info.server_port); });
}

int FindListener(int port) {
  return FindDescriptor([port](int fd) {
    int listens = 0;
    socklen_t length = sizeof(listens);
    return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &length) == 0 && listens != 0 && IsAtPort(fd, port);
  });
}

const char* Phrase(int code) { return mg_get_response_code_text(nullptr, code); }

}  // namespace

std::string HttpExchange::method() const { return mg_get_request_info(connection_)->request_method; }
std::string HttpExchange::path() const {
  const char* path = mg_get_request_info(connection_)->local_uri;
  return path == nullptr ? "" : path;
}
std::string HttpExchange::peer() const { return mg_get_request_info(connection_)->remote_addr; }

std::string HttpExchange::Header(const char* name) const {
  const char* value = mg_get_header(connection_, name);
  return value == nullptr ? "" : value;
}

absl::StatusOr<std::string> HttpExchange::ReadBody(int64_t max_bytes) {
  const auto too_long = [max_bytes] {
    return ReasonError(absl::StatusCode::kResourceExhausted, reason::kRequestTooLarge,
                       absl::StrCat("body: more than ", max_bytes, " bytes"), {{"limit", absl::StrCat(max_bytes)}});
  };
  const long long announced = mg_get_request_info(connection_)->content_length;  // -1: not announced
  if (announced > max_bytes) return too_long();
  std::string body;
  char buffer[16384];
  while (true) {
    const int count = mg_read(connection_, buffer, sizeof(buffer));
    if (count <= 0) break;
    body.append(buffer, static_cast<size_t>(count));
    if (static_cast<int64_t>(body.size()) > max_bytes) return too_long();
  }
  if (announced >= 0 && static_cast<long long>(body.size()) < announced) {
    return ReasonError(absl::StatusCode::kCancelled, reason::kCancelled, "the client went away");
  }
  return body;
}

bool HttpExchange::ClientIsGone() {
  if (!socket_.has_value()) socket_ = FindSocket(*mg_get_request_info(connection_));
  pollfd socket{*socket_, POLLRDHUP, 0};
  return *socket_ >= 0 && poll(&socket, 1, 0) > 0 && (socket.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

void HttpExchange::Respond(int code, const std::string& content_type, const std::string& body,
                           const std::string& headers) {
  code_ = code;
  const std::string head = absl::StrFormat(
      "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n"
      "X-Content-Type-Options: nosniff\r\n%s%s\r\n",
      code, Phrase(code), content_type, body.size(), headers_, headers);
  if (mg_write(connection_, head.data(), head.size()) > 0) mg_write(connection_, body.data(), body.size());
}

bool HttpExchange::BeginEvents() {
  code_ = 200;
  const std::string head = absl::StrCat(
      "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
      "Transfer-Encoding: chunked\r\nConnection: close\r\nX-Content-Type-Options: nosniff\r\n",
      headers_, "\r\n");
  return mg_write(connection_, head.data(), head.size()) > 0;
}

bool HttpExchange::SendEvent(const std::string& data) {
  const std::string event = absl::StrCat("data: ", data, "\n\n");
  return mg_send_chunk(connection_, event.data(), static_cast<unsigned>(event.size())) > 0;
}

void HttpExchange::EndEvents() { mg_send_chunk(connection_, "", 0); }

std::string ListeningPort(const HttpOptions& options) {
  const bool is_ipv6 = options.host.find(':') != std::string::npos;
  return absl::StrCat(is_ipv6 ? "[" : "", options.host, is_ipv6 ? "]:" : ":", options.port);
}

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const HttpOptions& options, Handler handler) {
  std::unique_ptr<HttpServer> server(new HttpServer(std::move(handler)));
  const std::string address = ListeningPort(options);
  const std::string threads = absl::StrCat(options.num_threads);
  const std::string timeout = absl::StrCat(options.timeout_ms);
  const char* settings[] = {"listening_ports",
                            address.c_str(),
                            "num_threads",
                            threads.c_str(),
                            "request_timeout_ms",
                            timeout.c_str(),
                            "enable_keep_alive",
                            "no",
                            "max_request_size",
                            kMaxHeaderBytes,
                            "tcp_nodelay",
                            "1",
                            nullptr};
  mg_init_library(0);
  mg_callbacks callbacks{};
  callbacks.log_message = Silent;
  server->context_ = mg_start(&callbacks, nullptr, settings);
  if (server->context_ == nullptr) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", options.host, ":", options.port, ": taken or not permitted"));
  }
  // Before the handler is set every path is 404; nobody knows the port yet.
  mg_set_request_handler(server->context_, "/", Handle, const_cast<Handler*>(&server->handler_));
  mg_server_port ports[1] = {};
  if (mg_get_server_ports(server->context_, 1, ports) == 1) server->port_ = ports[0].port;
  return server;
}

HttpServer::~HttpServer() {
  if (context_ != nullptr) {
    // civetweb looks whether it shall stop every 2 s, or when its listening socket has news: its end is some.
    shutdown(FindListener(port_), SHUT_RDWR);
    mg_stop(context_);
  }
  mg_exit_library();
}

}  // namespace minitron::server::compat
