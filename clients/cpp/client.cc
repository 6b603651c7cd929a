#include "clients/cpp/client.h"

#include <grpcpp/create_channel.h>

namespace minitron::client {
namespace {

// Log-probabilities of a long prompt do not fit gRPC's default of 4 MiB.
constexpr int kMaxResponseBytes = 256 << 20;

std::shared_ptr<grpc::Channel> Connect(const ClientOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxResponseBytes);
  const auto credentials = MakeChannelCredentials(options.tls, &arguments);
  return grpc::CreateCustomChannel(options.target, credentials, arguments);
}

Outcome ToOutcome(const grpc::Status& status) {
  if (status.ok()) return std::nullopt;
  return DecodeError(status);
}

}  // namespace

void Cancellation::Cancel() {
  const std::lock_guard<std::mutex> lock(mutex_);
  cancelled_ = true;
  if (context_ != nullptr) context_->TryCancel();
}

bool Cancellation::cancelled() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return cancelled_;
}

void Cancellation::Reset() {
  const std::lock_guard<std::mutex> lock(mutex_);
  cancelled_ = false;
}

void Cancellation::Attach(grpc::ClientContext* context) {
  const std::lock_guard<std::mutex> lock(mutex_);
  context_ = context;
  if (cancelled_ && context_ != nullptr) context_->TryCancel();
}

Client::Client(const ClientOptions& options) : Client(Connect(options), options) {}

Client::Client(std::shared_ptr<grpc::Channel> channel, ClientOptions options)
    : options_(std::move(options)),
      channel_(std::move(channel)),
      generation_(v1::GenerationService::NewStub(channel_)),
      models_(v1::ModelService::NewStub(channel_)),
      admin_(v1::AdminService::NewStub(channel_)),
      health_(grpc::health::v1::Health::NewStub(channel_)) {}

void Client::Prepare(grpc::ClientContext* context) const {
  if (options_.timeout.has_value()) context->set_deadline(std::chrono::system_clock::now() + *options_.timeout);
  for (const auto& [key, value] : options_.metadata) context->AddMetadata(key, value);
}

template <typename Stub, typename Request, typename Response>
Outcome Client::Call(Stub* stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                     const Request& request, Response* response, Cancellation* cancellation) {
  grpc::ClientContext context;
  Prepare(&context);
  if (cancellation != nullptr) cancellation->Attach(&context);
  const grpc::Status status = (stub->*method)(&context, request, response);
  if (cancellation != nullptr) cancellation->Attach(nullptr);
  return ToOutcome(status);
}

Outcome Client::GenerateStream(const v1::GenerateStreamRequest& request, const EventCallback& on_event,
                               Cancellation* cancellation) {
  grpc::ClientContext context;
  Prepare(&context);
  if (cancellation != nullptr) cancellation->Attach(&context);
  const auto reader = generation_->GenerateStream(&context, request);
  v1::GenerateStreamResponse event;
  bool wanted = true;
  // After a refusal the stream is still read to its end: Finish needs that.
  while (reader->Read(&event)) {
    if (!wanted || on_event(event)) continue;
    wanted = false;
    context.TryCancel();
  }
  const grpc::Status status = reader->Finish();
  if (cancellation != nullptr) cancellation->Attach(nullptr);
  return ToOutcome(status);
}

Outcome Client::Generate(const v1::GenerateRequest& request, v1::GenerateResponse* response,
                         Cancellation* cancellation) {
  return Call(generation_.get(), &v1::GenerationService::Stub::Generate, request, response, cancellation);
}

Outcome Client::Score(const v1::ScoreRequest& request, v1::ScoreResponse* response, Cancellation* cancellation) {
  return Call(generation_.get(), &v1::GenerationService::Stub::Score, request, response, cancellation);
}

Outcome Client::Tokenize(const v1::TokenizeRequest& request, v1::TokenizeResponse* response) {
  return Call(generation_.get(), &v1::GenerationService::Stub::Tokenize, request, response);
}

Outcome Client::Detokenize(const v1::DetokenizeRequest& request, v1::DetokenizeResponse* response) {
  return Call(generation_.get(), &v1::GenerationService::Stub::Detokenize, request, response);
}

Outcome Client::ListModels(v1::ListModelsResponse* response) {
  return Call(models_.get(), &v1::ModelService::Stub::ListModels, v1::ListModelsRequest(), response);
}

Outcome Client::GetModel(const std::string& name, v1::Model* model) {
  v1::GetModelRequest request;
  request.set_name(name);
  v1::GetModelResponse response;
  Outcome outcome = Call(models_.get(), &v1::ModelService::Stub::GetModel, request, &response);
  if (!outcome.has_value()) *model = std::move(*response.mutable_model());
  return outcome;
}

Outcome Client::GetServerInfo(v1::GetServerInfoResponse* response) {
  return Call(admin_.get(), &v1::AdminService::Stub::GetServerInfo, v1::GetServerInfoRequest(), response);
}

Outcome Client::GetLoad(v1::GetLoadResponse* response) {
  return Call(admin_.get(), &v1::AdminService::Stub::GetLoad, v1::GetLoadRequest(), response);
}

Outcome Client::CancelRequests(const std::vector<std::string>& request_ids, v1::CancelRequestsResponse* response) {
  v1::CancelRequestsRequest request;
  request.mutable_request_ids()->Add(request_ids.begin(), request_ids.end());
  return Call(admin_.get(), &v1::AdminService::Stub::CancelRequests, request, response);
}

Outcome Client::Drain() {
  v1::DrainResponse response;
  return Call(admin_.get(), &v1::AdminService::Stub::Drain, v1::DrainRequest(), &response);
}

Outcome Client::CheckHealth(const std::string& service, grpc::health::v1::HealthCheckResponse* response) {
  grpc::health::v1::HealthCheckRequest request;
  request.set_service(service);
  return Call(health_.get(), &grpc::health::v1::Health::Stub::Check, request, response);
}

}  // namespace minitron::client
