// The CUDA backend in emulation under the real EngineCore: what a client of the server gets when there is a GPU, up to
// the speed. Chunked prompts, recorded decode steps, prefix cache, preemption and steps submitted ahead, together.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/checkpoint/checkpoint.h"
#include "engine/cpu/cpu_model_runner.h"
#include "engine/cuda/cuda_model_runner.h"
#include "engine/cuda/device.h"
#include "engine/nemotron_weights.h"
#include "engine/philox.h"
#include "gtest/gtest.h"
#include "tests/engine/random_model.h"
#include "tests/engine/test_constraints.h"
#include "tests/simulation/engine_harness.h"

namespace minitron::scheduler {
namespace {

namespace cuda = engine::cuda;

constexpr int kNumSeeds = 6;
constexpr cuda::DeviceInfo kDevice{.compute_capability = 89, .num_processors = 2};

// The smallest model the kernels take.
engine::NemotronConfig TinyConfig() {
  engine::NemotronConfig config = engine::SmallConfig();
  config.vocab_size = 32;  // so that sequences do end at their end-of-sequence token
  config.hidden_size = 32;
  config.num_attention_heads = 6;
  config.num_key_value_heads = 1;
  config.head_dim = 64;
  config.rotary_dim = 32;
  config.intermediate_size = 64;
  config.max_position_embeddings = 64;
  return config;
}

std::unique_ptr<engine::ModelRunner> MakeCuda(const engine::NemotronConfig& config,
                                              const engine::NemotronWeights& weights,
                                              const engine::RunnerLimits& limits) {
  auto runner = cuda::CreateCudaModelRunner(config, weights, limits, kDevice, cuda::CreateReferenceMatMul());
  EXPECT_TRUE(runner.ok()) << runner.status();
  return *std::move(runner);
}

MakeRunner MakerOf(const engine::RandomModel& model) {
  return [&model](const engine::RunnerLimits& limits, const Schedule&) {
    return MakeCuda(model.config(), model.weights(), limits);
  };
}

TEST(CudaServingTest, StepsAreSubmittedAheadWithoutBeingAsked) {
  const engine::RandomModel model(TinyConfig(), engine::DType::kBf16, 5);
  Engine engine(MakerOf(model), model.config().max_position_embeddings, {.num_blocks = 8});
  EXPECT_TRUE(engine.runner().submits_asynchronously());
}

TEST(CudaServingTest, ARequestHasTheSameBitsHoweverTheWorkIsCutUp) {
  const engine::RandomModel model(TinyConfig(), engine::DType::kBf16, 5);
  const RequestSizes sizes{
      .vocab_size = model.config().vocab_size, .max_requests = 7, .max_prompt = 24, .max_output = 20, .max_pool = 1};
  Marks marks;
  for (uint64_t seed = 1; seed <= kNumSeeds; ++seed) {
    ExpectSameBitsHoweverTheWorkIsCutUp(MakerOf(model), model.config().max_position_embeddings, sizes,
                                        {Overlap::kOff, Overlap::kAuto}, seed, marks);
    if (HasFailure()) return;
  }
  ExpectAllReached(marks);
}

// A cached prefix, a chunk and a recomputed context read the same bytes of an 8-bit cache, too.
TEST(CudaServingTest, AnFp8CacheKeepsThePromiseAsWell) {
  const engine::RandomModel model(TinyConfig(), engine::DType::kBf16, 5);
  const RequestSizes sizes{.vocab_size = model.config().vocab_size, .max_requests = 5, .max_prompt = 24, .max_pool = 1};
  const MakeRunner make = [&model](engine::RunnerLimits limits, const Schedule&) {
    limits.kv_cache_type = engine::KvCacheType::kFp8;
    return MakeCuda(model.config(), model.weights(), limits);
  };
  Marks marks;
  ExpectSameBitsHoweverTheWorkIsCutUp(make, model.config().max_position_embeddings, sizes, {Overlap::kAuto}, 2, marks);
  EXPECT_GT(marks.warm_hit_tokens, 0);
  EXPECT_GT(marks.chunked_prompts, 0);
}

// The shipped model and what reads it.
struct ShippedModel {
  ShippedModel() {
    const std::string folder = std::string(MINITRON_SOURCE_DIR) + "/deploy/models/minitron-tiny";
    config = *engine::LoadNemotronConfig(folder);
    checkpoint = *engine::Checkpoint::Open(folder);
    weights = *engine::MapNemotronWeights(*checkpoint, config);
  }
  engine::NemotronConfig config;
  std::unique_ptr<engine::Checkpoint> checkpoint;
  engine::NemotronWeights weights;
};

// Greedy requests that share the beginning of their prompts, with the two most likely tokens of every place.
std::vector<Request> GreedyRequests(int vocab_size) {
  std::mt19937_64 random(4);
  std::vector<TokenId> shared(18);
  for (TokenId& token : shared) token = static_cast<TokenId>(random() % vocab_size);
  std::vector<Request> requests(5);
  for (size_t i = 0; i < requests.size(); ++i) {
    requests[i].id = i + 1;
    requests[i].prompt_token_ids = shared;
    for (size_t k = 0; k < 3 * i; ++k) {
      requests[i].prompt_token_ids.push_back(static_cast<TokenId>(random() % vocab_size));
    }
    requests[i].max_tokens = 10;
    requests[i].num_top_logprobs = 2;
    requests[i].params.temperature = 0.0f;
  }
  return requests;
}

// Each request's tokens, and how far ahead of the second the most likely token was.
struct Continuation {
  std::vector<TokenId> tokens;
  std::vector<float> leads;
};
class Continuations : public StepSink {
 public:
  std::map<RequestId, Continuation> Run(engine::ModelRunner& runner, const std::vector<Request>& requests) {
    EngineCoreOptions options;
    options.scheduler.max_prefill_chunk = 7;
    EngineCore core(options, &runner, this, [] { return TimePoint(std::chrono::seconds(1)); });
    for (const Request& request : requests) EXPECT_TRUE(core.Submit(request).ok());
    while (core.Step()) continue;
    EXPECT_TRUE(core.idle());
    return continuations_;
  }
  void OnStep(StepOutput output) override {
    for (const TokenEvent& event : output.tokens) {
      Continuation& continuation = continuations_[event.id];
      continuation.tokens.push_back(event.output.token_id);
      continuation.leads.push_back(event.output.top[0].logprob - event.output.top[1].logprob);
    }
  }

