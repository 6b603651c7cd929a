// An in-process server on a free port of 127.0.0.1 that answers every call from a script.
#pragma once

#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "minitron/v1/admin.grpc.pb.h"
#include "minitron/v1/generation.grpc.pb.h"
#include "minitron/v1/model.grpc.pb.h"

namespace minitron::client {

// A status with all four details, as the real server sends it.
inline grpc::Status DetailedStatus() {
  google::rpc::Status details;
  details.set_code(static_cast<int>(grpc::StatusCode::INVALID_ARGUMENT));
  details.set_message("temperature 3.5 outside [0, 2]");
  google::rpc::ErrorInfo info;
  info.set_reason("OUT_OF_RANGE");
  info.set_domain("minitron");
  (*info.mutable_metadata())["limit"] = "2";
  details.add_details()->PackFrom(info);
  google::rpc::BadRequest bad_request;
  auto* violation = bad_request.add_field_violations();
  violation->set_field("task.sampling.temperature");
  violation->set_description("3.5 outside [0, 2]");
  details.add_details()->PackFrom(bad_request);
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(1);
  retry.mutable_retry_delay()->set_nanos(500'000'000);
  details.add_details()->PackFrom(retry);
  google::rpc::QuotaFailure quota;
  auto* exceeded = quota.add_violations();
  exceeded->set_subject("tenant:blue");
  exceeded->set_description("9 streams, limit 8");
  details.add_details()->PackFrom(quota);
  return {grpc::StatusCode::INVALID_ARGUMENT, details.message(), details.SerializeAsString()};
}

// "hello" streams two deltas; "fail" is refused with details; "cut" fails in mid-stream; "forever" sends one delta and
// then waits until the call is cancelled.
class FakeGeneration final : public v1::GenerationService::Service {
 public:
  grpc::Status GenerateStream(grpc::ServerContext* context, const v1::GenerateStreamRequest* request,
                              grpc::ServerWriter<v1::GenerateStreamResponse>* writer) override {
    const std::string& text = request->task().text();
    if (text == "fail") return DetailedStatus();
    v1::GenerateStreamResponse event;
    event.mutable_started()->set_prompt_token_count(9);
    writer->Write(event);
    event.mutable_delta()->set_text("Hel");
    event.mutable_delta()->add_token_ids(7);
    writer->Write(event);
    if (text == "cut") return {grpc::StatusCode::INTERNAL, "engine failure"};
    if (text == "forever") {
      while (!context->IsCancelled()) {
        if (!writer->Write(event)) break;  // flow control blocks a fast writer; a cancelled call ends it
      }
      const std::lock_guard<std::mutex> lock(mutex_);
      cancelled_ = true;
      changed_.notify_all();
      return grpc::Status::CANCELLED;
    }
    event.mutable_delta()->set_text("lo");
    event.mutable_delta()->set_token_ids(0, 8);
    writer->Write(event);
    event.mutable_finished()->set_reason(v1::FINISH_REASON_LENGTH);
    event.mutable_finished()->mutable_usage()->set_completion_tokens(2);
    writer->Write(event);
    return grpc::Status::OK;
  }

  grpc::Status Generate(grpc::ServerContext* context, const v1::GenerateRequest* request,
                        v1::GenerateResponse* response) override {
    const auto tenant = context->client_metadata().find("x-minitron-tenant");
    if (tenant != context->client_metadata().end()) {
      response->mutable_started()->set_model(std::string(tenant->second.begin(), tenant->second.end()));
    }
    if (request->task().text() == "forever") {
      // Ends when the deadline has passed, which gRPC reports here as a cancellation.
      while (!context->IsCancelled()) std::this_thread::yield();
      return grpc::Status::CANCELLED;
    }
    response->add_sequences()->set_text("Hello");
    return grpc::Status::OK;
  }

  grpc::Status Score(grpc::ServerContext*, const v1::ScoreRequest*, v1::ScoreResponse* response) override {
    response->set_total_logprob(-1.5);
    return grpc::Status::OK;
  }

  grpc::Status Tokenize(grpc::ServerContext*, const v1::TokenizeRequest* request,
                        v1::TokenizeResponse* response) override {
    response->add_token_ids(static_cast<uint32_t>(request->text().size()));
    return grpc::Status::OK;
  }

  grpc::Status Detokenize(grpc::ServerContext*, const v1::DetokenizeRequest* request,
                          v1::DetokenizeResponse* response) override {
    response->set_text(std::to_string(request->token_ids_size()));
    return grpc::Status::OK;
  }

  // Waits until a "forever" stream was seen to be cancelled.
  void WaitForCancellation() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return cancelled_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool cancelled_ = false;
};

class FakeModels final : public v1::ModelService::Service {
  // A caller's token comes back as the architecture.
  grpc::Status ListModels(grpc::ServerContext* context, const v1::ListModelsRequest*,
                          v1::ListModelsResponse* response) override {
    v1::Model& model = *response->add_models();
    model.set_name("tiny");
    const auto token = context->client_metadata().find("authorization");
    if (token == context->client_metadata().end()) return grpc::Status::OK;
    model.set_architecture(std::string(token->second.begin(), token->second.end()));
    return grpc::Status::OK;
  }
  grpc::Status GetModel(grpc::ServerContext*, const v1::GetModelRequest* request,
                        v1::GetModelResponse* response) override {
    if (request->name() == "other") return {grpc::StatusCode::NOT_FOUND, "model other is not served"};
    response->mutable_model()->set_name("tiny");
    return grpc::Status::OK;
  }
};

class FakeAdmin final : public v1::AdminService::Service {
  grpc::Status GetServerInfo(grpc::ServerContext*, const v1::GetServerInfoRequest*,
                             v1::GetServerInfoResponse* response) override {
    response->set_backend("cpu");
    return grpc::Status::OK;
  }
  grpc::Status GetLoad(grpc::ServerContext*, const v1::GetLoadRequest*, v1::GetLoadResponse* response) override {
    response->set_running_sequences(3);
    return grpc::Status::OK;
  }
  grpc::Status CancelRequests(grpc::ServerContext*, const v1::CancelRequestsRequest* request,
                              v1::CancelRequestsResponse* response) override {
    response->set_cancelled(static_cast<uint32_t>(request->request_ids_size()));
    return grpc::Status::OK;
  }
  grpc::Status Drain(grpc::ServerContext*, const v1::DrainRequest*, v1::DrainResponse*) override {
    return grpc::Status::OK;
  }
};

class FakeHealth final : public grpc::health::v1::Health::Service {
  grpc::Status Check(grpc::ServerContext*, const grpc::health::v1::HealthCheckRequest* request,
                     grpc::health::v1::HealthCheckResponse* response) override {
    if (!request->service().empty()) return {grpc::StatusCode::NOT_FOUND, ""};
    response->set_status(grpc::health::v1::HealthCheckResponse::SERVING);
    return grpc::Status::OK;
  }
};

// Starts in the constructor, stops in the destructor.
class FakeServer {
 public:
  FakeServer() {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(&generation);
    builder.RegisterService(&models_);
    builder.RegisterService(&admin_);
    builder.RegisterService(&health_);
    server_ = builder.BuildAndStart();
  }
  ~FakeServer() { server_->Shutdown(); }

  std::string target() const { return "127.0.0.1:" + std::to_string(port_); }

  FakeGeneration generation;

 private:
  FakeModels models_;
  FakeAdmin admin_;
  FakeHealth health_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace minitron::client
