// Listener: the accept loop. gRPC 1.51's own one stops for good after accept() fails a few times (a storm of
// connections that are reset, or no free descriptors); this one goes on, and bounds connections per address and in all.
// One thread. Accepted sockets are handed to gRPC, which owns them from then on.
#pragma once

#include <grpcpp/server_builder.h>
#include <netinet/in.h>

#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"

namespace minitron::server {

struct ListenerOptions {
  int max_connections = 0;              // 0: half the descriptors the process may open
  int max_connections_per_address = 0;  // 0: no limit; an IPv6 address counts by its /64
};

// A bound port that listens; closed with its destruction.
class ListeningSocket {
 public:
  // Port 0 picks a free one. Error: UNAVAILABLE (names host and port).
  static absl::StatusOr<ListeningSocket> Open(const std::string& host, int port);
  ListeningSocket(ListeningSocket&& other) noexcept : fd_(other.fd_), port_(other.port_) { other.fd_ = -1; }
  ListeningSocket& operator=(ListeningSocket&&) = delete;
  ~ListeningSocket();

  int fd() const { return fd_; }
  int port() const { return port_; }

 private:
  ListeningSocket(int fd, int port) : fd_(fd), port_(port) {}
  int fd_;
  int port_;
};

class Listener {
 public:
  using Acceptor = grpc::experimental::ExternalConnectionAcceptor;
  struct Endpoint {
    ListeningSocket socket;
    std::unique_ptr<Acceptor> acceptor;
  };
  struct Hooks {
    std::function<void(int open)> on_count;                    // connections that are open
    std::function<void(const std::string& reason)> on_refuse;  // address_limit, total_limit, descriptors, accept
  };

  // Accepts from now on; the gRPC server must have been started.
  Listener(const ListenerOptions& options, std::vector<Endpoint> endpoints, Hooks hooks);
  ~Listener();  // as StopAccepting; open connections stay

  // Closes the ports. Idempotent; the calling thread owns this object from then on.
  void StopAccepting();
  // Reads no more from any open connection, which makes gRPC close it when what it writes is written, and waits until
  // all are closed or `patience` is over. A client whose call arrives too late finds its connection gone: UNAVAILABLE,
  // which clients try again elsewhere. gRPC's own shutdown would end such a call with CANCELLED, which nobody does.
  // After StopAccepting.
  void HangUp(std::chrono::milliseconds patience);

 private:
  using Address = std::array<unsigned char, 16>;
  struct Connection {
    uint64_t inode;  // of the socket: the descriptor may be another one's by now
    Address address;
  };

  void Run();
  void AcceptAll(Endpoint& endpoint);
  bool AcceptOne(Endpoint& endpoint);
  void HandOver(Endpoint& endpoint, int fd, const Address& address);
  void RefuseForDescriptors(int listener_fd);
  // Forgets connections that gRPC has closed.
  void Sweep();
  bool Refuse(int fd, const char* reason);

  const int max_connections_;
  const int max_per_address_;
  std::vector<Endpoint> endpoints_;
  Hooks hooks_;
  int wake_fd_;
  int spare_fd_;  // given up for a moment to take, and close, a connection when there is no other descriptor left
  std::unordered_map<int, Connection> connections_;  // by descriptor
  std::map<Address, int> per_address_;
  std::thread thread_;
};

}  // namespace minitron::server
