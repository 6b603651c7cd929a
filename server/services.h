// The three minitron.v1 services over the callback API. Stateless: everything is in ServerContext.
#pragma once

#include <minitron/v1/admin.grpc.pb.h>
#include <minitron/v1/generation.grpc.pb.h>
#include <minitron/v1/model.grpc.pb.h>

#include "server/server_context.h"

namespace minitron::server {

class GenerationService final : public v1::GenerationService::CallbackService {
 public:
  explicit GenerationService(ServerContext* server) : server_(server) {}

  grpc::ServerWriteReactor<v1::GenerateStreamResponse>* GenerateStream(
      grpc::CallbackServerContext* context, const v1::GenerateStreamRequest* request) override;
  grpc::ServerUnaryReactor* Generate(grpc::CallbackServerContext* context, const v1::GenerateRequest* request,
                                     v1::GenerateResponse* response) override;
  grpc::ServerUnaryReactor* Score(grpc::CallbackServerContext* context, const v1::ScoreRequest* request,
                                  v1::ScoreResponse* response) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context, const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context, const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;

 private:
  ServerContext* server_;  // owned by main
};

class ModelService final : public v1::ModelService::CallbackService {
 public:
  explicit ModelService(ServerContext* server) : server_(server) {}

  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context, const v1::ListModelsRequest* request,
                                       v1::ListModelsResponse* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context, const v1::GetModelRequest* request,
                                     v1::GetModelResponse* response) override;

 private:
  ServerContext* server_;  // owned by main
};

// Cancels live requests by name; how many there were. Error: INVALID_ARGUMENT when there are too many names.
absl::StatusOr<uint32_t> CancelByName(const google::protobuf::RepeatedPtrField<std::string>& request_ids,
                                      OutputProcessor& output);

class AdminService final : public v1::AdminService::CallbackService {
 public:
  explicit AdminService(ServerContext* server) : server_(server) {}

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context, const v1::GetServerInfoRequest* request,
                                          v1::GetServerInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context, const v1::GetLoadRequest* request,
                                    v1::GetLoadResponse* response) override;
  grpc::ServerUnaryReactor* CancelRequests(grpc::CallbackServerContext* context,
                                           const v1::CancelRequestsRequest* request,
                                           v1::CancelRequestsResponse* response) override;
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context, const v1::DrainRequest* request,
                                  v1::DrainResponse* response) override;

 private:
  ServerContext* server_;  // owned by main
};

}  // namespace minitron::server
