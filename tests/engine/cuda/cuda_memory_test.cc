// What a runner of the CUDA backend takes of the device's memory and what it refuses, each by name.
#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/cuda/cuda_model_runner.h"
#include "engine/cuda/cuda_ops.h"
#include "engine/cuda/device.h"
#include "engine/cuda/device_weights.h"
#include "engine/cuda/memory_plan.h"
#include "gtest/gtest.h"
#include "tests/engine/cuda/runner_fixture.h"
#include "tests/engine/random_model.h"
#include "tests/engine/test_constraints.h"

namespace minitron::engine::cuda {
namespace {

TEST(CudaMemoryTest, DepthsWithoutAQuantizedKernelAreRefusedByName) {
  NemotronConfig config = CudaConfig();
  config.intermediate_size = 136;
  const RandomModel model(config, DType::kBf16, 1);
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 4, .max_num_sequences = 2, .max_num_tokens = 32, .max_context_tokens = 64};
  const auto runner =
      CreateCudaModelRunner(config, model.weights(), limits, kDevice, MakeMatMul(), {Quantization::kInt8});
  EXPECT_EQ(runner.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(runner.status().message(),
            "the cuda backend has no kernel for quantized weights with intermediate_size 136: a multiple of 64");
}

// Quantized, NaN would pass for a number. As loaded it stays what it is, and whose logits it reaches fails.
TEST(CudaMemoryTest, WeightsThatAreNotFiniteAreRefusedByNameWhereTheyAreQuantized) {
  const RandomModel model(CudaConfig(), DType::kF32, 1);
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 4, .max_num_sequences = 2, .max_num_tokens = 32, .max_context_tokens = 64};
  const auto create = [&](const NemotronWeights& weights, Quantization quantization) {
    return CreateCudaModelRunner(model.config(), weights, limits, kDevice, MakeMatMul(), {quantization});
  };
  const auto broken = [](const WeightView& view, int64_t row, int64_t col, float value) {
    std::vector<float> numbers(static_cast<const float*>(view.data),
                               static_cast<const float*>(view.data) + view.size());
    numbers[row * view.cols + col] = value;
    return numbers;
  };
  NemotronWeights weights = model.weights();
  WeightView& up = weights.layers[1].up_proj;
  const std::vector<float> bad_up = broken(up, 21, 5, std::nanf(""));
  up.data = bad_up.data();
  for (const Quantization quantization :
       {Quantization::kInt8, Quantization::kInt4, Quantization::kFp8, Quantization::kFp8Dynamic}) {
    const absl::Status status = create(weights, quantization).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(),
              "tensor model.layers.1.mlp.up_proj.weight has nan at [21, 5]: only finite weights can be quantized");
  }
  NemotronWeights with_bad_head = model.weights();
  const std::vector<float> bad_head = broken(with_bad_head.lm_head, 2, 63, -INFINITY);
  with_bad_head.lm_head.data = bad_head.data();
  EXPECT_EQ(create(with_bad_head, Quantization::kInt4).status().message(),
            "tensor lm_head.weight has -inf at [2, 63]: only finite weights can be quantized");
  const auto as_loaded = create(weights, Quantization::kOff);
  ASSERT_TRUE(as_loaded.ok()) << as_loaded.status();
  for (const ResultRowOutput& row : Score(**as_loaded, {1, 2, 3}, {.temperature = 0.0f}).rows) EXPECT_TRUE(row.failed);
}

TEST(CudaMemoryTest, ShapesWithoutAKernelAreRefusedByName) {
  NemotronConfig config = CudaConfig();
  config.head_dim = 80;
  const RandomModel model(config, DType::kBf16, 1);
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 4, .max_num_sequences = 2, .max_num_tokens = 32, .max_context_tokens = 64};
  const auto runner = CreateCudaModelRunner(config, model.weights(), limits, kDevice, MakeMatMul());
  EXPECT_EQ(runner.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(runner.status().message(), "the cuda backend has no kernel for head_dim 80: 64 or 128");
}

