// Runners of the CUDA backend on a small random model: what its tests share.
#pragma once

#include <memory>
#include <vector>

#include "engine/cuda/cublaslt_matmul.h"
#include "engine/cuda/cuda_model_runner.h"
#include "engine/cuda/device.h"
#include "gtest/gtest.h"
#include "tests/engine/model_runner_driver.h"

namespace minitron::engine::cuda {

inline constexpr DeviceInfo kDevice{.compute_capability = 89, .num_processors = 2};

// The 8B's proportions at the smallest size the kernels take; a context of three attention chunks.
inline NemotronConfig CudaConfig() {
  NemotronConfig config = SmallConfig();
  config.hidden_size = 64;
  config.head_dim = 64;
  config.rotary_dim = 32;
  config.intermediate_size = 128;
  config.max_position_embeddings = 640;
  return config;
}

// The products: the reference in emulation, the library on a device.
inline std::unique_ptr<MatMul> MakeMatMul() {
#if defined(MINITRON_CUDA_EMULATION)
  return CreateReferenceMatMul();
#else
  auto matmul = CreateCublasLtMatMul({});
  EXPECT_TRUE(matmul.ok()) << matmul.status();
  return *std::move(matmul);
#endif
}

inline std::unique_ptr<ModelRunner> MakeQuantized(const RandomModel& model, const RunnerLimits& limits,
                                                  Quantization quantization) {
  auto runner = CreateCudaModelRunner(model.config(), model.weights(), limits, kDevice, MakeMatMul(), {quantization});
  EXPECT_TRUE(runner.ok()) << runner.status();
  return *std::move(runner);
}

inline std::unique_ptr<ModelRunner> MakeCuda(const RandomModel& model, const RunnerLimits& limits) {
  return MakeQuantized(model, limits, Quantization::kOff);
}

inline std::unique_ptr<ModelRunner> MakeCudaFp8(const RandomModel& model, RunnerLimits limits) {
  limits.kv_cache_type = KvCacheType::kFp8;
  return MakeCuda(model, limits);
}

// A prompt with the logprob of each of its tokens and the three most likely at each place.
inline StepResult Score(ModelRunner& runner, const std::vector<TokenId>& prompt, const SamplingParams& params) {
  Batch batch;
  for (int i = 0; i < static_cast<int>(prompt.size()); ++i) {
    batch.token_ids.push_back(prompt[i]);
    batch.positions.push_back(i);
    batch.slot_mapping.push_back(i);
    const bool last = i + 1 == static_cast<int>(prompt.size());
    batch.results.push_back({.token_row = i,
                             .target = last ? kNone : prompt[i + 1],
                             .num_top_logprobs = 3,
                             .params = last ? &params : nullptr});
  }
  batch.query_start.push_back(batch.num_tokens());
  for (int block = 0; block * 16 < batch.num_tokens(); ++block) batch.block_ids.push_back(block);
  batch.block_start.push_back(static_cast<int>(batch.block_ids.size()));
  batch.kv_lens.push_back(batch.num_tokens());
  EXPECT_TRUE(runner.Submit(batch).ok());
  return *runner.Collect();
}

}  // namespace minitron::engine::cuda
