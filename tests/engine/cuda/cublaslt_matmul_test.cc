// The products through cublasLt, with a library of the tests' own: how it is asked, which algorithm is taken, and what
// is kept of that. Whether the real one is as fast and keeps one order of summation is for a device to show.
#include "engine/cuda/cublaslt_matmul.h"

#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/cuda/kernels.h"
#include "engine/cuda/matmul.h"
#include "engine/cuda/quantized_weights.h"
#include "gtest/gtest.h"
#include "tests/engine/cuda/device_array.h"
#include "tests/engine/cuda/fake_cublaslt.h"
#include "tests/engine/cuda/runner_fixture.h"

namespace minitron::engine::cuda {
namespace {

constexpr int kOuts = 48, kDepth = 64, kMostRows = 80;
constexpr uint32_t kAnyInFp32 = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;

class CublasLtMatMulTest : public testing::Test {
 protected:
  void SetUp() override {
    TheLibrary() = {};
    TheLibrary().algorithms = {
        {.id = 1, .milliseconds = 3}, {.id = 2, .milliseconds = 1}, {.id = 3, .milliseconds = 2}};
    std::remove(file_.c_str());
  }
  void TearDown() override {
    std::remove(file_.c_str());
    EXPECT_EQ(TheLibrary().num_live, 0);
  }

  static std::unique_ptr<MatMul> Make(const CublasLtOptions& options) {
    auto matmul = CreateCublasLtMatMulOver(FakeFunctions(), options);
    EXPECT_TRUE(matmul.ok()) << matmul.status();
    return *std::move(matmul);
  }
  // x * w^T, or that added to what `out` starts as.
  std::vector<Bf16> Multiply(MatMul& matmul, int rows, Store store = Store::kReplace) {
    DeviceArray<Bf16> out(std::vector<Bf16>(rows * kOuts, HostBf16(0.5f)));
    EXPECT_TRUE(matmul.Run(x_.data(), w_.data(), rows, kOuts, kDepth, store, out.data(), TestStream()).ok());
    return out.Get();
  }
  // The algorithm of the last product.
  static uint64_t Last() { return TheLibrary().products.back().algorithm; }

  std::mt19937_64 random_{7};
  const DeviceArray<Bf16> x_{RandomBf16(random_, kMostRows* kDepth)};
  const DeviceArray<Bf16> w_{RandomBf16(random_, kOuts* kDepth)};
  const std::string file_ = testing::TempDir() + "/cublaslt_choices_" + std::to_string(getpid());
};

void ExpectSameBits(const std::vector<Bf16>& actual, const std::vector<Bf16>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) ASSERT_EQ(actual[i].bits, expected[i].bits) << i;
}

TEST_F(CublasLtMatMulTest, ProductsAreWhatTheReferenceGivesAlsoWhereTheyAdd) {
  const auto reference = CreateReferenceMatMul();
  for (const bool invariant : {true, false}) {
    const auto matmul = Make({.batch_invariant = invariant, .tuning_file = {}});
    for (const Store store : {Store::kReplace, Store::kAdd}) {
      for (int repeat = 0; repeat < 2; ++repeat) {  // the first is timed: what it adds to is not added to again
        ExpectSameBits(Multiply(*matmul, 5, store), Multiply(*reference, 5, store));
      }
    }
    DeviceArray<float> logits(3 * kOuts), expected(3 * kOuts);
    ASSERT_TRUE(matmul->Run(x_.data(), w_.data(), 3, kOuts, kDepth, logits.data(), TestStream()).ok());
    ASSERT_TRUE(reference->Run(x_.data(), w_.data(), 3, kOuts, kDepth, expected.data(), TestStream()).ok());
    EXPECT_EQ(logits.Get(), expected.Get());
  }
}

TEST_F(CublasLtMatMulTest, EveryCandidateIsTimedAndTheFastestIsKept) {
  const auto matmul = Make({});
  Multiply(*matmul, 4);
  std::map<uint64_t, int> num_runs;
  for (const auto& product : TheLibrary().products) ++num_runs[product.algorithm];
  EXPECT_EQ(num_runs.size(), 3u);
  for (const auto& [id, runs] : num_runs) EXPECT_GE(runs, 10) << id;
  EXPECT_EQ(Last(), 2u);
  const size_t before = TheLibrary().products.size();
  Multiply(*matmul, 4);
  EXPECT_EQ(TheLibrary().products.size(), before + 1) << "timed once";
  EXPECT_EQ(Last(), 2u);
  EXPECT_EQ(TheLibrary().workspace_bytes, uint64_t{32} << 20);
  EXPECT_EQ(matmul->workspace_bytes(), int64_t{32} << 20);
}

TEST_F(CublasLtMatMulTest, OneAlgorithmServesEveryNumberOfRowsWhereBitsMustNotDependOnThem) {
  const auto matmul = Make({});
  Multiply(*matmul, kMostRows);
  EXPECT_EQ(TheLibrary().asked_rows, std::vector<int>{64}) << "chosen at a full decode step";
  TheLibrary().algorithms[0].milliseconds = 0.1f;
  for (const int rows : {1, 2, 63, 64, 65, kMostRows}) {
    Multiply(*matmul, rows);
    EXPECT_EQ(Last(), 2u) << rows;
  }
  EXPECT_EQ(TheLibrary().asked_rows.size(), 1u);
}

TEST_F(CublasLtMatMulTest, EachNumberOfRowsHasItsOwnAlgorithmWhereBitsMayDependOnThem) {
  const auto matmul = Make({.batch_invariant = false, .tuning_file = {}});
  Multiply(*matmul, 1);
  EXPECT_EQ(Last(), 2u);
  TheLibrary().algorithms[0].milliseconds = 0.1f;
  Multiply(*matmul, 2);
  EXPECT_EQ(Last(), 1u);
  Multiply(*matmul, 1);
  EXPECT_EQ(Last(), 2u);
  EXPECT_EQ(TheLibrary().asked_rows, (std::vector<int>{1, 2}));
}

// In place and in the output's type, partial sums would be rounded to bf16.
TEST_F(CublasLtMatMulTest, SplitSumsAreOffOrInFp32) {
  TheLibrary().algorithms = {
      {.id = 1, .milliseconds = 1, .reduction = CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE, .num_splits = 4},
      {.id = 2, .milliseconds = 2, .reduction = CUBLASLT_REDUCTION_SCHEME_INPLACE, .num_splits = 4},
      {.id = 3, .milliseconds = 3, .reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, .num_splits = 4},
      {.id = 4, .milliseconds = 4}};
  Multiply(*Make({}), 4);
  EXPECT_EQ(TheLibrary().masks.back(), uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE});
  EXPECT_EQ(Last(), 4u);
  Multiply(*Make({.batch_invariant = false, .tuning_file = {}}), 4);
  EXPECT_EQ(TheLibrary().masks.back(), kAnyInFp32);
  EXPECT_EQ(Last(), 3u);
  TheLibrary().algorithms[0].ignores_the_mask = true;
  Multiply(*Make({}), 4);
  EXPECT_EQ(Last(), 4u) << "a split that was named all the same";
}