 private:
  std::map<RequestId, Continuation> continuations_;
};

// bf16 activations move a logprob by up to some hundredths of a nat; behind a token that differs, nothing compares.
TEST(CudaServingTest, TheShippedModelServesTheCpuBackendsTokens) {
  constexpr float kTie = 0.1f;
  const ShippedModel model;
  const std::vector<Request> requests = GreedyRequests(model.config.vocab_size);
  const engine::RunnerLimits limits{
      .block_size = 8, .num_kv_blocks = 14, .max_num_sequences = 4, .max_num_tokens = 24, .max_context_tokens = 64};
  const auto cpu = engine::cpu::CreateCpuModelRunner(model.config, model.weights, nullptr, limits, 1);
  const auto device = MakeCuda(model.config, model.weights, limits);
  const auto expected = Continuations().Run(*cpu, requests);
  const auto actual = Continuations().Run(*device, requests);
  int num_compared = 0;
  for (const auto& [id, want] : expected) {
    const Continuation& got = actual.at(id);
    ASSERT_EQ(want.tokens.size(), 10u);
    ASSERT_EQ(got.tokens.size(), 10u);
    for (size_t i = 0; i < want.tokens.size(); ++i, ++num_compared) {
      if (got.tokens[i] == want.tokens[i]) continue;
      EXPECT_LT(want.leads[i], kTie) << "request " << id << " token " << i;
      break;
    }
  }
  EXPECT_GE(num_compared, 40) << "too many ties to say anything";
}

// Every token event of some requests through the real EngineCore, and how each ended.
class Events : public StepSink {
 public:
  Events(engine::ModelRunner& runner, const std::vector<Request>& requests) {
    EngineCore core({}, &runner, this, [] { return TimePoint(std::chrono::seconds(1)); });
    for (const Request& request : requests) EXPECT_TRUE(core.Submit(request).ok());
    while (core.Step()) continue;
    EXPECT_TRUE(core.idle());
  }
  void OnStep(StepOutput output) override {
    for (const TokenEvent& event : output.tokens) rows[event.id].push_back(event.output);
    for (const FinishEvent& event : output.finished) reasons[event.id] = event.reason;
  }

