// Admission: the way of a checked request into the engine. Any thread.
#pragma once

#include <memory>

#include "server/call_sink.h"
#include "server/server_context.h"

namespace minitron::server {

// Numbers the request, registers `sink` for its events and submits it. `id` is set before the first event can come.
// Errors: RESOURCE_EXHAUSTED (the tenant's limits), ALREADY_EXISTS, UNAVAILABLE (queue full, deadline out of reach,
// draining), DEADLINE_EXCEEDED (already), INVALID_ARGUMENT (can never fit), INTERNAL. After an error no event comes,
// except that an engine failure may also reach the sink as OnFailed. Refusals are counted.
absl::Status Admit(ServerContext& server, BuiltRequest built, std::shared_ptr<CallSink> sink,
                   std::atomic<scheduler::RequestId>& id);

// Counts a refusal that happened before Admit.
void CountRefusal(ServerContext& server, const absl::Status& status, const std::string& tenant);

}  // namespace minitron::server
