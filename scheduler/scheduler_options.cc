#include "scheduler/scheduler_options.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace minitron::scheduler {
namespace {

absl::Status CheckRange(const char* name, int value, int low, int high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " ", value, " outside [", low, ", ", high, "]"));
}

}  // namespace

absl::Status SchedulerOptions::Validate() const {
  RETURN_IF_ERROR(CheckRange("max_running_sequences", max_running_sequences, 0, 65536));
  RETURN_IF_ERROR(CheckRange("max_step_tokens", max_step_tokens, 0, 1048576));
  RETURN_IF_ERROR(CheckRange("max_prefill_chunk", max_prefill_chunk, 1, 1048576));
  RETURN_IF_ERROR(CheckRange("max_logprob_rows_per_step", max_logprob_rows_per_step, 1, 65536));
  RETURN_IF_ERROR(CheckRange("prefix_hash_bits", prefix_hash_bits, 0, 64));
  RETURN_IF_ERROR(CheckRange("max_preemptions", max_preemptions, 0, 1000000));
  const auto itl_target_ms = std::chrono::duration_cast<std::chrono::milliseconds>(itl_target).count();
  return CheckRange("itl_target_ms", static_cast<int>(itl_target_ms), 0, 60000);
}

RunnerLimits RunnerLimits::Of(const engine::ModelRunner& runner) {
  return {.num_kv_blocks = runner.num_kv_blocks(),
          .block_size = runner.block_size(),
          .max_num_tokens = runner.max_num_tokens(),
          .max_num_sequences = runner.max_num_sequences(),
          .max_context_tokens = runner.model_info().max_context_tokens,
          .vocab_size = runner.model_info().vocab_size};
}

absl::Status CheckFits(const Request& request, const RunnerLimits& limits) {
  const int64_t num_prompt = static_cast<int64_t>(request.prompt_token_ids.size());
  if (num_prompt == 0) return absl::InvalidArgumentError("prompt has 0 tokens, at least 1 is needed");
  if (request.num_sequences < 1) {
    return absl::InvalidArgumentError(absl::StrCat("num_sequences ", request.num_sequences, " is below 1"));
  }
  if (request.max_tokens < 0) {
    return absl::InvalidArgumentError(absl::StrCat("max_tokens ", request.max_tokens, " is below 0"));
  }
  const int64_t num_tokens = num_prompt + request.max_tokens;
  if (num_tokens > limits.max_context_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("prompt of ", num_prompt, " tokens + max_tokens ",
                                                   request.max_tokens, " = ", num_tokens, " exceeds the context of ",
                                                   limits.max_context_tokens, " tokens"));
  }
  const int64_t num_blocks = (num_tokens + limits.block_size - 1) / limits.block_size;
  if (num_blocks > limits.num_kv_blocks) {
    return absl::InvalidArgumentError(absl::StrCat(
        "prompt of ", num_prompt, " tokens + max_tokens ", request.max_tokens, " = ", num_tokens, " needs ", num_blocks,
        " KV blocks of ", limits.block_size, " tokens, there are ", limits.num_kv_blocks));
  }
  return absl::OkStatus();
}

}  // namespace minitron::scheduler
