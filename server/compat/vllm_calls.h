// The generating calls of vLLM's two gRPC protocols. Threads as in stream_call.h.
#pragma once

#include <compat/vllm.grpc.pb.h>
#include <compat/vllm_engine.grpc.pb.h>

#include <vector>

#include "server/compat/vllm_request.h"
#include "server/stream_call.h"
#include "server/unary_calls.h"

namespace minitron::server::compat {

// vllm.Inference.Generate: collects one sequence.
class VllmUnaryCall final : public UnaryEngineCall {
 public:
  static grpc::ServerUnaryReactor* Start(ServerContext* server, grpc::CallbackServerContext* context,
                                         const ::vllm::GenerateRequest& request, ::vllm::GenerateResponse* response);
  VllmUnaryCall(ServerContext* server, grpc::CallbackServerContext* context, ::vllm::GenerateResponse* response);

  void OnStarted(StartedEvent event) override;
  void OnDelta(DeltaEvent event) override;
  void OnFinished(FinishedEvent event) override;

 protected:
  void OnAdmitting(const BuiltRequest& built) override;

 private:
  ::vllm::GenerateResponse* response_;  // owned by gRPC, valid until Finish
  VllmOptions options_;
  std::vector<engine::TokenId> prompt_;  // if asked for
};

// vllm.Inference.GenerateStream: the prompt's answer, then pieces; a sequence's last piece says how it ended.
class VllmStreamCall final : public StreamCall<::vllm::GenerateResponse> {
 public:
  static VllmStreamCall* Start(ServerContext* server, grpc::CallbackServerContext* context,
                               const ::vllm::GenerateRequest& request);
  VllmStreamCall(ServerContext* server, grpc::CallbackServerContext* context);

  void OnStarted(StartedEvent event) override;
  void OnDelta(DeltaEvent event) override;
  void OnFinished(FinishedEvent event) override;

 protected:
  void OnAdmitting(const BuiltRequest& built) override;

 private:
  // The piece new tokens of sequence `index` belong to: the queued one, or a new one.
  ::vllm::SequenceOutput& PendingOutput(int index);

  VllmOptions options_;
  std::vector<engine::TokenId> prompt_;  // if asked for
};

// vllm.grpc.engine.VllmEngine.Generate: chunks of token ids if the request says "stream", then whole sequences.
class VllmEngineCall final : public StreamCall<::vllm::grpc::engine::GenerateResponse> {
 public:
  static VllmEngineCall* Start(ServerContext* server, grpc::CallbackServerContext* context,
                               const ::vllm::grpc::engine::GenerateRequest& request);
  VllmEngineCall(ServerContext* server, grpc::CallbackServerContext* context, bool stream);

  void OnStarted(StartedEvent event) override;
  void OnDelta(DeltaEvent event) override;
  void OnFinished(FinishedEvent event) override;

 protected:
  void OnAdmitting(const BuiltRequest& built) override;

 private:
  // What the last message of a sequence repeats.
  struct Sequence {
    std::vector<uint32_t> token_ids;
    ::vllm::grpc::engine::OutputLogProbs logprobs;
  };
  ::vllm::grpc::engine::GenerateStreamChunk& PendingChunk(int index);

  const bool stream_;
  bool has_logprobs_ = false;
  bool has_prompt_logprobs_ = false;
  std::vector<engine::TokenId> prompt_;  // with prompt logprobs
  std::vector<Sequence> sequences_;      // these three under mutex_
  ::vllm::grpc::engine::InputLogProbs input_logprobs_;
  bool has_sent_input_logprobs_ = false;
  StartedEvent started_;
};

}  // namespace minitron::server::compat
