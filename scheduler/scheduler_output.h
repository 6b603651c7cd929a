// SchedulerOutput: the plan of one step, as tokens and block tables of sequences. BuildBatch turns it into arrays.
#pragma once

#include <memory>
#include <vector>

#include "scheduler/request.h"
#include "scheduler/sequence.h"
#include "scheduler/step_time_model.h"

namespace minitron::scheduler {

// One sequence's part of a step: tokens [first_position, first_position + num_tokens).
struct ScheduledSequence {
  std::shared_ptr<Sequence> sequence;  // shared: the batch borrows from it until its results are read
  int first_position = 0;
  int num_tokens = 0;
  // Result rows, in this order: logprobs of prompt positions [first_prompt_logprob, + num_prompt_logprobs), each from
  // the row before it; then the sampled token.
  int first_prompt_logprob = 0;
  int num_prompt_logprobs = 0;
  bool samples = false;
  bool resets_history = false;
  int output_position = 0;                  // of the sampled token
  int previous_result_row = engine::kNone;  // the first token is what this result row of the previous step sampled

  int num_result_rows() const { return num_prompt_logprobs + (samples ? 1 : 0); }
};

// The plan of one step.
struct SchedulerOutput {
  std::vector<ScheduledSequence> sequences;
  std::vector<RequestId> preempted;  // once per preempted sequence
  int num_tokens = 0;
  int num_prompt_tokens = 0;
  int num_result_rows = 0;
  int64_t num_prefix_query_tokens = 0;  // of the sequences that start in this step
  int64_t num_prefix_hit_tokens = 0;    // of these, what they need not compute
  int num_decodes = 0;                  // sequences that decode
  StepShape shape;
  double decode_seconds = 0;  // predicted, of the decoding sequences alone; with an inter-token target only
  int block_size = 0;

  // Empty again, with its memory.
  void Clear() {
    sequences.clear();
    preempted.clear();
    num_tokens = num_prompt_tokens = num_result_rows = num_decodes = 0;
    shape = {};
    decode_seconds = 0;
    num_prefix_query_tokens = num_prefix_hit_tokens = 0;
  }
};

}  // namespace minitron::scheduler