TEST_F(CublasLtMatMulTest, ACandidateThatFailsIsPassedOver) {
  TheLibrary().algorithms[1].fails = true;
  Multiply(*Make({}), 4);
  EXPECT_EQ(Last(), 3u);
}

TEST_F(CublasLtMatMulTest, NothingIsTimedInsideARecording) {
  const auto matmul = Make({});
  DeviceArray<Bf16> out(kOuts);
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(TestStream(), cudaStreamCaptureModeThreadLocal), cudaSuccess);
  ASSERT_TRUE(matmul->Run(x_.data(), w_.data(), 1, kOuts, kDepth, Store::kReplace, out.data(), TestStream()).ok());
  ASSERT_EQ(cudaStreamEndCapture(TestStream(), &graph), cudaSuccess);
  EXPECT_EQ(TheLibrary().products.size(), 1u);
  EXPECT_EQ(Last(), 1u) << "the library's first guess";
  cudaGraphDestroy(graph);
}

TEST_F(CublasLtMatMulTest, ChoicesAreKeptInAFileForThisDeviceAndVersion) {
  Multiply(*Make({.tuning_file = file_}), 4);
  EXPECT_EQ(Last(), 2u);
  TheLibrary().algorithms[0].milliseconds = 0.1f;  // timed now, another would win
  TheLibrary().products.clear();
  Multiply(*Make({.tuning_file = file_}), 4);
  EXPECT_EQ(TheLibrary().products.size(), 1u) << "not timed again";
  EXPECT_EQ(Last(), 2u);
  TheLibrary().version = 130200;
  Multiply(*Make({.tuning_file = file_}), 4);
  EXPECT_EQ(Last(), 1u) << "another version chooses anew";
  TheLibrary().version = 130100;
  Multiply(*Make({.tuning_file = file_}), 4);
  EXPECT_EQ(Last(), 2u) << "and leaves the first one's choices where they are";
  std::ifstream file(file_);
  std::set<std::string> devices;
  for (std::string line; std::getline(file, line);) devices.insert(line.substr(0, line.find(' ')));
  EXPECT_EQ(devices, (std::set<std::string>{"emulation_cublasLt_130100", "emulation_cublasLt_130200"}));
}

TEST_F(CublasLtMatMulTest, AChoiceTheLibraryRefusesOrAFileThatIsNoneIsMadeAnew) {
  Multiply(*Make({.tuning_file = file_}), 4);
  TheLibrary().algorithms[1].refused = true;
  TheLibrary().algorithms[1].milliseconds = 9;
  Multiply(*Make({.tuning_file = file_}), 4);
  EXPECT_EQ(Last(), 3u);
  std::ofstream(file_) << "emulation_cublasLt_130100 0 48 64\nnonsense\n";
  TheLibrary().products.clear();
  Multiply(*Make({.tuning_file = file_}), 4);
  EXPECT_GT(TheLibrary().products.size(), 20u);
  EXPECT_EQ(Last(), 3u);
  Multiply(*Make({.tuning_file = "/nowhere/at/all"}), 4);  // a warning, no error
}

