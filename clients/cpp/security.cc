#include "clients/cpp/security.h"

#include <openssl/pem.h>
#include <openssl/x509.h>

#include <algorithm>
#include <cstdio>

namespace minitron::client {
namespace {

using Result = std::optional<UsageError>;

constexpr size_t kMaxFileBytes = 1 << 20;  // the authorities of a whole distribution are 200 kB
constexpr char kTls[] = "tls";
constexpr char kCa[] = "tls-ca";
constexpr char kCert[] = "tls-cert";
constexpr char kKey[] = "tls-key";
constexpr char kServerName[] = "tls-server-name";
constexpr char kTokenFile[] = "token-file";

// Pipes are read too: --token-file <(command).
Result ReadFile(const std::string& option, const std::string& path, std::string* content) {
  const std::string where = "--" + option + " \"" + path + "\": ";
  std::FILE* const file = std::fopen(path.c_str(), "rb");
  if (file == nullptr) return UsageError{where + "cannot be opened"};
  content->resize(kMaxFileBytes + 1);
  const size_t size = std::fread(content->data(), 1, content->size(), file);
  const bool failed = std::ferror(file) != 0;
  std::fclose(file);
  content->resize(size);
  if (failed) return UsageError{where + "cannot be read"};
  if (size > kMaxFileBytes) return UsageError{where + "longer than 1 MiB"};
  return std::nullopt;
}

template <typename T, void (*Free)(T*)>
struct Freed {
  void operator()(T* pointer) const { Free(pointer); }
};
using CertificatePtr = std::unique_ptr<X509, Freed<X509, X509_free>>;
using KeyPtr = std::unique_ptr<EVP_PKEY, Freed<EVP_PKEY, EVP_PKEY_free>>;
using BioPtr = std::unique_ptr<BIO, Freed<BIO, BIO_free_all>>;

BioPtr OpenText(const std::string& text) { return BioPtr(BIO_new_mem_buf(text.data(), static_cast<int>(text.size()))); }

CertificatePtr FirstCertificate(const std::string& pem) {
  return CertificatePtr(PEM_read_bio_X509(OpenText(pem).get(), nullptr, nullptr, nullptr));
}

// Looked at here, because gRPC would only say that a channel cannot be made.
Result ReadCertificates(const char* option, const std::string& path, std::string* pem) {
  if (auto error = ReadFile(option, path, pem)) return error;
  if (FirstCertificate(*pem) != nullptr) return std::nullopt;
  return UsageError{std::string("--") + option + " \"" + path + "\": holds no PEM certificate"};
}

Result ReadKey(const std::string& path, const std::string& certificates, std::string* pem) {
  if (auto error = ReadFile(kKey, path, pem)) return error;
  char no_password[] = "";  // rather than a question on the terminal
  const KeyPtr key(PEM_read_bio_PrivateKey(OpenText(*pem).get(), nullptr, nullptr, no_password));
  const std::string where = std::string("--") + kKey + " \"" + path + "\": ";
  if (key == nullptr) return UsageError{where + "holds no PEM private key without a password"};
  if (X509_check_private_key(FirstCertificate(certificates).get(), key.get()) == 1) return std::nullopt;
  return UsageError{where + "is not the key of --tls-cert"};
}

Result ReadToken(const std::string& path, std::string* token) {
  if (auto error = ReadFile(kTokenFile, path, token)) return error;
  while (!token->empty() && (token->back() == '\n' || token->back() == '\r')) token->pop_back();
  // gRPC aborts on headers it cannot send.
  const bool sendable = std::all_of(token->begin(), token->end(), [](char c) { return c > 32 && c < 127; });
  if (sendable && !token->empty()) return std::nullopt;
  return UsageError{
      std::string("--") + kTokenFile + " \"" + path +
      "\": " + (token->empty() ? "is empty" : "holds more than one token: a space, a line or a control character")};
}

}  // namespace

std::shared_ptr<grpc::ChannelCredentials> MakeChannelCredentials(const std::optional<TlsOptions>& tls,
                                                                 grpc::ChannelArguments* arguments) {
  if (!tls.has_value()) return grpc::InsecureChannelCredentials();
  if (!tls->server_name.empty()) arguments->SetSslTargetNameOverride(tls->server_name);
  grpc::SslCredentialsOptions options;
  options.pem_root_certs = tls->root_certificates;
  options.pem_private_key = tls->private_key;
  options.pem_cert_chain = tls->certificate_chain;
  return grpc::SslCredentials(options);
}

const std::vector<OptionSpec>& SecurityOptions() {
  static const std::vector<OptionSpec> kOptions = {
      {kTls, "", "encrypt, and trust the system's authorities"},
      {kCa, "FILE", "encrypt, and trust these authorities (PEM)"},
      {kCert, "FILE", "this client's certificate chain (PEM), for a server that asks for one"},
      {kKey, "FILE", "private key of --tls-cert (PEM)"},
      {kServerName, "NAME", "the name in the server's certificate, when it is not the host of --server"},
      {kTokenFile, "FILE", "send the token in this file"},
  };
  return kOptions;
}

Result ReadSecurity(const Arguments& arguments, const char* default_ca, const char* default_token_file,
                    std::optional<TlsOptions>* tls, std::vector<std::pair<std::string, std::string>>* metadata) {
  const auto path_of = [&](const char* option, const char* fallback) {
    return arguments.Get(option, fallback == nullptr ? "" : fallback);
  };
  const std::string ca = path_of(kCa, default_ca);
  if (arguments.Has(kCert) != arguments.Has(kKey)) return UsageError{"--tls-cert and --tls-key: one without the other"};
  if (arguments.Has(kTls) || arguments.Has(kCert) || arguments.Has(kServerName) || !ca.empty()) {
    TlsOptions& read = tls->emplace();
    if (!ca.empty()) {
      if (auto error = ReadCertificates(kCa, ca, &read.root_certificates)) return error;
    }
    if (arguments.Has(kCert)) {
      if (auto error = ReadCertificates(kCert, arguments.Get(kCert), &read.certificate_chain)) return error;
      if (auto error = ReadKey(arguments.Get(kKey), read.certificate_chain, &read.private_key)) return error;
    }
    read.server_name = arguments.Get(kServerName);
  }
  if (const std::string path = path_of(kTokenFile, default_token_file); !path.empty()) {
    std::string token;
    if (auto error = ReadToken(path, &token)) return error;
    metadata->emplace_back("authorization", "Bearer " + token);
  }
  return std::nullopt;
}

}  // namespace minitron::client
