// Weights in E4M3: quantized when loaded or already on disk, multiplied as they are or widened; and who is refused.
#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/cpu/cpu_model_runner.h"
#include "engine/cuda/cuda_model_runner.h"
#include "engine/cuda/device_weights.h"
#include "engine/cuda/quantized_weights.h"
#include "gtest/gtest.h"
#include "tests/engine/cuda/runner_fixture.h"

namespace minitron::engine::cuda {
namespace {

constexpr RunnerLimits kLimits{
    .block_size = 16, .num_kv_blocks = 16, .max_num_sequences = 2, .max_num_tokens = 128, .max_context_tokens = 128};

// A model's matrices as a checkpoint in E4M3 has them, and as what they then are, in fp32.
class Fp8Checkpoint {
 public:
  explicit Fp8Checkpoint(const NemotronWeights& source, bool head) : codes_(source), values_(source) {
    for (size_t layer = 0; layer < source.layers.size(); ++layer) {
      for (WeightView LayerWeights::*matrix :
           {&LayerWeights::q_proj, &LayerWeights::k_proj, &LayerWeights::v_proj, &LayerWeights::o_proj,
            &LayerWeights::up_proj, &LayerWeights::down_proj}) {
        Quantize(codes_.layers[layer].*matrix, values_.layers[layer].*matrix);
      }
    }
    if (head) Quantize(codes_.lm_head, values_.lm_head);
  }
  const NemotronWeights& codes() const { return codes_; }
  const NemotronWeights& values() const { return values_; }

 private:
  void Quantize(WeightView& codes, WeightView& values) {
    std::vector<float> numbers(codes.size());
    ConvertToFloat(codes, 0, codes.size(), numbers.data());
    std::vector<uint8_t>& bytes = bytes_.emplace_back(codes.size());
    std::vector<float>& scales = floats_.emplace_back(codes.rows);
    for (int64_t row = 0; row < codes.rows; ++row) {
      scales[row] = QuantizeE4m3Row(&numbers[row * codes.cols], codes.cols, &bytes[row * codes.cols]);
    }
    codes = {bytes.data(), DType::kE4m3, codes.rows, codes.cols, scales.data()};
    std::vector<float>& widened = floats_.emplace_back(codes.size());
    ConvertToFloat(codes, 0, codes.size(), widened.data());
    values = {widened.data(), DType::kF32, codes.rows, codes.cols};
  }

