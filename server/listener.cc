#include "server/listener.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/log.h"

namespace minitron::server {
namespace {

constexpr int kBacklog = 1024;
// How often gone connections are looked for. Each costs one fstat, so 5000 cost about 2 ms per look.
constexpr int kSweepMs = 500;
constexpr std::chrono::milliseconds kHangUpPoll{1};
// Connections taken from one port before the others get their turn.
constexpr int kBurst = 64;

absl::Status CannotListen(const std::string& host, int port) {
  return absl::UnavailableError(absl::StrCat("cannot listen on ", host, ":", port, ": taken or not permitted"));
}

int DefaultMaxConnections() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return 512;
  return static_cast<int>(std::clamp<rlim_t>(limit.rlim_cur / 2, 16, 1 << 20));
}

uint64_t InodeOf(int fd) {
  struct stat info {};
  return fstat(fd, &info) == 0 && S_ISSOCK(info.st_mode) ? info.st_ino : 0;
}

// What a limit per address counts by: an IPv4 address (also one mapped into IPv6), or an IPv6 network of one site.
std::array<unsigned char, 16> KeyOf(const sockaddr_storage& peer) {
  std::array<unsigned char, 16> key{};
  if (peer.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(peer);
    key[10] = key[11] = 0xFF;
    std::memcpy(key.data() + 12, &v4.sin_addr, 4);
  } else if (peer.ss_family == AF_INET6) {
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(peer);
    std::memcpy(key.data(), &v6.sin6_addr, IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr) ? 16 : 8);
  }
  return key;
}

}  // namespace

absl::StatusOr<ListeningSocket> ListeningSocket::Open(const std::string& host, int port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), absl::StrCat(port).c_str(), &hints, &found); error != 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", host, ": ", gai_strerror(error)));
  }
  const int fd = socket(found->ai_family, found->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, found->ai_protocol);
  const int on = 1;
  const int off = 0;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));  // old closed connections do not keep a port
  if (found->ai_family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
  const bool bound = fd >= 0 && bind(fd, found->ai_addr, found->ai_addrlen) == 0 && listen(fd, kBacklog) == 0;
  freeaddrinfo(found);
  sockaddr_storage name{};
  socklen_t name_bytes = sizeof(name);
  if (!bound || getsockname(fd, reinterpret_cast<sockaddr*>(&name), &name_bytes) != 0) {
    if (fd >= 0) close(fd);
    return CannotListen(host, port);
  }
  // The port is at the same place in both families.
  return ListeningSocket(fd, ntohs(reinterpret_cast<const sockaddr_in&>(name).sin_port));
}

ListeningSocket::~ListeningSocket() {
  if (fd_ >= 0) close(fd_);
}

Listener::Listener(const ListenerOptions& options, std::vector<Endpoint> endpoints, Hooks hooks)
    : max_connections_(options.max_connections > 0 ? options.max_connections : DefaultMaxConnections()),
      max_per_address_(options.max_connections_per_address),
      endpoints_(std::move(endpoints)),
      hooks_(std::move(hooks)),
      wake_fd_(eventfd(0, EFD_CLOEXEC)),
      spare_fd_(open("/dev/null", O_RDONLY | O_CLOEXEC)) {
  CHECK(wake_fd_ >= 0);
  thread_ = std::thread([this] { Run(); });
}

Listener::~Listener() {
  StopAccepting();
  close(wake_fd_);
  if (spare_fd_ >= 0) close(spare_fd_);
}

void Listener::StopAccepting() {
  if (!thread_.joinable()) return;
  const uint64_t one = 1;
  CHECK(write(wake_fd_, &one, sizeof(one)) == sizeof(one));
  thread_.join();
  endpoints_.clear();
}

void Listener::HangUp(std::chrono::milliseconds patience) {
  const auto deadline = std::chrono::steady_clock::now() + patience;
  // A descriptor that gRPC has closed may be another one's by now: sweep before each use. Again and again, because
  // gRPC sees the end only when it reads and finds nothing, which a busy client may prevent for a while.
  for (Sweep(); !connections_.empty() && std::chrono::steady_clock::now() < deadline; Sweep()) {
    for (const auto& [fd, connection] : connections_) shutdown(fd, SHUT_RD);
    poll(nullptr, 0, static_cast<int>(kHangUpPoll.count()));
  }
}

