// InferAnswer: the events of one request, gathered until they are sent as a ModelInferResponse. Not synchronized.
#pragma once

#include <compat/open_inference.pb.h>

#include <string>
#include <vector>

#include "server/call_sink.h"
#include "server/compat/open_inference_request.h"
#include "server/request_builder.h"

namespace minitron::server::compat {

class InferAnswer {
 public:
  // `model` must outlive this object.
  InferAnswer(InferOptions options, int num_sequences, const ServedModel* model);

  void Add(const StartedEvent& event);
  void Add(DeltaEvent event);
  void Add(const FinishedEvent& event);

  const InferOptions& options() const { return options_; }
  // Whether Take has something that was not sent yet.
  bool has_news() const { return has_news_; }
  // Fills `out` with what has come since the last call.
  void Take(inference::ModelInferResponse& out);
  // Only the names: an answer without tensors.
  void TakeNothing(inference::ModelInferResponse& out) const;

 private:
  struct Sequence {
    std::string text;
    std::vector<engine::ResultRowOutput> tokens;
    double cumulative_logprob = 0;
    const char* finish_reason = "None";  // the vLLM back end's word for "not yet"
  };

  void AddLogprobTensors(inference::ModelInferResponse& out) const;
  void AddCountTensors(inference::ModelInferResponse& out) const;
  std::string LogprobsJson(const Sequence& sequence) const;

  const InferOptions options_;
  const ServedModel* model_;
  std::vector<Sequence> sequences_;
  int num_prompt_tokens_ = 0;
  bool has_news_ = false;
};

}  // namespace minitron::server::compat
