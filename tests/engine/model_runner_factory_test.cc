// CreateModelRunner: options checked, cache sized, the shipped model loads and generates.
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/base/check.h"
#include "engine/cpu/amx_matmul.h"
#include "engine/cpu/cpu_model_runner.h"
#include "engine/cpu/panel_matmul.h"
#include "engine/model_runner.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "tests/engine/targets.h"

namespace minitron::engine {
namespace {

using testing::HasSubstr;

EngineOptions TinyOptions() {
  EngineOptions options;
  options.model_dir = std::string(MINITRON_SOURCE_DIR) + "/deploy/models/minitron-tiny";
  options.num_threads = 2;
  return options;
}

void ExpectError(const EngineOptions& options, absl::StatusCode code, const std::string& words) {
  const auto runner = CreateModelRunner(options);
  ASSERT_FALSE(runner.ok()) << words;
  EXPECT_EQ(runner.status().code(), code) << runner.status();
  EXPECT_THAT(std::string(runner.status().message()), HasSubstr(words));
}

TEST(ModelRunnerFactoryTest, LoadsTheShippedModelAndSaysWhatItIs) {
  const auto runner = CreateModelRunner(TinyOptions());
  ASSERT_TRUE(runner.ok()) << runner.status();
  const ModelInfo& info = (*runner)->model_info();
  EXPECT_EQ(info.architecture, "nemotron");
  EXPECT_EQ(info.backend, "cpu");
  EXPECT_EQ(info.weight_type, "bf16");
  EXPECT_EQ(info.vocab_size, 2048);
  EXPECT_EQ(info.head_dim, 64);
  EXPECT_EQ(info.max_context_tokens, 1024);
  EXPECT_EQ(info.weight_bytes, 2 * info.num_parameters);
  EXPECT_EQ(info.kv_bytes_per_token, 2 * 6 * 2 * 64 * 2);  // k and v, layers, kv heads, dims, bf16
  EXPECT_EQ((*runner)->block_size(), 16);
  EXPECT_EQ((*runner)->max_num_tokens(), 512);
}

TEST(ModelRunnerFactoryTest, QuantizedWeightsSayWhatTheyAreAndTakeTheirBits) {
  EngineOptions options = TinyOptions();
  const int64_t parameters = (*CreateModelRunner(options))->model_info().num_parameters;
  const int64_t embedding = 2048 * 192;  // stays bf16
  for (const auto& [quantization, name, bits] :
       {std::tuple{Quantization::kInt8, "int8", 8.25}, std::tuple{Quantization::kInt4, "int4", 4.5}}) {
    options.quantization = quantization;
    const auto runner = CreateModelRunner(options);
    ASSERT_TRUE(runner.ok()) << runner.status();
    const ModelInfo& info = (*runner)->model_info();
    EXPECT_EQ(info.weight_type, name);
    EXPECT_EQ(info.num_parameters, parameters);
    // The head is int8 in either mode: 2048 * 192 weights.
    const double expected = (parameters - 2 * embedding) * bits / 8 + embedding * 8.25 / 8 + embedding * 2.0;
    EXPECT_NEAR(static_cast<double>(info.weight_bytes), expected, 0.01 * expected);
  }
}

TEST(ModelRunnerFactoryTest, Fp32KeysAndValuesTakeTwiceTheMemory) {
  EngineOptions options = TinyOptions();
  options.kv_cache_type = KvCacheType::kF32;
  EXPECT_EQ((*CreateModelRunner(options))->model_info().kv_bytes_per_token, 2 * 6 * 2 * 64 * 4);
}

// The chosen token's logprob after a prompt of three tokens.
float LogprobWith(Quantization quantization, ActivationType rows) {
  EngineOptions options = TinyOptions();
  options.quantization = quantization;
  options.activation_type = rows;
  const auto runner = CreateModelRunner(options).value();
  SamplingParams params;
  params.temperature = 0.0f;
  Batch batch;
  batch.token_ids = {5, 700, 31};
  batch.positions = {0, 1, 2};
  batch.slot_mapping = {0, 1, 2};
  batch.query_start.push_back(3);
  batch.block_ids = {0};
  batch.block_start.push_back(1);
  batch.kv_lens = {3};
  batch.results = {{.token_row = 2, .num_top_logprobs = 0, .params = &params}};
  CHECK(runner->Submit(batch).ok());
  return runner->Collect()->rows[0].chosen.logprob;
}

TEST(ModelRunnerFactoryTest, RowsAreRoundedIfAskedForWithBf16WeightsOnly) {
  const auto both = [](Quantization quantization) {
    return std::pair(LogprobWith(quantization, ActivationType::kF32), LogprobWith(quantization, ActivationType::kBf16));
  };
  const auto [exact, rounded] = both(Quantization::kOff);
  EXPECT_NE(exact, rounded);
  EXPECT_NEAR(exact, rounded, 0.05f);  // rounding moves a logit by 0.07 at most over 2,048 tokens (quality test)
  for (const Quantization quantization : {Quantization::kInt8, Quantization::kInt4}) {
    const auto [one, other] = both(quantization);
    EXPECT_EQ(one, other);
  }
}

TEST(ModelRunnerFactoryTest, WhatOnlyTheCpuHasIsRefusedByCudaAndTakesAutoToTheCpu) {
  for (const bool wide_cache : {false, true}) {
    EngineOptions options = TinyOptions();
    if (wide_cache) options.kv_cache_type = KvCacheType::kF32;
    if (!wide_cache) options.activation_type = ActivationType::kF32;
    EXPECT_EQ((*CreateModelRunner(options))->model_info().backend, "cpu");
    options.backend = Backend::kCuda;
    const absl::Status status = CreateModelRunner(options).status();
    const bool without_cuda = absl::IsUnimplemented(status);  // how the engine was built
    EXPECT_TRUE(without_cuda || absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()),
                HasSubstr(without_cuda ? "no CUDA backend" : "fp32 is for the cpu backend"));
  }
}

TEST(ModelRunnerFactoryTest, RowsAreRoundedUnaskedOnlyWhereTheProcessorMultipliesBf16) {
  ForEachTarget([](int64_t target) {
    const ActivationType chosen = cpu::ChooseActivationType(ActivationType::kAuto);
    EXPECT_NE(chosen, ActivationType::kAuto);
    if (target != HWY_AVX3_DL) {
      EXPECT_EQ(chosen, ActivationType::kF32);
    }
    EXPECT_EQ(chosen == ActivationType::kBf16, cpu::AmxUsable() || cpu::Bf16ProductsUsable());
    EXPECT_EQ(cpu::ChooseActivationType(ActivationType::kF32), ActivationType::kF32);
    EXPECT_EQ(cpu::ChooseActivationType(ActivationType::kBf16), ActivationType::kBf16);
  });
}

TEST(ModelRunnerFactoryTest, Fp8KeysAndValuesAreRefusedByTheCpu) {
  EngineOptions options = TinyOptions();
  options.backend = Backend::kCpu;
  options.kv_cache_type = KvCacheType::kFp8;
  const absl::Status status = CreateModelRunner(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "kv_cache_type fp8 is for the cuda backend");
}

TEST(ModelRunnerFactoryTest, Fp8WeightsAreRefusedByTheCpu) {
  EngineOptions options = TinyOptions();
  options.backend = Backend::kCpu;
  options.quantization = Quantization::kFp8;
  EXPECT_EQ(CreateModelRunner(options).status(),
            absl::InvalidArgumentError("quantization fp8 is for the cuda backend"));
  options.quantization = Quantization::kFp8Dynamic;
  EXPECT_EQ(CreateModelRunner(options).status(),
            absl::InvalidArgumentError("quantization fp8-dynamic is for the cuda backend"));
}

TEST(ModelRunnerFactoryTest, CacheHoldsEveryFullContextOfASmallModel) {
  EngineOptions options = TinyOptions();
  options.max_num_sequences = 3;
  options.max_context_tokens = 100;
  const auto runner = CreateModelRunner(options);
  ASSERT_TRUE(runner.ok()) << runner.status();
  EXPECT_EQ((*runner)->num_kv_blocks(), 3 * 7);  // ceil(100 / 16) each
}

TEST(ModelRunnerFactoryTest, ExplicitCacheSizeIsTakenAsItIs) {
  EngineOptions options = TinyOptions();
  options.kv_cache_bytes = int64_t{3072} * 16 * 5 + 1;
  const auto runner = CreateModelRunner(options);
  ASSERT_TRUE(runner.ok()) << runner.status();
  EXPECT_EQ((*runner)->num_kv_blocks(), 5);
}

TEST(ModelRunnerFactoryTest, CacheOfOneBlockIsRefusedWithTheArithmetic) {
  EngineOptions options = TinyOptions();
  options.kv_cache_bytes = 3072 * 16 * 2 - 1;
  ExpectError(options, absl::StatusCode::kResourceExhausted, "98303 bytes hold 1 blocks of 16 tokens * 3072 bytes");
}

TEST(ModelRunnerFactoryTest, CacheBeyondTheMemoryIsRefusedWithTheArithmetic) {
  EngineOptions options = TinyOptions();
  options.kv_cache_bytes = int64_t{1} << 50;
  ExpectError(options, absl::StatusCode::kResourceExhausted, "1024 tokens * 3072 bytes = 3145728 bytes");
}

TEST(ModelRunnerFactoryTest, OptionsOutOfRangeNameValueAndLimit) {
  const auto refuse = [](auto set, const std::string& words) {
    EngineOptions options = TinyOptions();
    set(options);
    ExpectError(options, absl::StatusCode::kInvalidArgument, words);
  };
  refuse([](EngineOptions& o) { o.num_threads = -1; }, "num_threads -1 outside [0, ");
  refuse([](EngineOptions& o) { o.block_size = 4; }, "block_size 4 outside [8, 256]");
  refuse([](EngineOptions& o) { o.block_size = 512; }, "block_size 512 outside [8, 256]");
  refuse([](EngineOptions& o) { o.block_size = 24; }, "block_size 24 is not a power of two");
  refuse([](EngineOptions& o) { o.kv_cache_bytes = -1; }, "kv_cache_bytes -1 outside [0, ");
  refuse([](EngineOptions& o) { o.max_num_sequences = 0; }, "max_num_sequences 0 outside [1, ");
  refuse([](EngineOptions& o) { o.max_num_tokens = 0; }, "max_num_tokens 0 outside [1, ");
  refuse([](EngineOptions& o) { o.max_num_tokens = 63; }, "max_num_tokens 63 below max_num_sequences 64");
  refuse([](EngineOptions& o) { o.max_context_tokens = 1025; }, "max_context_tokens 1025 outside [0, 1024]");
  refuse([](EngineOptions& o) { o.max_context_tokens = -1; }, "max_context_tokens -1 outside [0, 1024]");
  refuse([](EngineOptions& o) { o.model_dir = ""; }, "model_dir is empty");
}

TEST(ModelRunnerFactoryTest, MissingFolderIsNotFound) {
  EngineOptions options = TinyOptions();
  options.model_dir += "-missing";
  ExpectError(options, absl::StatusCode::kNotFound, "minitron-tiny-missing");
}

TEST(ModelRunnerFactoryTest, CudaIsUnimplementedInThisBuild) {
  EngineOptions options = TinyOptions();
  options.backend = Backend::kCuda;
  const auto runner = CreateModelRunner(options);
  if (runner.ok()) {
    EXPECT_EQ((*runner)->model_info().backend, "cuda");
    return;
  }
  // Without a toolkit the backend is not built in; with one, this machine has no device (or no driver for it).
  const bool built_in = runner.status().code() == absl::StatusCode::kFailedPrecondition;
  EXPECT_EQ(runner.status().code(),
            built_in ? absl::StatusCode::kFailedPrecondition : absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(runner.status().message()),
              HasSubstr(built_in ? "cuda: look for a device" : "no CUDA backend"));
}

}  // namespace
}  // namespace minitron::engine