  NemotronWeights codes_, values_;
  std::deque<std::vector<uint8_t>> bytes_;
  std::deque<std::vector<float>> floats_;
};

std::unique_ptr<ModelRunner> Make(const NemotronConfig& config, const NemotronWeights& weights,
                                  Quantization quantization) {
  auto runner = CreateCudaModelRunner(config, weights, kLimits, kDevice, MakeMatMul(), {quantization});
  EXPECT_TRUE(runner.ok()) << runner.status();
  return *std::move(runner);
}

std::vector<double> Logprobs(ModelRunner& runner) {
  std::vector<TokenId> prompt;
  for (int i = 0; i < 100; ++i) prompt.push_back(i * 37 % 131);
  const SamplingParams greedy{.temperature = 0.0f};
  const StepResult result = Score(runner, prompt, greedy);
  std::vector<double> logprobs;
  for (const ResultRowOutput& row : result.rows) logprobs.push_back(row.chosen.logprob);
  return logprobs;
}

double MeanDifference(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::abs(a[i] - b[i]);
  return sum / static_cast<double>(a.size());
}

TEST(CudaFp8Test, ACheckpointInFp8GivesTheBitsOfQuantizingWhenLoaded) {
  const RandomModel model(CudaConfig(), DType::kBf16, 21);
  const Fp8Checkpoint checkpoint(model.weights(), false);
  const auto loaded = Make(model.config(), model.weights(), Quantization::kFp8Dynamic);
  const auto stored = Make(model.config(), checkpoint.codes(), Quantization::kFp8Dynamic);
  EXPECT_EQ(Logprobs(*loaded), Logprobs(*stored));
  EXPECT_EQ(stored->model_info().weight_type, "fp8");
}

// As loaded: the codes stay, activations are bf16. Any other format is made of what the codes stand for.
TEST(CudaFp8Test, AnFp8CheckpointIsServedInAnyFormatAndItsCodesAreKept) {
  const RandomModel model(CudaConfig(), DType::kBf16, 22);
  const Fp8Checkpoint checkpoint(model.weights(), true);
  const auto cpu = cpu::CreateCpuModelRunner(model.config(), checkpoint.values(), nullptr, kLimits, 1);
  const std::vector<double> expected = Logprobs(*cpu);
  const auto kept = Make(model.config(), checkpoint.codes(), Quantization::kOff);
  EXPECT_EQ(kept->model_info().weight_type, "fp8");
  EXPECT_LT(MeanDifference(Logprobs(*kept), expected), 0.05) << "no more than bf16 activations cost";
  for (const Quantization quantization : {Quantization::kInt8, Quantization::kFp8, Quantization::kFp8Dynamic}) {
    const auto runner = Make(model.config(), checkpoint.codes(), quantization);
    EXPECT_LT(MeanDifference(Logprobs(*runner), expected), 0.15) << static_cast<int>(quantization);
  }
}

TEST(CudaFp8Test, DynamicFp8KeepsTheSameBitsInAnySchedule) {
  const std::vector<Job> jobs = RandomJobs(43, 4, 50);
  const auto run = [&jobs](const Schedule& schedule) {
    const auto make = [](const RandomModel& model, const RunnerLimits& limits) {
      return MakeQuantized(model, limits, Quantization::kFp8Dynamic);
    };
    return Driver(jobs, schedule, CudaConfig(), make).Run();
  };
  const std::vector<Trace> alone = run({});
  ExpectSame(alone, run({.max_running = kMaxSequences}), "batched");
  ExpectSame(alone, run({.max_running = 3, .max_chunk = 9, .seed = 2, .overlap = true}), "chunked");
}

TEST(CudaFp8Test, ACodeThatIsNoNumberFailsTheRequestWhereCodesAreKept) {
  const RandomModel model(CudaConfig(), DType::kBf16, 23);
  const Fp8Checkpoint checkpoint(model.weights(), false);
  NemotronWeights weights = checkpoint.codes();
  WeightView& view = weights.layers[1].up_proj;
  std::vector<uint8_t> codes(static_cast<const uint8_t*>(view.data),
                             static_cast<const uint8_t*>(view.data) + view.size());
  codes[7] = 0x7F;
  view.data = codes.data();
  for (const Quantization quantization : {Quantization::kOff, Quantization::kFp8Dynamic}) {
    const auto runner = Make(model.config(), weights, quantization);
    for (const ResultRowOutput& row : Score(*runner, {1, 2, 3}, {.temperature = 0.0f}).rows) EXPECT_TRUE(row.failed);
  }
}

TEST(CudaFp8Test, DevicesWithoutFp8ProductsAreRefused) {
  const RandomModel model(CudaConfig(), DType::kBf16, 1);
  const DeviceInfo older{.compute_capability = 80, .num_processors = 2};
  const auto runner =
      CreateCudaModelRunner(model.config(), model.weights(), kLimits, older, MakeMatMul(), {Quantization::kFp8Dynamic});
  EXPECT_EQ(runner.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(runner.status().message(),
            "quantization fp8-dynamic needs compute capability 8.9 for products in fp8, device 0 has 8.0; "
            "quantization fp8 has weights of the same size");
}

// A library without such products, as one before 12 or on a device it has none for.
class NoFp8MatMul final : public MatMul {
 public:
  absl::Status Run(const Bf16*, const Bf16*, int, int, int, Store, Bf16*, cudaStream_t) override { return {}; }
  absl::Status Run(const Bf16*, const Bf16*, int, int, int, float*, cudaStream_t) override { return {}; }
  absl::Status Run(const Fp8Matrix&, const Fp8Matrix&, int, int, int, Store, Bf16*, cudaStream_t) override {
    return {};
  }
  absl::StatusOr<Fp8Rows> RowsForFp8(int, int) override { return Fp8Rows{}; }
  absl::Status PrepareFp8(int, int, int) override { return absl::FailedPreconditionError("no product in fp8"); }
  int64_t workspace_bytes() const override { return 0; }
};

TEST(CudaFp8Test, LibrariesWithoutFp8ProductsAreRefused) {
  const RandomModel model(CudaConfig(), DType::kBf16, 1);
  const auto runner = CreateCudaModelRunner(model.config(), model.weights(), kLimits, kDevice,
                                            std::make_unique<NoFp8MatMul>(), {Quantization::kFp8Dynamic});
  EXPECT_EQ(runner.status(), absl::FailedPreconditionError("no product in fp8"));
}

}  // namespace
}  // namespace minitron::engine::cuda
