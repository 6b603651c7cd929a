// The parts of minitron-gpu-bench that run a whole model, without a server and on either backend.
#pragma once

#include <string>
#include <vector>

namespace minitron::gpu {

// MODEL, cuda|cpu, weights (none|int8|int4|fp8|fp8-dynamic), KV (bf16|fp8), launch (plain|early), points
// (full|brief|small): decode steps per batch size and context, submitted ahead, and prompts; where weights are made on
// the device (MODEL is random:SHAPE), what lies idle between decode graphs. Prints JSON lines; returns the exit code.
int RunnerSteps(const std::vector<std::string>& arguments);

// MODEL, cuda|cpu, TOKENS_FILE: the logprob of each token of each line but the first, and the most likely one there.
int RunnerScore(const std::vector<std::string>& arguments);

}  // namespace minitron::gpu
