// The parts of minitron-gpu-bench that run a whole model, without a server and on either backend.
#pragma once

#include <string>
#include <vector>

namespace minitron::gpu {

// MODEL, cuda|cpu, weights (none|int8|int4|fp8|fp8-dynamic), KV (bf16|fp8), launch (plain|early|free), points
// (full|brief|small): decode steps per batch size and context, submitted ahead, and prompts; where weights are made on
// the device (MODEL is random:SHAPE), what lies idle between decode graphs. `free`, for those alone: each product has
// the fastest algorithm for its number of rows, which shows what batch invariance costs. Prints JSON lines; returns the
// exit code.
int RunnerSteps(const std::vector<std::string>& arguments);

// MODEL, cuda|cpu, TOKENS_FILE, some of alone,together,steps: the logprob of each token of each line but the first, and
// the most likely one there. A line at a time, all in one batch, or a token of each at a time. Lines of at most 128.
int RunnerScore(const std::vector<std::string>& arguments);

}  // namespace minitron::gpu
