// How a client proves who it is and knows whom it talks to: TLS and a token, read from files. No state.
#pragma once

#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "clients/cpp/options.h"

namespace minitron::client {

// An encrypted channel; contents of PEM files.
struct TlsOptions {
  std::string root_certificates;  // who may sign the server's certificate; empty: the system's authorities
  std::string private_key;        // this client's own, for a server with --tls-client-ca; both or none
  std::string certificate_chain;
  std::string server_name;  // expected in the server's certificate; empty: the host of the target
};

// Of a channel; plaintext without options. The name, if there is one, goes into `arguments`.
std::shared_ptr<grpc::ChannelCredentials> MakeChannelCredentials(const std::optional<TlsOptions>& tls,
                                                                 grpc::ChannelArguments* arguments);

// --tls, --tls-ca, --tls-cert, --tls-key, --tls-server-name, --token-file.
const std::vector<OptionSpec>& SecurityOptions();

// Reads what those options name; a token becomes an entry of `metadata`. Where --tls-ca or --token-file is not given,
// `default_ca` and `default_token_file` are taken, if they name a file.
// Errors name option, file and problem; never what is in the file.
std::optional<UsageError> ReadSecurity(const Arguments& arguments, const char* default_ca,
                                       const char* default_token_file, std::optional<TlsOptions>* tls,
                                       std::vector<std::pair<std::string, std::string>>* metadata);

}  // namespace minitron::client