#if defined(MINITRON_CUDA_EMULATION)  // memory and objects are counted there
TEST(CudaMemoryTest, TheCacheTakesTheMemoryThatIsLeft) {
  const RandomModel model(CudaConfig(), DType::kBf16, 1);
  RunnerLimits limits{.block_size = 16, .max_num_sequences = 2, .max_num_tokens = 32, .max_context_tokens = 640};
  const auto create = [&] {
    return CreateCudaModelRunner(model.config(), model.weights(), limits, kDevice, MakeMatMul());
  };
  const auto all = create();
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_EQ((*all)->num_kv_blocks(), 80) << "two full contexts, not the terabyte the device has";
  // What the runner takes without its cache, the gigabyte kept free, and room for some blocks.
  emulation::SetDevice((size_t{1} << 30) + (32 << 20));
  const auto some = create();
  emulation::SetDevice(size_t{1} << 30);
  const auto none = create();
  emulation::SetDevice(100 << 10);
  const auto no_weights = create();
  emulation::SetDevice(size_t{1} << 40);
  ASSERT_TRUE(some.ok()) << some.status();
  EXPECT_EQ(none.status().code(), absl::StatusCode::kResourceExhausted) << none.status();
  EXPECT_EQ(no_weights.status().code(), absl::StatusCode::kResourceExhausted) << no_weights.status();
}

int64_t FreeBytes() {
  size_t free_bytes = 0, total_bytes = 0;
  EXPECT_EQ(cudaMemGetInfo(&free_bytes, &total_bytes), cudaSuccess);
  return static_cast<int64_t>(free_bytes);
}

TEST(CudaMemoryTest, ThePlanIsWhatIsTaken) {
  const RandomModel model(CudaConfig(), DType::kF32, 1);
  for (const RunnerLimits& limits :
       {RunnerLimits{.block_size = 16,
       .num_kv_blocks = 9,
       .max_num_sequences = 3,
       .max_num_tokens = 40,
       .max_context_tokens = 640},
        RunnerLimits{.block_size = 32, .max_num_sequences = 1, .max_num_tokens = 8, .max_context_tokens = 64}}) {
    for (const Quantization quantization : {Quantization::kOff, Quantization::kInt8, Quantization::kInt4,
                                            Quantization::kFp8, Quantization::kFp8Dynamic}) {
      const auto matmul = MakeMatMul();
      if (quantization == Quantization::kFp8Dynamic) {  // the widest product is that of Q, K and V, the deepest O's
        const int widest = model.config().query_width() + 2 * model.config().key_value_width();
        ASSERT_TRUE(matmul->PrepareFp8(limits.max_num_tokens, widest, model.config().query_width()).ok());
      }
      const int64_t workspace = matmul->workspace_bytes(), before = FreeBytes();
      const auto plan = PlanMemory(model.config(), DeviceWeights::NumBytes(model.weights(), quantization), limits,
                                   workspace, {before, before});
      ASSERT_TRUE(plan.ok()) << plan.status();
      const auto runner = MakeQuantized(model, limits, quantization);
      EXPECT_EQ(before - FreeBytes(), plan->total_bytes()) << "with a workspace of its own";
      EXPECT_EQ(runner->num_kv_blocks(), plan->num_kv_blocks);
    }
  }
}

TEST(CudaMemoryTest, WhatDoesNotFitIsRefusedWithTheSum) {
  const RandomModel model(CudaConfig(), DType::kBf16, 1);
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 5000, .max_num_sequences = 2, .max_num_tokens = 32, .max_context_tokens = 640};
  emulation::SetDevice((size_t{1} << 30) + (8 << 20));
  const auto runner = CreateCudaModelRunner(model.config(), model.weights(), limits, kDevice, MakeMatMul());
  emulation::SetDevice(size_t{1} << 40);
  EXPECT_EQ(runner.status().code(), absl::StatusCode::kResourceExhausted);
  const std::string message(runner.status().message());
  for (const char* part : {"device memory, MiB: weights 0.5 + matmul workspace 0.0 + activations 0.1 + logits 0.0 + ",
                           "KV cache 78.1 (5000 blocks of 16 tokens) + kept free 1024.0 = ",
                           ", but 1032.0 of 1032.0 are free; lower kv_cache_bytes, max_num_sequences, max_num_tokens "
                           "or max_context_tokens"}) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
}

