// Certificates for tests, made on the spot (EC P-256): an authority, and leaves it signs.
#pragma once

#include <chrono>
#include <memory>
#include <string>

namespace minitron::testing {

struct PemPair {
  std::string certificate;
  std::string key;
};

class CertificateAuthority {
 public:
  CertificateAuthority();
  ~CertificateAuthority();
  const std::string& certificate() const { return certificate_; }

  // For the name `dns_name`, valid from an hour ago for `validity` from now (may be negative).
  PemPair Issue(const std::string& dns_name, std::chrono::seconds validity = std::chrono::hours(1));

 private:
  struct State;
  std::unique_ptr<State> state_;
  std::string certificate_;
};

}  // namespace minitron::testing