  std::map<RequestId, std::vector<engine::ResultRowOutput>> rows;
  std::map<RequestId, FinishReason> reasons;
};

// Greedy and sampled in turn, every other one constrained; logprobs of the whole vocabulary.
std::vector<Request> HalfConstrained(const std::shared_ptr<const engine::Sets>& constraint) {
  std::vector<Request> requests(8);
  for (size_t i = 0; i < requests.size(); ++i) {
    Request& request = requests[i];
    request.id = i + 1;
    for (size_t k = 0; k < 5 + i; ++k) request.prompt_token_ids.push_back(static_cast<TokenId>((7 * i + 3 * k) % 32));
    request.max_tokens = 12;
    request.num_top_logprobs = 32;
    request.params = {.temperature = i % 4 < 2 ? 0.0f : 1.0f, .seed = 100 + i};
    if (i % 2 == 0) request.params.constraint = constraint;
  }
  return requests;
}

// The token a row has to give by its own logprobs, and how near (in logits, or in the draw's probability) it came to
// another.
std::pair<TokenId, float> Choose(const Request& request, const engine::ResultRowOutput& row, int position) {
  const auto* sets = static_cast<const engine::Sets*>(request.params.constraint.get());
  std::vector<engine::TokenLogprob> allowed;
  for (const engine::TokenLogprob& token : row.top) {
    if (engine::Has(sets->At(position), token.token_id)) allowed.push_back(token);
  }
  if (allowed.size() == 1) return {allowed[0].token_id, INFINITY};
  if (request.params.temperature == 0.0f) return {allowed[0].token_id, allowed[0].logprob - allowed[1].logprob};
  std::sort(allowed.begin(), allowed.end(), [](const auto& a, const auto& b) { return a.token_id < b.token_id; });
  double total = 0.0, sum = 0.0, margin = 1.0;
  for (const auto& token : allowed) total += std::exp(token.logprob);
  const double u = engine::UniformForPosition(request.params.seed, position);
  TokenId chosen = -1;
  for (const auto& token : allowed) {
    sum += std::exp(token.logprob) / total;
    if (chosen < 0 && u < sum) chosen = token.token_id;
    if (&token != &allowed.back()) margin = std::min(margin, std::abs(u - sum));
  }
  return {chosen, static_cast<float>(margin)};
}

// Within what bf16 activations may move, and as far as the tokens before are the same.
TEST(CudaServingTest, ConstrainedRequestsGetTheCpuBackendsTokens) {
  constexpr float kTie = 0.05f;
  const engine::RandomModel model(TinyConfig(), engine::DType::kBf16, 5);
  const engine::RunnerLimits limits{
      .block_size = 8, .num_kv_blocks = 64, .max_num_sequences = 8, .max_num_tokens = 32, .max_context_tokens = 64};
  const auto sets = std::make_shared<engine::Sets>(std::vector<engine::TokenSet>{
      engine::SetOf({1, 4, 9, 11, 30}), engine::SetOf({31}), engine::SetOf({0, 2, 4, 6, 8, 10, 12, 14, 16})});
  const std::vector<Request> requests = HalfConstrained(sets);
  const auto cpu_runner = engine::cpu::CreateCpuModelRunner(model.config(), model.weights(), nullptr, limits, 1);
  const auto device = MakeCuda(model.config(), model.weights(), limits);
  const Events cpu(*cpu_runner, requests);
  const Events cuda(*device, requests);
  int num_compared = 0;
  for (const Request& request : requests) {
    if (request.params.constraint == nullptr) continue;
    const auto& want = cpu.rows.at(request.id);
    const auto& got = cuda.rows.at(request.id);
    ASSERT_EQ(want.size(), 12u);
    ASSERT_EQ(got.size(), 12u);
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_TRUE(engine::Has(sets->At(i), got[i].token_id)) << request.id << " token " << i;
    }
    for (size_t i = 0; i < want.size(); ++i, ++num_compared) {
      const auto [token, margin] = Choose(request, want[i], static_cast<int>(i));
      EXPECT_EQ(want[i].token_id, token) << request.id << " token " << i;
      if (got[i].token_id == token) continue;
      EXPECT_LT(margin, kTie) << request.id << " token " << i;
      break;
    }
  }
  EXPECT_GE(num_compared, 40) << "too many ties to say anything";
}

// Constrained neighbours, one of which has nothing to choose from at its third token, change no bit of the others.
TEST(CudaServingTest, ConstraintsAndTheirFailuresStayWithTheirRequest) {
  const engine::RandomModel model(TinyConfig(), engine::DType::kBf16, 5);
  const engine::RunnerLimits limits{
      .block_size = 8, .num_kv_blocks = 64, .max_num_sequences = 9, .max_num_tokens = 32, .max_context_tokens = 64};
  const auto sets = std::make_shared<engine::Sets>(engine::Sets::ByCount(32));
  std::vector<Request> requests = HalfConstrained(sets);
  Request dead_end = requests[0];
  dead_end.id = 9;
  dead_end.params.constraint = std::make_shared<engine::Sets>(
      std::vector<engine::TokenSet>{engine::SetOf({5}), engine::SetOf({6, 7}), engine::TokenSet(1)});
  requests.push_back(dead_end);
  const auto runner = MakeCuda(model.config(), model.weights(), limits);
  const Events together(*runner, requests);
  for (const Request& request : requests) {
    const Events alone(*runner, {request});
    ASSERT_EQ(together.rows.at(request.id).size(), request.id == 9 ? 2u : 12u);
    EXPECT_EQ(together.reasons.at(request.id), request.id == 9 ? FinishReason::kError : FinishReason::kLength);
    for (size_t i = 0; i < together.rows.at(request.id).size(); ++i) {
      EXPECT_EQ(together.rows.at(request.id)[i].token_id, alone.rows.at(request.id)[i].token_id);
      EXPECT_EQ(together.rows.at(request.id)[i].chosen, alone.rows.at(request.id)[i].chosen);
      EXPECT_EQ(together.rows.at(request.id)[i].top, alone.rows.at(request.id)[i].top);
    }
  }
}

// A device that breaks ends the engine at that step: one last output says why, no request hangs, nothing leaks.
TEST(CudaServingTest, ADeviceThatBreaksEndsTheEngineWithATypedError) {
  const engine::RandomModel model(TinyConfig(), engine::DType::kBf16, 5);
  const cuda::emulation::LiveObjects before = cuda::emulation::CountLiveObjects();
  for (const int call : {1, 20, 150}) {
    {
      Engine engine(MakerOf(model), model.config().max_position_embeddings, {.num_blocks = 16, .max_running = 2});
      Request request;
      request.prompt_token_ids = {1, 2, 3, 4, 5};
      request.max_tokens = 30;
      for (request.id = 1; request.id <= 3; ++request.id) ASSERT_TRUE(engine.core().Submit(request).ok());
      cuda::emulation::FailCall(call, cudaErrorIllegalAddress, true);
      while (engine.core().Step()) continue;
      cuda::emulation::FailCall(0, cudaSuccess, false);
      EXPECT_TRUE(engine.core().failed()) << "call " << call;
      EXPECT_NE(engine.engine_error().find("INTERNAL: cuda: "), std::string::npos) << engine.engine_error();
      EXPECT_NE(engine.engine_error().find("cudaErrorIllegalAddress"), std::string::npos) << engine.engine_error();
      EXPECT_EQ(engine.core().Submit(request).code(), absl::StatusCode::kInternal);
    }
    EXPECT_EQ(cuda::emulation::CountLiveObjects(), before) << "call " << call;
  }
}

}  // namespace
}  // namespace minitron::scheduler
