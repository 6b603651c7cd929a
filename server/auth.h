// Authentication: who calls. Bearer tokens (stored as SHA-256) and certificate names, read from one JSON file that is
// re-read when it changes. AuthTable is immutable; AuthStore hands out the current one. Any thread.
//
//   {"tenants": {"alice": {"max_streams": 8, "max_queued": 16, "tokens_per_minute": 60000}},
//    "tokens": [{"id": "alice-laptop", "sha256": "<64 hex digits>", "tenant": "alice", "roles": ["user"]},
//               {"id": "ops", "client_san": "ops.example.org", "tenant": "ops", "roles": ["user", "admin"]}]}
//
// A token is a random string of at least 128 bits, so that a plain hash cannot be turned back; README says how to make
// one. Names are not secret and appear in logs; tokens never do.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace minitron::server {

enum class Role { kUser, kAdmin };

// What a tenant may use at once; 0 means no limit.
struct TenantLimits {
  int64_t max_streams = 0;        // open generation and scoring calls
  int64_t max_queued = 0;         // sequences admitted that have no token yet
  int64_t tokens_per_minute = 0;  // prompt and completion; bursts up to one minute's worth
};

struct Identity {
  std::string token_id;
  std::string tenant;
  bool user = false;
  bool admin = false;

  bool Has(Role role) const { return role == Role::kAdmin ? admin : user; }
};

class AuthTable {
 public:
  // Error: INVALID_ARGUMENT naming the entry, the key and what is wrong; values that may be secret are not repeated.
  static absl::StatusOr<std::shared_ptr<const AuthTable>> Parse(const std::string& json);

  // Takes the same time for every token, known or not. Null: unknown.
  const Identity* FindToken(const std::string& token) const;
  // By a subject alternative name of a verified client certificate. Null: unknown.
  const Identity* FindName(const std::string& name) const;
  // Without an entry: no limits.
  TenantLimits LimitsOf(const std::string& tenant) const;

 private:
  friend class AuthReader;
  using Digest = std::array<unsigned char, 32>;

  std::vector<std::pair<Digest, Identity>> tokens_;
  std::map<std::string, Identity> names_;
  std::map<std::string, TenantLimits> tenants_;
};

class AuthStore {
 public:
  // Error: NOT_FOUND or INVALID_ARGUMENT, naming the file.
  static absl::StatusOr<std::unique_ptr<AuthStore>> Open(const std::string& path);
  // A fixed table, for tests.
  explicit AuthStore(std::shared_ptr<const AuthTable> table) : table_(std::move(table)) {}

  std::shared_ptr<const AuthTable> table() const;

  // Reads the file again. Returns whether there was a new version and it is in force. On an error the old table stays.
  absl::StatusOr<bool> Reload();

 private:
  std::string path_;
  std::string content_;  // of the version read last, good or bad; Reload's thread
  absl::Status last_;
  mutable std::mutex mutex_;
  std::shared_ptr<const AuthTable> table_;
};

// The token of an "authorization" header; empty unless the scheme is Bearer.
std::string BearerToken(const std::string& header);

}  // namespace minitron::server
