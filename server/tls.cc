#include "server/tls.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/small_file.h"

namespace minitron::server {
namespace {

constexpr int64_t kMaxPemBytes = 1 << 20;

template <typename T, void (*Free)(T*)>
struct Freed {
  void operator()(T* pointer) const { Free(pointer); }
};
using X509Ptr = std::unique_ptr<X509, Freed<X509, X509_free>>;
using KeyPtr = std::unique_ptr<EVP_PKEY, Freed<EVP_PKEY, EVP_PKEY_free>>;
using BioPtr = std::unique_ptr<BIO, Freed<BIO, BIO_free_all>>;

BioPtr OpenText(const std::string& text) { return BioPtr(BIO_new_mem_buf(text.data(), static_cast<int>(text.size()))); }

absl::Status Bad(const std::string& path, const std::string& problem) {
  ERR_clear_error();  // the thread's error queue is not ours to leave filled
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", problem));
}

std::vector<X509Ptr> ReadCertificates(const std::string& pem) {
  std::vector<X509Ptr> certificates;
  const BioPtr text = OpenText(pem);
  while (X509* certificate = PEM_read_bio_X509(text.get(), nullptr, nullptr, nullptr)) {
    certificates.emplace_back(certificate);
  }
  ERR_clear_error();  // the end of the file counts as an error
  return certificates;
}

absl::StatusOr<std::chrono::system_clock::time_point> NotAfter(const std::string& path, const X509* certificate) {
  std::tm time{};
  if (ASN1_TIME_to_tm(X509_get0_notAfter(certificate), &time) != 1) return Bad(path, "has no readable end of validity");
  return std::chrono::system_clock::from_time_t(timegm(&time));
}

// One listener's view of the store: gRPC asks at every handshake and is told only what is new to it.
struct ConfigSource {
  TlsStore* store;
  std::mutex mutex;
  uint64_t number_told = 0;
};

grpc_ssl_certificate_config_reload_status FetchConfig(void* user_data, grpc_ssl_server_certificate_config** config) {
  auto* source = static_cast<ConfigSource*>(user_data);
  std::lock_guard<std::mutex> lock(source->mutex);
  const TlsStore::Version version = source->store->current();
  if (version.number == source->number_told) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
  source->number_told = version.number;
  const grpc_ssl_pem_key_cert_pair pair = {version.material->key.c_str(), version.material->certificate.c_str()};
  // gRPC 1.51 aborts on a new config without authorities, also when it asks no client for a certificate: then they are
  // never used, and our own chain will do.
  const TlsMaterial& material = *version.material;
  const std::string& authorities = material.client_ca.empty() ? material.certificate : material.client_ca;
  *config = grpc_ssl_server_certificate_config_create(authorities.c_str(), &pair, 1);
  return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
}

void AskFence(void* state, grpc_auth_context*, const grpc_metadata* metadata, size_t num_metadata,
              grpc_process_auth_metadata_done_cb done, void* user_data) {
  std::string path;
  std::string authorization;
  for (size_t i = 0; i < num_metadata; ++i) {
    const auto is = [&](const char* key) { return grpc_slice_str_cmp(metadata[i].key, key) == 0; };
    std::string* target = is(":path") ? &path : is("authorization") ? &authorization : nullptr;
    if (target == nullptr) continue;
    target->assign(reinterpret_cast<const char*>(GRPC_SLICE_START_PTR(metadata[i].value)),
                   GRPC_SLICE_LENGTH(metadata[i].value));
  }
  const grpc::Status status = (*static_cast<CallFence*>(state))(path, authorization);
  done(user_data, nullptr, 0, nullptr, 0, static_cast<grpc_status_code>(status.error_code()),
       status.ok() ? nullptr : status.error_message().c_str());
}

class ListenerCredentials final : public grpc::ServerCredentials {
 public:
  ListenerCredentials(TlsStore* tls, CallFence fence) : fence_(std::move(fence)) {
    if (tls == nullptr) {
      credentials_ = grpc_insecure_server_credentials_create();
    } else {
      source_.store = tls;
      // The names in a client's certificate are only as good as the authority that signed it: always verified.
      credentials_ = grpc_ssl_server_credentials_create_with_options(
          grpc_ssl_server_credentials_create_options_using_config_fetcher(
              tls->asks_clients() ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                                  : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE,
              FetchConfig, &source_));
    }
    if (fence_ == nullptr) return;
    grpc_server_credentials_set_auth_metadata_processor(credentials_, {AskFence, [](void*) {}, &fence_});
  }
  ~ListenerCredentials() override { grpc_server_credentials_release(credentials_); }
  ListenerCredentials(const ListenerCredentials&) = delete;
  ListenerCredentials& operator=(const ListenerCredentials&) = delete;

  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }

  CallFence fence_;
  ConfigSource source_{};
  grpc_server_credentials* credentials_ = nullptr;
};

}  // namespace

absl::StatusOr<TlsMaterial> LoadTlsMaterial(const TlsFiles& files, std::chrono::system_clock::time_point now) {
  TlsMaterial material;
  ASSIGN_OR_RETURN(material.certificate, ReadSmallFile(files.certificate, kMaxPemBytes));
  ASSIGN_OR_RETURN(material.key, ReadSmallFile(files.key, kMaxPemBytes));
  const std::vector<X509Ptr> chain = ReadCertificates(material.certificate);
  if (chain.empty()) return Bad(files.certificate, "holds no PEM certificate");
  ASSIGN_OR_RETURN(material.not_after, NotAfter(files.certificate, chain.front().get()));
  if (material.not_after <= now) return Bad(files.certificate, "the certificate has expired");
  // An empty password rather than a question on the terminal.
  char no_password[] = "";
  const KeyPtr key(PEM_read_bio_PrivateKey(OpenText(material.key).get(), nullptr, nullptr, no_password));
  if (key == nullptr) return Bad(files.key, "holds no PEM private key without a password");
  if (X509_check_private_key(chain.front().get(), key.get()) != 1) {
    return Bad(files.key, absl::StrCat("is not the key of ", files.certificate));
  }
  if (files.client_ca.empty()) return material;
  ASSIGN_OR_RETURN(material.client_ca, ReadSmallFile(files.client_ca, kMaxPemBytes));
  if (ReadCertificates(material.client_ca).empty()) return Bad(files.client_ca, "holds no PEM certificate");
  return material;
}

absl::StatusOr<std::unique_ptr<TlsStore>> TlsStore::Open(const TlsFiles& files) {
  std::unique_ptr<TlsStore> store(new TlsStore(files));
  RETURN_IF_ERROR(store->Reload().status());
  return store;
}

absl::StatusOr<bool> TlsStore::Reload() {
  ASSIGN_OR_RETURN(TlsMaterial loaded, LoadTlsMaterial(files_, std::chrono::system_clock::now()));
  std::lock_guard<std::mutex> lock(mutex_);
  const TlsMaterial* old = current_.material.get();
  if (old != nullptr && old->certificate == loaded.certificate && old->key == loaded.key &&
      old->client_ca == loaded.client_ca) {
    return false;
  }
  current_ = {current_.number + 1, std::make_shared<const TlsMaterial>(std::move(loaded))};
  return true;
}

TlsStore::Version TlsStore::current() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return current_;
}

std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(TlsStore* tls, CallFence fence) {
  return std::make_shared<ListenerCredentials>(tls, std::move(fence));
}

}  // namespace minitron::server
