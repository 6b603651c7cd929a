// The promise end to end: the real EngineCore over the real CPU engine gives a request the same bits alone, in a full
// batch, chunked, from a cold and from a warm prefix cache, run ahead of its tokens or not, preempted and recomputed,
// in this process's runner or in a new one. Tokens, logprobs and ranks are compared as bits.
#include <cstdint>

#include "engine/cpu/cpu_model_runner.h"
#include "tests/engine/random_model.h"
#include "tests/simulation/engine_harness.h"

namespace minitron::scheduler {
namespace {

constexpr int kNumSeeds = 100;

TEST(BitExactTest, ARequestHasTheSameBitsHoweverTheWorkIsCutUp) {
  const engine::RandomModel model(engine::SmallConfig(), engine::DType::kBf16, 5);
  const int context = model.config().max_position_embeddings;
  const RequestSizes sizes{.vocab_size = model.config().vocab_size};
  const MakeRunner make = [&model](const engine::RunnerLimits& limits, const Schedule& schedule) {
    return engine::cpu::CreateCpuModelRunner(model.config(), model.weights(), nullptr, limits, schedule.threads);
  };
  Marks marks;
  for (uint64_t seed = 1; seed <= kNumSeeds; ++seed) {
    ExpectSameBitsHoweverTheWorkIsCutUp(make, context, sizes, {Overlap::kOff, Overlap::kOn}, seed, marks);
    if (HasFailure()) return;
  }
  ExpectAllReached(marks);
}

}  // namespace
}  // namespace minitron::scheduler
