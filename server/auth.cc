#include "server/auth.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>
#include <set>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/json.h"
#include "server/small_file.h"

namespace minitron::server {
namespace {

using engine::JsonValue;

constexpr int64_t kMaxFileBytes = 1 << 20;
constexpr size_t kMaxTokens = 4096;  // each is compared at every call: 4096 take some 100 us
constexpr size_t kMaxNameBytes = 64;
constexpr int64_t kMaxLimit = int64_t{1} << 40;

absl::Status Bad(const std::string& where, const std::string& problem) {
  return absl::InvalidArgumentError(absl::StrCat(where, ": ", problem));
}

bool IsName(const std::string& text, size_t max_bytes) {
  return !text.empty() && text.size() <= max_bytes &&
         std::all_of(text.begin(), text.end(), [](char c) { return c > 32 && c < 127; });
}

absl::StatusOr<std::string> ReadName(const std::string& where, const JsonValue& value, size_t max_bytes) {
  if (!value.is(JsonValue::Type::kString) || !IsName(value.string, max_bytes)) {
    return Bad(where, absl::StrCat("not a string of 1 to ", max_bytes, " printable characters without spaces"));
  }
  return value.string;
}

}  // namespace

// Reads one file into a table.
class AuthReader {
 public:
  absl::Status Read(const JsonValue& root) {
    if (!root.is(JsonValue::Type::kObject)) return Bad("file", "not a JSON object");
    for (size_t i = 0; i < root.keys.size(); ++i) {
      if (root.keys[i] == "tenants") {
        RETURN_IF_ERROR(ReadTenants(root.items[i]));
      } else if (root.keys[i] != "tokens") {
        return Bad(root.keys[i], "unknown key; known are tenants, tokens");
      }
    }
    const JsonValue* tokens = root.Find("tokens");
    if (tokens == nullptr || !tokens->is(JsonValue::Type::kArray) || tokens->items.empty()) {
      return Bad("tokens", "not a list with at least one entry");
    }
    if (tokens->items.size() > kMaxTokens) {
      return Bad("tokens", absl::StrCat(tokens->items.size(), " entries, at most ", kMaxTokens));
    }
    for (size_t i = 0; i < tokens->items.size(); ++i) {
      RETURN_IF_ERROR(ReadToken(absl::StrCat("tokens[", i, "]"), tokens->items[i]));
    }
    return absl::OkStatus();
  }

  std::shared_ptr<AuthTable> table = std::make_shared<AuthTable>();

 private:
  absl::Status ReadTenants(const JsonValue& tenants) {
    if (!tenants.is(JsonValue::Type::kObject)) return Bad("tenants", "not an object");
    for (size_t i = 0; i < tenants.keys.size(); ++i) {
      const std::string where = absl::StrCat("tenants.", tenants.keys[i].substr(0, kMaxNameBytes));
      if (!IsName(tenants.keys[i], kMaxNameBytes)) return Bad(where, "not a name of 1 to 64 printable characters");
      ASSIGN_OR_RETURN(table->tenants_[tenants.keys[i]], ReadLimits(where, tenants.items[i]));
    }
    return absl::OkStatus();
  }

  static absl::StatusOr<TenantLimits> ReadLimits(const std::string& where, const JsonValue& value) {
    if (!value.is(JsonValue::Type::kObject)) return Bad(where, "not an object");
    TenantLimits limits;
    for (size_t i = 0; i < value.keys.size(); ++i) {
      const std::string& key = value.keys[i];
      int64_t* target = key == "max_streams"         ? &limits.max_streams
                        : key == "max_queued"        ? &limits.max_queued
                        : key == "tokens_per_minute" ? &limits.tokens_per_minute
                                                     : nullptr;
      const std::string what = absl::StrCat(where, ".", key);
      if (target == nullptr) return Bad(what, "unknown key; known are max_streams, max_queued, tokens_per_minute");
      const JsonValue& number = value.items[i];
      if (!number.is(JsonValue::Type::kInt) || number.integer < 1 || number.integer > kMaxLimit) {
        return Bad(what, absl::StrCat(number.Describe(), " is not an integer in [1, ", kMaxLimit, "]"));
      }
      *target = number.integer;
    }
    return limits;
  }

