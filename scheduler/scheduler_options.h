// What the scheduler may do (options) and what the runner can (limits), and whether a request can ever run within them.
#pragma once

#include "absl/status/status.h"
#include "engine/model_runner.h"
#include "scheduler/fair_queue.h"
#include "scheduler/prefix_cache.h"
#include "scheduler/request.h"

namespace minitron::scheduler {

// Who may use the cached prefixes of whom. Requests with different salts of their own never share.
enum class PrefixSharing {
  kRequest,  // the sequences of one request only: no cache across requests
  kTenant,   // requests of one tenant
  kAll,      // all requests; time to first token then tells whether somebody sent the same prefix lately
};

// How much memory a sequence is admitted with.
enum class AdmissionMode {
  kOptimistic,  // blocks of the tokens it has; grows, and is preempted at most max_preemptions times for others to grow
  kReserve,     // blocks for all tokens it may produce; never preempted
};

struct SchedulerOptions {
  int max_running_sequences = 0;       // [0, 65536]; 0: the runner's limit, which also caps it
  int max_step_tokens = 0;             // [0, 1048576]; 0: the runner's limit, which also caps it
  int max_prefill_chunk = 256;         // [1, 1048576]; prompt tokens of one sequence per step
  int max_logprob_rows_per_step = 64;  // [1, 65536]; prompt logprobs of one sequence per step
  FairQueueOptions fairness = {};
  PrefixSharing prefix_sharing = PrefixSharing::kTenant;
  PrefixHashKey prefix_hash_key = {};  // a secret of the process
  int prefix_hash_bits = 64;           // [0, 64]; fewer for tests of collisions
  AdmissionMode admission_mode = AdmissionMode::kOptimistic;
  int max_preemptions = 4;  // [0, 1000000]; of one sequence; after that it is admitted as if in kReserve
  // How long a step with decoding sequences may take, as far as prompts decide: their chunks are cut to fit by the
  // step-time model, to kMinChunk tokens at least. 0: chunks are limited by the budgets alone. [0, 60 s]
  Duration itl_target{};
  // While decoding alone takes more than this share of the target, prompts are computed one at a time: more sequences
  // would slow each other down.
  double itl_decode_share = 0.5;
  // While a tenant within its share is expected (FairQueue::ExpectsLightTenant), prompts of the others fill a step up
  // to this share of the target only: its next prompt has less to wait for, and a step of its own to fill.
  double itl_shared_step = 0.4;

  // Every step with prompts to compute computes that many of their tokens, whatever the target: prompts make progress.
  static constexpr int kMinChunk = 16;

  // Error: INVALID_ARGUMENT naming the field, its value and its range.
  absl::Status Validate() const;
};

// What the runner can do; fixed after load.
struct RunnerLimits {
  int num_kv_blocks = 0;
  int block_size = 0;          // tokens
  int max_num_tokens = 0;      // per step
  int max_num_sequences = 0;   // per step; history slots are [0, 2 * max_num_sequences)
  int max_context_tokens = 0;  // prompt and output together
  int vocab_size = 0;

  static RunnerLimits Of(const engine::ModelRunner& runner);
};

// Whether a request can ever run. Pure, any thread.
// Error: INVALID_ARGUMENT with the arithmetic.
absl::Status CheckFits(const Request& request, const RunnerLimits& limits);

}  // namespace minitron::scheduler
