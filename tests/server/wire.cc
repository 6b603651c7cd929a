#include "tests/server/wire.h"

#include <google/rpc/status.pb.h>
#include <grpcpp/support/error_details.h>

#include "server/grpc_status.h"

namespace minitron::server {
namespace {

template <typename Detail>
Detail DetailOf(const grpc::Status& status) {
  google::rpc::Status wire;
  grpc::ExtractErrorDetails(status, &wire);
  Detail found;
  for (const auto& detail : wire.details()) {
    if (detail.Is<Detail>()) detail.UnpackTo(&found);
  }
  return found;
}

std::string TrailerOf(const grpc::ClientContext& context, const char* key) {
  const auto& trailers = context.GetServerTrailingMetadata();
  const auto found = trailers.find(key);
  return found == trailers.end() ? "" : std::string(found->second.data(), found->second.size());
}

}  // namespace

google::rpc::ErrorInfo InfoOf(const grpc::Status& status) { return DetailOf<google::rpc::ErrorInfo>(status); }

std::string FieldOf(const grpc::Status& status) {
  const auto details = DetailOf<google::rpc::BadRequest>(status);
  return details.field_violations_size() == 1 ? details.field_violations(0).field() : "";
}

std::string MetadataOf(const grpc::Status& status, const std::string& key) {
  const google::rpc::ErrorInfo info = InfoOf(status);
  const auto found = info.metadata().find(key);
  return found == info.metadata().end() ? "(none)" : found->second;
}

std::string StreamResult::Text(uint32_t index) const {
  std::string text;
  for (const auto& event : events) {
    if (event.has_delta() && event.delta().index() == index) text += event.delta().text();
  }
  return text;
}

std::vector<uint32_t> StreamResult::TokenIds(uint32_t index) const {
  std::vector<uint32_t> ids;
  for (const auto& event : events) {
    if (!event.has_delta() || event.delta().index() != index) continue;
    ids.insert(ids.end(), event.delta().token_ids().begin(), event.delta().token_ids().end());
  }
  return ids;
}

std::vector<v1::PositionLogprobs> StreamResult::Logprobs(uint32_t index) const {
  std::vector<v1::PositionLogprobs> positions;
  for (const auto& event : events) {
    if (!event.has_delta() || event.delta().index() != index) continue;
    positions.insert(positions.end(), event.delta().logprobs().begin(), event.delta().logprobs().end());
  }
  return positions;
}

const v1::Finished* StreamResult::FinishedOf(uint32_t index) const {
  for (const auto& event : events) {
    if (event.has_finished() && event.finished().index() == index) return &event.finished();
  }
  return nullptr;
}

void ReadToEnd(grpc::ClientReader<v1::GenerateStreamResponse>& reader, const grpc::ClientContext& context,
               StreamResult& result) {
  v1::GenerateStreamResponse response;
  while (reader.Read(&response)) result.events.push_back(response);
  result.status = reader.Finish();
  result.request_id_trailer = TrailerOf(context, "x-request-id");
  result.pushback_trailer = TrailerOf(context, kRetryPushbackTrailer);
}

StreamResult ReadStream(v1::GenerationService::Stub& stub, const v1::GenerationTask& task,
                        std::shared_ptr<grpc::ClientContext> context) {
  if (context == nullptr) context = std::make_shared<grpc::ClientContext>();
  v1::GenerateStreamRequest request;
  *request.mutable_task() = task;
  StreamResult result;
  ReadToEnd(*stub.GenerateStream(context.get(), request), *context, result);
  return result;
}

std::future<StreamResult> ReadStreamInBackground(v1::GenerationService::Stub& stub, const v1::GenerationTask& task,
                                                 std::shared_ptr<grpc::ClientContext> context) {
  return std::async(std::launch::async, [&stub, task, context] { return ReadStream(stub, task, context); });
}

}  // namespace minitron::server