  absl::Status ReadToken(const std::string& where, const JsonValue& entry) {
    if (!entry.is(JsonValue::Type::kObject)) return Bad(where, "not an object");
    Identity identity;
    AuthTable::Digest digest{};
    bool has_digest = false;
    std::string san;
    for (size_t i = 0; i < entry.keys.size(); ++i) {
      const std::string& key = entry.keys[i];
      const std::string what = absl::StrCat(where, ".", key);
      const JsonValue& value = entry.items[i];
      if (key == "id") {
        ASSIGN_OR_RETURN(identity.token_id, ReadName(what, value, kMaxNameBytes));
      } else if (key == "tenant") {
        ASSIGN_OR_RETURN(identity.tenant, ReadName(what, value, kMaxNameBytes));
      } else if (key == "client_san") {
        ASSIGN_OR_RETURN(san, ReadName(what, value, 256));
      } else if (key == "sha256") {
        RETURN_IF_ERROR(ReadDigest(what, value, digest));
        has_digest = true;
      } else if (key == "roles") {
        RETURN_IF_ERROR(ReadRoles(what, value, identity));
      } else {
        return Bad(what, "unknown key; known are id, sha256, client_san, tenant, roles");
      }
    }
    if (identity.token_id.empty()) return Bad(where, "has no id");
    if (identity.tenant.empty()) return Bad(where, "has no tenant");
    if (!identity.user && !identity.admin) return Bad(where, "has no roles");
    if (has_digest != san.empty()) return Bad(where, "needs either sha256 or client_san");
    if (!ids_.insert(identity.token_id).second) return Bad(where, "its id appears twice");
    if (!san.empty()) {
      if (!table->names_.emplace(san, identity).second) return Bad(where, "its client_san appears twice");
      return absl::OkStatus();
    }
    if (!digests_.insert(digest).second) return Bad(where, "its sha256 appears twice");
    table->tokens_.emplace_back(digest, identity);
    return absl::OkStatus();
  }

  static absl::Status ReadDigest(const std::string& what, const JsonValue& value, AuthTable::Digest& digest) {
    const auto is_hex = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
    if (!value.is(JsonValue::Type::kString) || value.string.size() != 64 ||
        !std::all_of(value.string.begin(), value.string.end(), is_hex)) {
      return Bad(what, "not 64 lower-case hex digits");  // not repeated: somebody may have put the token itself here
    }
    const std::string bytes = absl::HexStringToBytes(value.string);
    std::copy(bytes.begin(), bytes.end(), digest.begin());
    return absl::OkStatus();
  }

  static absl::Status ReadRoles(const std::string& what, const JsonValue& value, Identity& identity) {
    if (!value.is(JsonValue::Type::kArray)) return Bad(what, "not a list of user, admin");
    for (const JsonValue& role : value.items) {
      if (role.string == "user") {
        identity.user = true;
      } else if (role.string == "admin") {
        identity.admin = true;
      } else {
        return Bad(what, absl::StrCat(role.Describe(), " is not one of user, admin"));
      }
    }
    return absl::OkStatus();
  }

  std::set<std::string> ids_;
  std::set<AuthTable::Digest> digests_;
};

absl::StatusOr<std::shared_ptr<const AuthTable>> AuthTable::Parse(const std::string& json) {
  JsonValue root;
  std::string error;
  engine::JsonLimits limits;
  limits.max_bytes = kMaxFileBytes;
  if (!engine::ParseJson(json.data(), static_cast<int64_t>(json.size()), limits, &root, &error)) {
    return Bad("file", error);
  }
  AuthReader reader;
  RETURN_IF_ERROR(reader.Read(root));
  return std::shared_ptr<const AuthTable>(std::move(reader.table));
}

const Identity* AuthTable::FindToken(const std::string& token) const {
  Digest digest{};
  SHA256(reinterpret_cast<const unsigned char*>(token.data()), token.size(), digest.data());
  const Identity* found = nullptr;
  for (const auto& [known, identity] : tokens_) {  // all of them: how long it takes must not tell which one it was
    if (CRYPTO_memcmp(known.data(), digest.data(), digest.size()) == 0) found = &identity;
  }
  return found;
}

const Identity* AuthTable::FindName(const std::string& name) const {
  const auto found = names_.find(name);
  return found == names_.end() ? nullptr : &found->second;
}

TenantLimits AuthTable::LimitsOf(const std::string& tenant) const {
  const auto found = tenants_.find(tenant);
  return found == tenants_.end() ? TenantLimits{} : found->second;
}

absl::StatusOr<std::unique_ptr<AuthStore>> AuthStore::Open(const std::string& path) {
  auto store = std::make_unique<AuthStore>(nullptr);
  store->path_ = path;
  RETURN_IF_ERROR(store->Reload().status());
  return store;
}

std::shared_ptr<const AuthTable> AuthStore::table() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return table_;
}

absl::StatusOr<bool> AuthStore::Reload() {
  if (path_.empty()) return false;
  ASSIGN_OR_RETURN(std::string content, ReadSmallFile(path_, kMaxFileBytes));
  if (content == content_) {
    RETURN_IF_ERROR(last_);
    return false;
  }
  content_ = std::move(content);
  auto parsed = AuthTable::Parse(content_);
  last_ = parsed.ok() ? absl::OkStatus() : Bad(path_, std::string(parsed.status().message()));
  RETURN_IF_ERROR(last_);
  std::lock_guard<std::mutex> lock(mutex_);
  table_ = *std::move(parsed);
  return true;
}

std::string BearerToken(const std::string& header) {
  constexpr size_t kSchemeBytes = 7;
  if (header.size() <= kSchemeBytes || !absl::EqualsIgnoreCase(header.substr(0, kSchemeBytes), "bearer ")) return "";
  return header.substr(kSchemeBytes);
}

}  // namespace minitron::server
