// GenerateCall: one GenerateStream RPC. gRPC calls it from its threads, the output thread sends it events; a small
// mutex and two flags keep the rules of the reactor: one write in flight, Finish exactly once, nothing after Finish.
#pragma once

#include <minitron/v1/generation.grpc.pb.h>

#include <deque>
#include <memory>
#include <mutex>
#include <optional>

#include "server/admission.h"
#include "server/call_sink.h"
#include "server/proto_convert.h"
#include "server/rpc_scope.h"

namespace minitron::server {

class GenerateCall final : public grpc::ServerWriteReactor<v1::GenerateStreamResponse>, public CallSink {
 public:
  // Checks and admits the call. The returned reactor owns itself until OnDone.
  static GenerateCall* Start(ServerContext* server, grpc::CallbackServerContext* context,
                             const v1::GenerateStreamRequest& request);

  GenerateCall(ServerContext* server, grpc::CallbackServerContext* context);  // use Start
  ~GenerateCall() override;

  // CallSink
  void OnStarted(StartedEvent event) override;
  void OnDelta(DeltaEvent event) override;
  void OnFinished(FinishedEvent event) override;
  void OnDone() override;  // both of CallSink (all sequences are finished) and of the reactor: see the .cc
  void OnFailed(const grpc::Status& status) override;
  bool CutOffIfStalled(scheduler::TimePoint limit) override;

  // ServerWriteReactor
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
};

}  // namespace minitron::server