TEST_F(CublasLtMatMulTest, NoAlgorithmIsAnErrorNotACrash) {
  TheLibrary().algorithms.clear();
  const auto matmul = Make({});
  DeviceArray<Bf16> out(kOuts);
  const absl::Status status =
      matmul->Run(x_.data(), w_.data(), 1, kOuts, kDepth, Store::kReplace, out.data(), TestStream());
  EXPECT_EQ(status, absl::InternalError("cublasLt: no algorithm for a shape"));
}

// The same rows in E4M3 by the reference, by a library that scales rows, and by one that does not.
TEST_F(CublasLtMatMulTest, Fp8ProductsAreTheReferencesWhetherTheLibraryScalesOrNot) {
  constexpr int kRows = 7;
  std::vector<uint8_t> codes(kOuts * kDepth);
  std::vector<float> scales(kOuts), weights(kDepth);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  for (int o = 0; o < kOuts; ++o) {
    for (float& weight : weights) weight = normal(random_);
    scales[o] = QuantizeE4m3Row(weights.data(), kDepth, &codes[o * kDepth]);
  }
  const DeviceArray<uint8_t> device_codes(codes);
  const DeviceArray<float> device_scales(scales);
  const auto run = [&](MatMul& matmul) {
    DeviceArray<Bf16> out(std::vector<Bf16>(kRows * kOuts, HostBf16(0.25f)));
    EXPECT_TRUE(matmul.PrepareFp8(kRows, kOuts, kDepth).ok());
    const Fp8Rows rows = *matmul.RowsForFp8(kRows, kDepth);
    EXPECT_EQ(QuantizeRows(x_.data(), Activation::kNone, kRows, kDepth, rows, TestStream()), cudaSuccess);
    EXPECT_TRUE(matmul
                    .Run({rows.codes, rows.scales}, {device_codes.data(), device_scales.data()}, kRows, kOuts, kDepth,
                         Store::kAdd, out.data(), TestStream())
                    .ok());
    return out.Get();
  };
  const std::vector<Bf16> expected = run(*CreateReferenceMatMul());
  for (const bool row_scales : {true, false}) {
    TheLibrary().has_row_scales = row_scales;
    ExpectSameBits(run(*Make({})), expected);
  }
  TheLibrary().has_fp8 = false;
  const absl::Status status = Make({})->PrepareFp8(kRows, kOuts, kDepth);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(),
            "cublasLt 130100 has no product in fp8 on this device; quantization fp8 has weights of the same size");
}

// What is asked and timed is asked and timed at the start, for prompts of any length too; and the whole runner over the
// library gives the bits it gives over the reference.
TEST_F(CublasLtMatMulTest, EveryChoiceIsMadeBeforeARunnerIsReady) {
  const RandomModel model(CudaConfig(), DType::kBf16, 6);
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 16, .max_num_sequences = 2, .max_num_tokens = 64, .max_context_tokens = 128};
  const auto create = [&](std::unique_ptr<MatMul> matmul, Quantization quantization) {
    auto runner = CreateCudaModelRunner(model.config(), model.weights(), limits, kDevice, std::move(matmul),
                                        {.quantization = quantization});
    EXPECT_TRUE(runner.ok()) << runner.status();
    return *std::move(runner);
  };
  for (const auto& [quantization, row_scales] :
       {std::pair{Quantization::kOff, true}, {Quantization::kFp8Dynamic, true}, {Quantization::kFp8Dynamic, false}}) {
    TheLibrary().has_row_scales = row_scales;
    TheLibrary().masks.clear();
    const auto runner = create(Make({}), quantization), reference = create(CreateReferenceMatMul(), quantization);
    const size_t num_asked = TheLibrary().masks.size();
    EXPECT_GE(num_asked, 5u) << "four matrices of a layer and the head";
    const emulation::LiveObjects ready = emulation::CountLiveObjects();
    for (const int length : {1, 2, 17, 50}) {
      const std::vector<TokenId> prompt(length, 7);
      const StepResult actual = Score(*runner, prompt, {}), expected = Score(*reference, prompt, {});
      ASSERT_EQ(actual.rows.size(), expected.rows.size());
      for (size_t r = 0; r < actual.rows.size(); ++r) {
        EXPECT_EQ(actual.rows[r].token_id, expected.rows[r].token_id);
        EXPECT_EQ(actual.rows[r].chosen, expected.rows[r].chosen);
      }
    }
    EXPECT_EQ(TheLibrary().masks.size(), num_asked);
    EXPECT_EQ(emulation::CountLiveObjects(), ready);
  }
}

}  // namespace
}  // namespace minitron::engine::cuda