// What asks for the most a step may ask for: biases, masks and histories cross to the device in arrays made at start.
TEST(CudaMemoryTest, TheLargestSamplingRequestNeedsNoMemory) {
  const RandomModel model(CudaConfig(), DType::kBf16, 1);
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 16, .max_num_sequences = 2, .max_num_tokens = 64, .max_context_tokens = 128};
  const auto runner = MakeCuda(model, limits);
  const emulation::LiveObjects ready = emulation::CountLiveObjects();
  SamplingParams params{.repetition_penalty = 1.1f};
  params.constraint = std::make_shared<Sets>(Sets::ByCount(131));
  for (TokenId token = 0; token < 131; ++token) params.logit_bias.emplace_back(token, 1.0f);
  const std::vector<TokenId> history(64, 5);
  Batch batch;
  for (int s = 0; s < 2; ++s) {
    batch.token_ids.push_back(1);
    batch.positions.push_back(0);
    batch.slot_mapping.push_back(16 * s);
    batch.query_start.push_back(s + 1);
    batch.block_ids.push_back(s);
    batch.block_start.push_back(s + 1);
    batch.kv_lens.push_back(1);
    batch.results.push_back({.token_row = s, .sequence = s, .history_slot = s, .params = &params});
    batch.history_resets.push_back({s, history, history, params.constraint.get()});
  }
  ASSERT_TRUE(runner->Submit(batch).ok());
  EXPECT_TRUE(runner->Collect().ok());
  EXPECT_EQ(emulation::CountLiveObjects(), ready);
}

// The table an operator reads: a line for each purpose, the sum, and what went beyond it.
TEST(CudaMemoryTest, ThePlanIsPrintedAtStart) {
  const RandomModel model(CudaConfig(), DType::kBf16, 1);
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 9, .max_num_sequences = 2, .max_num_tokens = 32, .max_context_tokens = 64};
  testing::internal::CaptureStderr();
  const auto runner = MakeCuda(model, limits);
  const std::string log = testing::internal::GetCapturedStderr();
  for (const char* purpose : {"weights", "matmul workspace", "activations", "logits", "rotary tables",
                              "attention partials", "step arrays", "sampler", "token histories", "results",
                              "KV cache blocks=9 block_tokens=16", "sum free_before_mib=", "recorded steps, kernels"}) {
    EXPECT_NE(log.find(std::string("purpose=") + purpose), std::string::npos) << purpose << " in:\n" << log;
  }
}

// Counts the rows whose logits are made.
class CountingMatMul final : public MatMul {
 public:
  explicit CountingMatMul(int& num_rows) : num_rows_(num_rows), matmul_(CreateReferenceMatMul()) {}
  absl::Status Run(const Bf16* x, const Bf16* w, int rows, int outs, int depth, Store store, Bf16* out,
                   cudaStream_t stream) override {
    return matmul_->Run(x, w, rows, outs, depth, store, out, stream);
  }
  absl::Status Run(const Bf16* x, const Bf16* w, int rows, int outs, int depth, float* out,
                   cudaStream_t stream) override {
    num_rows_ += rows;
    return matmul_->Run(x, w, rows, outs, depth, out, stream);
  }
  absl::Status Run(const Fp8Matrix& x, const Fp8Matrix& w, int rows, int outs, int depth, Store store, Bf16* out,
                   cudaStream_t stream) override {
    return matmul_->Run(x, w, rows, outs, depth, store, out, stream);
  }
  absl::StatusOr<Fp8Rows> RowsForFp8(int rows, int depth) override { return matmul_->RowsForFp8(rows, depth); }
  absl::Status PrepareFp8(int, int, int) override { return absl::OkStatus(); }
  int64_t workspace_bytes() const override { return 0; }

 private:
  int& num_rows_;
  std::unique_ptr<MatMul> matmul_;
};

