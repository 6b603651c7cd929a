// vLLM's three gRPC services over the callback API. Stateless.
#pragma once

#include <compat/vllm.grpc.pb.h>
#include <compat/vllm_engine.grpc.pb.h>

#include <string>

#include "server/server_context.h"

namespace minitron::server::compat {

inline constexpr const char* kVllmServices[] = {"vllm.Inference", "vllm.Control", "vllm.grpc.engine.VllmEngine"};

class VllmInference final : public ::vllm::Inference::CallbackService {
 public:
  explicit VllmInference(ServerContext* server) : server_(server) {}

  grpc::ServerUnaryReactor* Generate(grpc::CallbackServerContext* context, const ::vllm::GenerateRequest* request,
                                     ::vllm::GenerateResponse* response) override;
  grpc::ServerWriteReactor<::vllm::GenerateResponse>* GenerateStream(grpc::CallbackServerContext* context,
                                                                     const ::vllm::GenerateRequest* request) override;

 private:
  ServerContext* server_;  // owned by main
};

// All of it takes the role admin, as minitron.v1.AdminService does.
class VllmControl final : public ::vllm::Control::CallbackService {
 public:
  explicit VllmControl(ServerContext* server) : server_(server), instance_id_(server->names.FreshName()) {}

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const ::vllm::GetServerInfoRequest* request,
                                          ::vllm::ServerInfo* response) override;
  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context,
                                         const ::vllm::GetModelInfoRequest* request,
                                         ::vllm::ModelInfo* response) override;
  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context, const ::vllm::AbortRequest* request,
                                  ::vllm::AbortResponse* response) override;

 private:
  ServerContext* server_;  // owned by main
  const std::string instance_id_;
};

// What tells of others or ends their requests (Abort, GetServerInfo, GetLoads) takes the role admin.
class VllmEngine final : public ::vllm::grpc::engine::VllmEngine::CallbackService {
 public:
  explicit VllmEngine(ServerContext* server) : server_(server) {}

  grpc::ServerWriteReactor<::vllm::grpc::engine::GenerateResponse>* Generate(
      grpc::CallbackServerContext* context, const ::vllm::grpc::engine::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* HealthCheck(grpc::CallbackServerContext* context,
                                        const ::vllm::grpc::engine::HealthCheckRequest* request,
                                        ::vllm::grpc::engine::HealthCheckResponse* response) override;
  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context,
                                  const ::vllm::grpc::engine::AbortRequest* request,
                                  ::vllm::grpc::engine::AbortResponse* response) override;
  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context,
                                         const ::vllm::grpc::engine::GetModelInfoRequest* request,
                                         ::vllm::grpc::engine::GetModelInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const ::vllm::grpc::engine::GetServerInfoRequest* request,
                                          ::vllm::grpc::engine::GetServerInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetLoads(grpc::CallbackServerContext* context,
                                     const ::vllm::grpc::engine::GetLoadsRequest* request,
                                     ::vllm::grpc::engine::GetLoadsResponse* response) override;
  grpc::ServerWriteReactor<::smg::grpc::common::GetTokenizerChunk>* GetTokenizer(
      grpc::CallbackServerContext* context, const ::smg::grpc::common::GetTokenizerRequest* request) override;

 private:
  ServerContext* server_;  // owned by main
};

}  // namespace minitron::server::compat
