// TLS of the listener: a certificate and key that are checked before they are used, and re-read when the files change.
// A bad new pair keeps the old one. Any thread.
//
// Wraps grpc's C interface, whose certificate callback is asked at every handshake: connections that are open keep what
// they have, new ones get the newest good pair at once.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace minitron::server {

struct TlsFiles {
  std::string certificate;  // PEM, the server's own first, then intermediates
  std::string key;          // PEM
  std::string client_ca;    // PEM; empty: clients need no certificate
};

struct TlsMaterial {
  std::string certificate;
  std::string key;
  std::string client_ca;
  std::chrono::system_clock::time_point not_after;  // of the server's certificate
};

// Reads and checks the files. Errors, naming file and problem: NOT_FOUND, INVALID_ARGUMENT (not PEM, key of another
// certificate, expired).
absl::StatusOr<TlsMaterial> LoadTlsMaterial(const TlsFiles& files, std::chrono::system_clock::time_point now);

class TlsStore {
 public:
  static absl::StatusOr<std::unique_ptr<TlsStore>> Open(const TlsFiles& files);

  // Reads the files again. Returns whether there was a new pair and it is in force. On an error the old one stays.
  absl::StatusOr<bool> Reload();

  struct Version {
    uint64_t number = 0;
    std::shared_ptr<const TlsMaterial> material;
  };
  Version current() const;
  bool asks_clients() const { return !files_.client_ca.empty(); }

 private:
  explicit TlsStore(const TlsFiles& files) : files_(files) {}

  const TlsFiles files_;
  mutable std::mutex mutex_;
  Version current_;
};

// Whether a call of `path` ("/package.Service/Method") with this "authorization" header may reach its handler.
using CallFence = std::function<grpc::Status(const std::string& path, const std::string& authorization)>;

// Credentials of a listener: TLS, or plaintext with null. With a fence, every call passes it before any handler runs.
// `tls` and the credentials must outlive the server.
std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(TlsStore* tls, CallFence fence);

}  // namespace minitron::server