void Listener::Run() {
  std::vector<pollfd> polled;
  for (const Endpoint& endpoint : endpoints_) polled.push_back({endpoint.socket.fd(), POLLIN, 0});
  polled.push_back({wake_fd_, POLLIN, 0});
  auto next_sweep = std::chrono::steady_clock::now();
  while (true) {
    poll(polled.data(), polled.size(), kSweepMs);
    if (polled.back().revents != 0) return;
    for (size_t i = 0; i < endpoints_.size(); ++i) {
      if (polled[i].revents != 0) AcceptAll(endpoints_[i]);
    }
    if (std::chrono::steady_clock::now() < next_sweep) continue;
    Sweep();
    next_sweep = std::chrono::steady_clock::now() + std::chrono::milliseconds(kSweepMs);
  }
}

void Listener::AcceptAll(Endpoint& endpoint) {
  for (int i = 0; i < kBurst && AcceptOne(endpoint); ++i) {
  }
}

bool Listener::AcceptOne(Endpoint& endpoint) {
  sockaddr_storage peer{};
  socklen_t peer_bytes = sizeof(peer);
  const int fd = accept4(endpoint.socket.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd < 0) {
    if (errno == EAGAIN || errno == EWOULDBLOCK) return false;
    if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
      RefuseForDescriptors(endpoint.socket.fd());
      return false;  // poll says when to try again
    }
    // The peer went away before it was accepted, or the network failed it: the next one is unharmed.
    if (errno != EINTR && errno != ECONNABORTED) hooks_.on_refuse("accept");
    return true;
  }
  // Gone again already: gRPC would close it too, and write a line about each.
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &peer_bytes) != 0) {
    close(fd);
    return true;
  }
  const Address address = KeyOf(peer);
  const auto is_full = [&] { return static_cast<int>(connections_.size()) >= max_connections_; };
  const auto has_too_many = [&] {
    if (max_per_address_ <= 0) return false;
    const auto found = per_address_.find(address);
    return found != per_address_.end() && found->second >= max_per_address_;
  };
  if (is_full() || has_too_many()) Sweep();  // some may be gone
  if (is_full()) return Refuse(fd, "total_limit");
  if (has_too_many()) return Refuse(fd, "address_limit");
  HandOver(endpoint, fd, address);
  return true;
}

void Listener::HandOver(Endpoint& endpoint, int fd, const Address& address) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  // A descriptor that comes again was closed since the last sweep.
  if (const auto old = connections_.find(fd); old != connections_.end()) {
    if (--per_address_[old->second.address] == 0) per_address_.erase(old->second.address);
    connections_.erase(old);
  }
  connections_[fd] = {InodeOf(fd), address};
  ++per_address_[address];
  Acceptor::NewConnectionParameters connection;
  connection.listener_fd = endpoint.socket.fd();
  connection.fd = fd;
  endpoint.acceptor->HandleNewConnection(&connection);
}

bool Listener::Refuse(int fd, const char* reason) {
  // Reset rather than an orderly end, which would keep the port busy for a minute per refused connection.
  const linger reset = {1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
  hooks_.on_refuse(reason);
  close(fd);
  return true;
}

void Listener::RefuseForDescriptors(int listener_fd) {
  hooks_.on_refuse("descriptors");
  if (spare_fd_ >= 0) close(spare_fd_);
  const int fd = accept4(listener_fd, nullptr, nullptr, SOCK_CLOEXEC);
  if (fd >= 0) close(fd);
  spare_fd_ = open("/dev/null", O_RDONLY | O_CLOEXEC);
}

void Listener::Sweep() {
  for (auto it = connections_.begin(); it != connections_.end();) {
    if (InodeOf(it->first) == it->second.inode) {
      ++it;
      continue;
    }
    if (--per_address_[it->second.address] == 0) per_address_.erase(it->second.address);
    it = connections_.erase(it);
  }
  hooks_.on_count(static_cast<int>(connections_.size()));
}

}  // namespace minitron::server
