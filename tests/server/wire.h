// What the tests of this room do with a stub: call, collect, take an error apart.
#pragma once

#include <google/rpc/error_details.pb.h>
#include <grpcpp/grpcpp.h>
#include <minitron/v1/generation.grpc.pb.h>

#include <future>
#include <memory>
#include <string>
#include <vector>

namespace minitron::server {

// The details of a status; empty when it has none.
google::rpc::ErrorInfo InfoOf(const grpc::Status& status);
// The field of its BadRequest.
std::string FieldOf(const grpc::Status& status);
// A number of its ErrorInfo ("limit", "actual", ...); "(none)" when it is not there.
std::string MetadataOf(const grpc::Status& status, const std::string& key);

struct StreamResult {
  std::vector<v1::GenerateStreamResponse> events;
  grpc::Status status;
  std::string request_id_trailer;
  std::string pushback_trailer;

  std::string Text(uint32_t index = 0) const;
  std::vector<uint32_t> TokenIds(uint32_t index = 0) const;
  std::vector<v1::PositionLogprobs> Logprobs(uint32_t index = 0) const;
  const v1::Finished* FinishedOf(uint32_t index = 0) const;  // null when it did not finish
};

// Reads what is left of a stream.
void ReadToEnd(grpc::ClientReader<v1::GenerateStreamResponse>& reader, const grpc::ClientContext& context,
               StreamResult& result);

// One whole stream.
StreamResult ReadStream(v1::GenerationService::Stub& stub, const v1::GenerationTask& task,
                        std::shared_ptr<grpc::ClientContext> context = nullptr);
std::future<StreamResult> ReadStreamInBackground(v1::GenerationService::Stub& stub, const v1::GenerationTask& task,
                                                 std::shared_ptr<grpc::ClientContext> context = nullptr);

}  // namespace minitron::server