TEST(CudaMemoryTest, LogitsAreMadeForTheRowsThatAskForThemOnly) {
  const RandomModel model(CudaConfig(), DType::kBf16, 1);
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 8, .max_num_sequences = 2, .max_num_tokens = 64, .max_context_tokens = 64};
  int num_rows = 0;
  const auto runner = *CreateCudaModelRunner(model.config(), model.weights(), limits, kDevice,
                                             std::make_unique<CountingMatMul>(num_rows));
  const SamplingParams greedy{.temperature = 0.0f};
  for (const std::vector<int>& asked : {std::vector<int>{}, {39}, {3, 17, 39}}) {
    Batch batch;
    for (int i = 0; i < 40; ++i) {
      batch.token_ids.push_back(i);
      batch.positions.push_back(i);
      batch.slot_mapping.push_back(i);
    }
    batch.query_start.push_back(40);
    batch.block_ids = {0, 1, 2};
    batch.block_start.push_back(3);
    batch.kv_lens.push_back(40);
    for (const int row : asked) batch.results.push_back({.token_row = row, .params = &greedy});
    num_rows = 0;
    ASSERT_TRUE(runner->Submit(batch).ok());
    ASSERT_TRUE(runner->Collect().ok());
    EXPECT_EQ(num_rows, static_cast<int>(asked.size()));
  }
}

TEST(CudaMemoryTest, RecordedStepsServeEveryBatchWithLittlePadding) {
  for (const int most : {1, 2, 3, 5, 16, 17, 64, 100, 256, 300}) {
    const std::vector<int> sizes = CudaOps::RecordedSizes(most);
    EXPECT_EQ(sizes.front(), 1);
    EXPECT_EQ(sizes.back(), most);
    EXPECT_TRUE(std::is_sorted(sizes.begin(), sizes.end(), std::less_equal<>()));
    EXPECT_LE(sizes.size(), 30u) << "each takes memory and time to record";
    for (int batch = 1; batch <= most; ++batch) {
      const int size = *std::lower_bound(sizes.begin(), sizes.end(), batch), padding = size - batch;
      EXPECT_LE(padding, size <= 16 ? 3 : size <= 64 ? size / 3 : size / 5) << batch << " of " << most;
    }
  }
}

// Calls into CUDA that a step of `rows` single tokens makes.
int CallsOfAStep(ModelRunner& runner, int rows) {
  const SamplingParams greedy{.temperature = 0.0f};
  Batch batch;
  for (int s = 0; s < rows; ++s) {
    batch.token_ids.push_back(s);
    batch.positions.push_back(0);
    batch.slot_mapping.push_back(16 * s);
    batch.query_start.push_back(s + 1);
    batch.block_ids.push_back(s);
    batch.block_start.push_back(s + 1);
    batch.kv_lens.push_back(1);
    batch.results.push_back({.token_row = s, .sequence = s, .params = &greedy});
  }
  emulation::FailCall(0, cudaSuccess, false);
  EXPECT_TRUE(runner.Submit(batch).ok());
  EXPECT_TRUE(runner.Collect().ok());
  return emulation::NumCalls();
}

TEST(CudaMemoryTest, ADecodeStepIsOneReplayWhateverItsSizeAndTheModelsDepth) {
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 8, .max_num_sequences = 6, .max_num_tokens = 8, .max_context_tokens = 64};
  NemotronConfig config = CudaConfig();
  const RandomModel shallow(config, DType::kBf16, 1);
  config.num_layers += 3;
  const RandomModel deep(config, DType::kBf16, 1);
  const auto first = MakeCuda(shallow, limits), second = MakeCuda(deep, limits);
  const int calls = CallsOfAStep(*first, 1);
  for (const int rows : {2, 3, 5, 6}) EXPECT_EQ(CallsOfAStep(*first, rows), calls) << rows << " rows";
  for (const int rows : {1, 5}) EXPECT_EQ(CallsOfAStep(*second, rows), calls) << rows << " rows, deeper";
}

TEST(CudaMemoryTest, NothingIsAllocatedOnceReady) {
  const RandomModel model(CudaConfig(), DType::kBf16, 1);
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 16, .max_num_sequences = 2, .max_num_tokens = 64, .max_context_tokens = 128};
  const auto runner = MakeCuda(model, limits);
  const emulation::LiveObjects ready = emulation::CountLiveObjects();
  Score(*runner, std::vector<TokenId>(50, 7), {});
  Score(*runner, {3}, {});  // a recorded step
  EXPECT_EQ(emulation::CountLiveObjects(), ready);
}
#endif

}  // namespace
}  // namespace minitron::engine::cuda
