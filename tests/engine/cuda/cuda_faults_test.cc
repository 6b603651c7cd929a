// Every call into CUDA fails once, with every kind of error: the runner ends with a typed status, nothing hangs,
// nothing leaks.
#include <memory>
#include <string>

#include "engine/cuda/cuda_model_runner.h"
#include "engine/cuda/device.h"
#include "gtest/gtest.h"
#include "tests/engine/random_model.h"

namespace minitron::engine::cuda {
namespace {

NemotronConfig TinyConfig() {
  NemotronConfig config = SmallConfig();
  config.vocab_size = 64;
  config.hidden_size = 64;
  config.num_layers = 1;
  config.num_attention_heads = 2;
  config.num_key_value_heads = 1;
  config.head_dim = 64;
  config.rotary_dim = 32;
  config.intermediate_size = 64;
  config.max_position_embeddings = 300;  // two attention chunks
  return config;
}

// Two tokens of one sequence, or one token of each of two, with every kind of sampling.
Batch MakeBatch(bool prompt, const SamplingParams& params) {
  Batch batch;
  batch.token_ids = {1, 2};
  batch.positions = {0, prompt ? 1 : 0};
  batch.slot_mapping = {16, prompt ? 17 : 32};
  batch.query_start = prompt ? std::vector<int32_t>{0, 2} : std::vector<int32_t>{0, 1, 2};
  batch.block_ids = prompt ? std::vector<BlockId>{1} : std::vector<BlockId>{1, 2};
  batch.block_start = prompt ? std::vector<int32_t>{0, 1} : std::vector<int32_t>{0, 1, 2};
  batch.kv_lens = prompt ? std::vector<int32_t>{2} : std::vector<int32_t>{1, 1};
  batch.results = {
      {.token_row = 1, .sequence = prompt ? 0 : 1, .num_top_logprobs = 2, .history_slot = 0, .params = &params}};
  batch.history_resets = {{0, {1, 2}, {3}}};
  return batch;
}

// Start, a prompt and a recorded step under way together, end. Returns the first error. `num_reported` is how many
// calls had been made when the last result was handed over: an error of a call up to there has to be in the status.
absl::Status Live(const RandomModel& model, Quantization quantization, int& num_reported) {
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 4, .max_num_sequences = 2, .max_num_tokens = 4, .max_context_tokens = 300};
  num_reported = 0;
  const SamplingParams params{.top_k = 9, .top_p = 0.9f, .repetition_penalty = 1.2f, .logit_bias = {{3, 1.0f}}};
  const Batch first = MakeBatch(true, params), second = MakeBatch(false, params);
  auto device = OpenDevice();
  if (!device.ok()) return device.status();
  auto runner =
      CreateCudaModelRunner(model.config(), model.weights(), limits, *device, CreateReferenceMatMul(), {quantization});
  if (!runner.ok()) return runner.status();
  absl::Status status = (*runner)->Submit(first);
  if (status.ok()) status = (*runner)->Submit(second);
  if (!status.ok()) return status;
  for (int step = 0; step < 2; ++step) {
    const auto result = (*runner)->Collect();
    if (!result.ok()) return result.status();
    EXPECT_EQ(result->rows.size(), 1u);
  }
  num_reported = emulation::NumCalls();
  return absl::OkStatus();
}

// What may be said of an error before the runner is ready; afterwards it is INTERNAL.
absl::StatusCode CodeAtStart(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return absl::StatusCode::kResourceExhausted;
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorNoKernelImageForDevice:
      return absl::StatusCode::kFailedPrecondition;
    default:
      return absl::StatusCode::kInternal;
  }
}

struct Fault {
  cudaError_t error;
  bool sticky;
  Quantization quantization = Quantization::kOff;
  bool kernels_run = false;
};

class CudaFaultsTest : public testing::TestWithParam<Fault> {};

TEST_P(CudaFaultsTest, AnyCallMayFail) {
  const Fault& fault = GetParam();
  const RandomModel model(TinyConfig(), DType::kBf16, 3);
  const emulation::LiveObjects before = emulation::CountLiveObjects();
  int num_reported = 0;
  emulation::SkipKernels(!fault.kernels_run);
  emulation::FailCall(0, cudaSuccess, false);
  ASSERT_TRUE(Live(model, fault.quantization, num_reported).ok());
  const int num_calls = emulation::NumCalls();
  ASSERT_GT(num_calls, 100);
  int num_errors = 0;
  for (int call = 1; call <= num_calls; ++call) {
    emulation::FailCall(call, fault.error, fault.sticky);
    const absl::Status status = Live(model, fault.quantization, num_reported);
    emulation::FailCall(0, cudaSuccess, false);
    ASSERT_EQ(emulation::CountLiveObjects(), before) << "leaked after call " << call;
    if (status.ok()) {
      // Only what failed behind the last result, or a release on the way, may go unnoticed.
      if (fault.sticky) {
        ASSERT_GT(call, num_reported) << "call " << call << " failed and nobody said so";
      }
      continue;
    }
    ++num_errors;
    EXPECT_TRUE(status.code() == absl::StatusCode::kInternal || status.code() == CodeAtStart(fault.error)) << status;
    EXPECT_NE(status.message().find(cudaGetErrorName(fault.error)), std::string::npos) << status;
  }
  EXPECT_GT(num_errors, num_calls / 2);
  emulation::SkipKernels(false);
}

// Every error at every call, once and for good. What kernels do has no part in it; one error is tried while they run.
std::vector<Fault> Faults() {
  std::vector<Fault> faults;
  for (const cudaError_t error : emulation::AllErrors()) {
    for (const bool sticky : {false, true}) faults.push_back({error, sticky});
  }
  faults.push_back({cudaErrorLaunchFailure, true, Quantization::kFp8Dynamic});
  faults.push_back({cudaErrorMemoryAllocation, false, Quantization::kFp8Dynamic});
  faults.push_back({cudaErrorIllegalAddress, true, Quantization::kOff, true});
  return faults;
}

INSTANTIATE_TEST_SUITE_P(Errors, CudaFaultsTest, testing::ValuesIn(Faults()), [](const auto& fault) {
  return std::string(cudaGetErrorName(fault.param.error)) + (fault.param.sticky ? "Stays" : "Once") +
         (fault.param.quantization == Quantization::kOff ? "" : "Fp8") + (fault.param.kernels_run ? "KernelsRun" : "");
});

TEST(CudaDeviceTest, NoDeviceIsAFailedPrecondition) {
  emulation::SetDevice(size_t{1} << 30, 0);
  EXPECT_EQ(OpenDevice().status().code(), absl::StatusCode::kFailedPrecondition);
  emulation::SetDevice(size_t{1} << 40, 1);
  ASSERT_TRUE(OpenDevice().ok());
  EXPECT_EQ(OpenDevice()->compute_capability, 89);
}

TEST(CudaDeviceTest, DevicesBefore80AreRefusedByName) {
  emulation::SetDevice(size_t{1} << 30, 1, 75);
  const absl::Status older = OpenDevice().status();
  EXPECT_EQ(older.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(older.message(), "cuda: device 0 (emulation) has compute capability 7.5, below 8.0");
  for (const int accepted : {80, 90, 100}) {
    emulation::SetDevice(size_t{1} << 30, 1, accepted);
    ASSERT_TRUE(OpenDevice().ok());
    EXPECT_EQ(OpenDevice()->compute_capability, accepted);
  }
  emulation::SetDevice(size_t{1} << 40, 1);
}

}  // namespace
}  // namespace minitron::engine::cuda
