// GrpcChannels: the connections of a gRPC driver, and what every call of it is given.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>

#include <chrono>
#include <memory>
#include <vector>

#include "clients/bench/driver.h"

namespace minitron::bench {

template <typename Service>
class GrpcChannels {
 public:
  explicit GrpcChannels(const DriverOptions& options) : options_(options) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(256 << 20);
    // Channels of equal arguments would share one connection.
    arguments.SetInt("grpc.use_local_subchannel_pool", 1);
    const auto credentials = client::MakeChannelCredentials(options.tls, &arguments);
    for (int i = 0; i < options.connections; ++i) {
      stubs_.push_back(Service::NewStub(grpc::CreateCustomChannel(options.target, credentials, arguments)));
    }
  }

  typename Service::Stub* stub(uint64_t index) { return stubs_[index % stubs_.size()].get(); }

  void Prepare(grpc::ClientContext* context) const {
    if (options_.timeout_s > 0) {
      context->set_deadline(std::chrono::system_clock::now() +
                            std::chrono::microseconds(static_cast<int64_t>(options_.timeout_s * 1e6)));
    }
    for (const auto& [key, value] : options_.metadata) context->AddMetadata(key, value);
  }

  const DriverOptions& options() const { return options_; }

 private:
  DriverOptions options_;
  std::vector<std::unique_ptr<typename Service::Stub>> stubs_;
};

}  // namespace minitron::bench
