// GenerateCall: one GenerateStream RPC.
#pragma once

#include <minitron/v1/generation.grpc.pb.h>

#include <string>

#include "server/proto_convert.h"
#include "server/stream_call.h"

namespace minitron::server {

class GenerateCall final : public StreamCall<v1::GenerateStreamResponse> {
 public:
  // Checks and admits the call. The reactor keeps itself alive until OnDone.
  static GenerateCall* Start(ServerContext* server, grpc::CallbackServerContext* context,
                             const v1::GenerateStreamRequest& request);

  GenerateCall(ServerContext* server, grpc::CallbackServerContext* context);  // use Start

  void OnStarted(StartedEvent event) override;
  void OnDelta(DeltaEvent event) override;
  void OnFinished(FinishedEvent event) override;

 protected:
  void OnAdmitting(const BuiltRequest& built) override;

 private:
  // The message new tokens of sequence `index` belong to: the queued one, or a new one.
  v1::Delta& PendingDelta(uint32_t index);

  AnswerOptions answer_;
  std::string request_id_;
  uint64_t seed_ = 0;
};

}  // namespace minitron::server
