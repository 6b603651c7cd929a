// Request builder: a wire message becomes a scheduler::Request and the options of the output side, or a typed refusal.
// The only place where request fields are checked. Pure apart from tokenizing; any thread.
#pragma once

#include <minitron/v1/generation.pb.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_config.h"
#include "engine/model_runner.h"
#include "scheduler/queue_ledger.h"
#include "scheduler/request.h"
#include "server/constraint/constraint_compiler.h"
#include "server/tenant_gate.h"
#include "server/tokenizer.h"

namespace minitron::server {

// The one served model and what requests may leave unsaid. Fixed after start.
struct ServedModel {
  std::string name;
  engine::ModelInfo info;
  engine::GenerationDefaults defaults;
  bool default_add_bos = false;
  int default_max_tokens = 256;
  int max_queued_requests = 256;                                // a request of more sequences could never be admitted
  const Tokenizer* tokenizer = nullptr;                         // owned by main
  const constraint::ConstraintCompiler* constraints = nullptr;  // owned by Serving
};

// What a call brings besides its message.
struct CallContext {
  std::string request_id;  // from x-request-id; used when the message names none
  std::string tenant;      // of the token; without authentication x-minitron-tenant
  scheduler::TimePoint arrival;
  scheduler::TimePoint deadline = scheduler::TimePoint::max();
  // Asked once all that is cheap to check is found good, before text is tokenized. May be empty.
  std::function<absl::Status(const scheduler::Arrival&)> check_admission;
  uint64_t fresh_seed = 0;       // used when the request sets none
  std::string fresh_request_id;  // used when nobody names the request
};

// What the output side has to know of a request.
struct CallSpec {
  std::string request_id;
  scheduler::TimePoint arrival;
  int num_prompt_tokens = 0;
  int num_sequences = 1;
  int min_tokens = 0;
  std::vector<std::string> stop_sequences;
  bool include_stop_sequence = false;
  bool skip_special_tokens = true;
  bool scoring = false;
  bool has_first_token_timeout = false;
  std::shared_ptr<TenantGate::Charge> charge;  // null without authentication
};

struct BuiltRequest {
  scheduler::Request request;  // id still 0: the service numbers requests
  CallSpec spec;
  bool send_token_ids = true;
  int num_context_tokens = 0;  // Score only: positions from here on are the target's
  int num_target_tokens = 0;   // Score only
};

// Errors: NOT_FOUND (model), INVALID_ARGUMENT with field, value and limit (see limits.h), those of check_admission.
absl::StatusOr<BuiltRequest> BuildGenerate(const v1::GenerationTask& task, const ServedModel& model,
                                           const CallContext& context);

// Text context and text target are encoded as one text; the context's tokens are as many as it has when encoded alone,
// the convention of lm-evaluation-harness. White space at the context's end belongs to the target, because pieces
// carry their space in front. Errors as above.
absl::StatusOr<BuiltRequest> BuildScore(const v1::ScoreRequest& message, const ServedModel& model,
                                        const CallContext& context);

// Errors: NOT_FOUND, INVALID_ARGUMENT.
absl::StatusOr<std::vector<engine::TokenId>> BuildTokenize(const v1::TokenizeRequest& message,
                                                           const ServedModel& model);
absl::StatusOr<std::string> BuildDetokenize(const v1::DetokenizeRequest& message, const ServedModel& model);

// NOT_FOUND unless `name` is empty or the served one.
absl::Status CheckModelName(const std::string& name, const ServedModel& model);

// INVALID_ARGUMENT naming `field` unless `text` is printable ASCII of at most `max_bytes`.
absl::Status CheckPrintable(const char* field, const std::string& text, int64_t max_bytes);

// What an empty SamplingConfig means for `model`.
v1::SamplingConfig DefaultSampling(const ServedModel& model);

}  // namespace minitron::server
