// Client: typed calls to a minitron server over one gRPC channel.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>

#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "clients/cpp/error.h"
#include "clients/cpp/security.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "minitron/v1/admin.grpc.pb.h"
#include "minitron/v1/generation.grpc.pb.h"
#include "minitron/v1/model.grpc.pb.h"

namespace minitron::client {

struct ClientOptions {
  std::string target = "localhost:50051";                     // any gRPC target
  std::optional<std::chrono::milliseconds> timeout;           // of each call; unset: none
  std::vector<std::pair<std::string, std::string>> metadata;  // sent with each call, e.g. x-minitron-tenant
  std::optional<TlsOptions> tls = std::nullopt;               // unset: the connection is not encrypted
};

// Cancels calls from another thread. Thread-safe; must outlive the calls it was given to.
class Cancellation {
 public:
  // Ends the running call with CANCELLED; a call that starts later ends at once.
  void Cancel();
  bool cancelled() const;
  // As new, for the next call.
  void Reset();

 private:
  friend class Client;
  void Attach(grpc::ClientContext* context);  // null: detach

  mutable std::mutex mutex_;
  bool cancelled_ = false;
  grpc::ClientContext* context_ = nullptr;  // owned by the call, while it runs
};

// What a call ends with: nothing when it succeeded.
using Outcome = std::optional<Error>;

// Thread-safe: calls may run at the same time. Every call blocks until it has ended.
class Client {
 public:
  // Connects lazily, at the first call.
  explicit Client(const ClientOptions& options);
  Client(std::shared_ptr<grpc::Channel> channel, ClientOptions options);

  // Called for each event, on the calling thread. False cancels the call.
  using EventCallback = std::function<bool(const v1::GenerateStreamResponse&)>;

  // Streams a completion. The text is complete only when the outcome is empty.
  [[nodiscard]] Outcome GenerateStream(const v1::GenerateStreamRequest& request, const EventCallback& on_event,
                                       Cancellation* cancellation = nullptr);
  [[nodiscard]] Outcome Generate(const v1::GenerateRequest& request, v1::GenerateResponse* response,
                                 Cancellation* cancellation = nullptr);
  [[nodiscard]] Outcome Score(const v1::ScoreRequest& request, v1::ScoreResponse* response,
                              Cancellation* cancellation = nullptr);
  [[nodiscard]] Outcome Tokenize(const v1::TokenizeRequest& request, v1::TokenizeResponse* response);
  [[nodiscard]] Outcome Detokenize(const v1::DetokenizeRequest& request, v1::DetokenizeResponse* response);
  [[nodiscard]] Outcome ListModels(v1::ListModelsResponse* response);
  // An empty name means the served model.
  [[nodiscard]] Outcome GetModel(const std::string& name, v1::Model* model);
  [[nodiscard]] Outcome GetServerInfo(v1::GetServerInfoResponse* response);
  [[nodiscard]] Outcome GetLoad(v1::GetLoadResponse* response);
  [[nodiscard]] Outcome CancelRequests(const std::vector<std::string>& request_ids,
                                       v1::CancelRequestsResponse* response);
  [[nodiscard]] Outcome Drain();
  // The health of one service, or of the whole server when `service` is empty.
  [[nodiscard]] Outcome CheckHealth(const std::string& service, grpc::health::v1::HealthCheckResponse* response);

 private:
  template <typename Stub, typename Request, typename Response>
  Outcome Call(Stub* stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
               const Request& request, Response* response, Cancellation* cancellation = nullptr);
  void Prepare(grpc::ClientContext* context) const;

  ClientOptions options_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::GenerationService::Stub> generation_;
  std::unique_ptr<v1::ModelService::Stub> models_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
  std::unique_ptr<grpc::health::v1::Health::Stub> health_;
};

}  // namespace minitron::client
