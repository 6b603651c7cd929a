// vLLM's gRPC requests as native tasks. Only translates: limits are request_builder's. Pure, but for a fresh cache
// salt.
#pragma once

#include <compat/vllm.pb.h>
#include <compat/vllm_engine.pb.h>
#include <minitron/v1/generation.pb.h>

#include <string>

#include "absl/status/statusor.h"

namespace minitron::server::compat {

// What of an answer to vllm.Inference goes on the wire.
struct VllmOptions {
  bool prompt_token_ids = false;
  bool prompt_logprobs = false;
  bool prompt_candidates = false;
  bool output_text = true;
  bool output_token_ids = false;
  bool output_logprobs = false;
  bool output_candidates = false;
};

struct VllmTask {
  v1::GenerationTask task;
  VllmOptions options;
};

// `fresh_salt` is a name nobody else has: what a request that bypasses the prefix cache shares it with.
// Error: INVALID_ARGUMENT for what this server cannot do (structural tags, media, LoRA, KV transfer), by field.
absl::StatusOr<VllmTask> ReadVllmRequest(const ::vllm::GenerateRequest& request, const std::string& fresh_salt);

// `max_context_tokens` is the model's. Errors: likewise.
absl::StatusOr<v1::GenerationTask> ReadEngineRequest(const ::vllm::grpc::engine::GenerateRequest& request,
                                                     int max_context_tokens);

}  // namespace minitron::server::compat
