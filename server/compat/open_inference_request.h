// A ModelInferRequest becomes the native task and the options of its answer. The tensors are the union of what Triton's
// vLLM and TensorRT-LLM back ends take, all optional but text_input, so that their clients need no change. Pure.
#pragma once

#include <compat/open_inference.pb.h>
#include <minitron/v1/generation.pb.h>

#include <chrono>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace minitron::server::compat {

// What of an answer is sent, and how.
struct InferOptions {
  std::string id;
  std::string prepended_text;  // the prompt, when it is to stand in front of the text
  bool stream = false;         // an answer per step; else one at the end
  bool empty_final = false;    // triton_enable_empty_final_response
  bool finish_reason = false;
  bool cumulative_logprob = false;
  bool logprobs = false;          // "logprobs", the vLLM back end's JSON
  bool output_log_probs = false;  // "cum_log_probs" and "output_log_probs", TensorRT-LLM's
  bool num_input_tokens = false;
  bool num_output_tokens = false;
  std::set<std::string> requested;  // outputs to send; empty: all there are

  bool Wants(const std::string& output) const { return requested.empty() || requested.count(output) > 0; }
};

struct InferTask {
  v1::GenerationTask task;
  InferOptions options;
  std::optional<std::chrono::microseconds> timeout;  // the parameter "timeout"
};

// Errors: INVALID_ARGUMENT naming the tensor or parameter; NOT_FOUND for a version other than 1. Ranges are checked by
// the request builder.
absl::StatusOr<InferTask> ReadInferRequest(const inference::ModelInferRequest& request);

// NOT_FOUND unless `version` is empty or "1".
absl::Status CheckModelVersion(const std::string& version);
inline constexpr char kModelVersion[] = "1";

// A tensor as ModelMetadata and ModelConfig describe it.
struct TensorSpec {
  const char* name;
  const char* datatype;
  inference::DataType config_type;
  int64_t extent;  // of the only dimension; -1: any
  bool optional = true;
};
std::vector<TensorSpec> InputSpecs();
std::vector<TensorSpec> OutputSpecs();

}  // namespace minitron::server::compat
