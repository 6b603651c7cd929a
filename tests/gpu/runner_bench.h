// The parts of minitron-gpu-bench that run a whole model, without a server and on either backend.
#pragma once

#include <string>
#include <vector>

namespace minitron::gpu {

// MODEL_DIR, cuda|cpu, weights (none|int8|int4|fp8|fp8-dynamic), KV (bf16|fp8), launch (plain|early): decode steps per
// batch size and context, submitted ahead, and prompts. Prints JSON lines; returns the exit code.
int RunnerSteps(const std::vector<std::string>& arguments);

// MODEL_DIR, cuda|cpu, TOKENS_FILE: the logprob of each token of each line but the first, and the most likely one
// there.
int RunnerScore(const std::vector<std::string>& arguments);

}  // namespace minitron::gpu
