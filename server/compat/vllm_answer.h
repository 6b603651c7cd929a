// Events of a call as vLLM's messages. Pure.
#pragma once

#include <compat/vllm.pb.h>
#include <compat/vllm_engine.pb.h>

#include <vector>

#include "server/call_sink.h"
#include "server/compat/vllm_request.h"
#include "server/request_builder.h"

namespace minitron::server::compat {

// The prompt as it was used; `prompt` is its tokens. What was asked for decides which lists are filled.
::vllm::PromptInfo ToPromptInfo(const StartedEvent& event, const VllmOptions& options,
                                const std::vector<engine::TokenId>& prompt);
// Appends text and token to a piece of the sequence.
void Append(const DeltaEvent& event, const VllmOptions& options, ::vllm::SequenceOutput& out);
::vllm::FinishInfo ToFinishInfo(const FinishedEvent& event);

::vllm::grpc::engine::InputLogProbs ToInputLogProbs(const StartedEvent& event,
                                                    const std::vector<engine::TokenId>& prompt);
void Append(const engine::ResultRowOutput& row, ::vllm::grpc::engine::OutputLogProbs& out);
// Everything of a complete sequence but its tokens and log-probabilities.
void Describe(const FinishedEvent& event, ::vllm::grpc::engine::GenerateComplete& out);

}  // namespace minitron::server::compat
