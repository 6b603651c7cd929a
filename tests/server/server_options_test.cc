#include "server/server_options.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>

namespace minitron::server {
namespace {

std::string ErrorOf(const std::vector<std::string>& arguments) {
  return std::string(ParseServerOptions(arguments).status().message());
}

TEST(ServerOptionsTest, BothSpellingsAndSwitchesWork) {
  const auto options = ParseServerOptions(
      {"--port=0", "--metrics-port", "9999", "--no-reflection", "--add-bos", "--drain-timeout=1.5", "--model", "/m"});
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->port, 0);
  EXPECT_EQ(options->metrics_port, 9999);
  EXPECT_FALSE(options->reflection);
  EXPECT_TRUE(options->add_bos);
  EXPECT_EQ(options->drain_timeout_s, 1.5);
  EXPECT_EQ(options->model, "/m");
}

TEST(ServerOptionsTest, ErrorsNameFlagValueAndLimitInOneLine) {
  EXPECT_EQ(ErrorOf({"--port=65536"}), "--port=65536: outside [0, 65535]");
  EXPECT_EQ(ErrorOf({"--port=-1"}), "--port=-1: outside [0, 65535]");
  EXPECT_EQ(ErrorOf({"--port=12x"}), "--port=12x: not an integer in [0, 65535]");
  EXPECT_EQ(ErrorOf({"--port=99999999999"}), "--port=99999999999: not an integer in [0, 65535]");
  EXPECT_EQ(ErrorOf({"--drain-timeout=nan"}), "--drain-timeout=nan: not a number in [0, 86400]");
  EXPECT_EQ(ErrorOf({"--block-size=24"}), "--block-size=24: not a power of two in [8, 256]");
  EXPECT_EQ(ErrorOf({"--backend=tpu"}), "--backend=tpu: not one of auto, cpu, cuda");
  EXPECT_EQ(ErrorOf({"--prefix-cache=on"}), "--prefix-cache=on: not one of off, tenant, shared");
  EXPECT_EQ(ErrorOf({"--admission-mode=greedy"}), "--admission-mode=greedy: not one of optimistic, reserve");
  EXPECT_EQ(ErrorOf({"--overlap=2"}), "--overlap=2: not one of auto, on, off");
  EXPECT_EQ(ErrorOf({"--quantize=int2"}), "--quantize=int2: not one of none, int8, int4, fp8, fp8-dynamic");
  EXPECT_EQ(ErrorOf({"--kv-cache-dtype=fp16"}), "--kv-cache-dtype=fp16: not one of bf16, fp32, fp8");
  EXPECT_EQ(ErrorOf({"--activation-dtype=int8"}), "--activation-dtype=int8: not one of auto, fp32, bf16");
  EXPECT_EQ(ErrorOf({"--reflection=maybe"}), "--reflection=maybe: not true or false");
  EXPECT_EQ(ErrorOf({"--nonsense"}), "unknown flag --nonsense; see --help");
  EXPECT_EQ(ErrorOf({"--no-port"}), "unknown flag --no-port; see --help");
  EXPECT_EQ(ErrorOf({"--port"}), "--port needs a value");
  EXPECT_EQ(ErrorOf({"model"}), "\"model\" is not a flag; see --help");
  EXPECT_EQ(ErrorOf({"--model="}), "--model=: is empty");
}

TEST(ServerOptionsTest, ActivationTypesAreTheEngines) {
  const auto type = [](const std::string& name) {
    return ParseServerOptions({"--model=m", "--activation-dtype=" + name})->activation_type();
  };
  EXPECT_EQ(ParseServerOptions({"--model=m"})->activation_type(), engine::ActivationType::kAuto);
  EXPECT_EQ(type("auto"), engine::ActivationType::kAuto);
  EXPECT_EQ(type("fp32"), engine::ActivationType::kF32);
  EXPECT_EQ(type("bf16"), engine::ActivationType::kBf16);
}

class LayersTest : public ::testing::Test {
 protected:
  void SetUp() override { Write(R"({"port": 1001, "threads": 3, "reflection": false, "host": "::1"})"); }
  void TearDown() override { std::remove(path_.c_str()); }
  void Write(const std::string& json) { std::ofstream(path_, std::ios::trunc) << json; }
  std::string ErrorIn(const std::string& json) {
    Write(json);
    return ErrorOf({"--config=" + path_});
  }
  const std::string path_ = ::testing::TempDir() + "/options.json";
};

TEST_F(LayersTest, FlagsCountBeforeTheEnvironmentAndThatBeforeTheFile) {
  const auto options = ParseServerOptions(
      {"--port=1003"}, {"MINITRON_SERVER_PORT=1002", "MINITRON_SERVER_THREADS=2", "PATH=/bin",
                        "MINITRON_SERVER_CONFIG=" + path_, "MINITRON_SERVER=host:1", "MINITRON_SERVER_CHANNELZ=true"});
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->port, 1003);
  EXPECT_EQ(options->threads, 2);
  EXPECT_EQ(options->host, "::1");
  EXPECT_FALSE(options->reflection);
  EXPECT_TRUE(options->channelz);
  EXPECT_EQ(options->sources.at("port"), "flag");
  EXPECT_EQ(options->sources.at("threads"), "environment");
  EXPECT_EQ(options->sources.at("host"), "file");
  EXPECT_EQ(options->sources.count("block-size"), 0u);
}

TEST_F(LayersTest, UnknownNamesAreRefusedEverywhere) {
  EXPECT_EQ(ErrorIn(R"({"prot": 1})"), path_ + ": prot: unknown key; see --help");
  EXPECT_EQ(ErrorIn(R"({"config": "other.json"})"), path_ + ": config: unknown key; see --help");
  EXPECT_EQ(ParseServerOptions({}, {"MINITRON_SERVER_PROT=1"}).status().message(),
            "unknown variable MINITRON_SERVER_PROT; see --help");
}

TEST_F(LayersTest, ErrorsSayWhereTheValueIs) {
  EXPECT_EQ(ErrorIn(R"({"port": 70000})"), path_ + ": port=70000: outside [0, 65535]");
  EXPECT_EQ(ErrorIn(R"({"port": true})"), path_ + ": port=true: not an integer in [0, 65535]");
  EXPECT_EQ(ErrorIn("[]"), path_ + ": not a JSON object");
  EXPECT_EQ(ErrorOf({"--config=/nonexistent.json"}), "/nonexistent.json: cannot be read");
  EXPECT_EQ(ParseServerOptions({}, {"MINITRON_SERVER_PORT=x"}).status().message(),
            "MINITRON_SERVER_PORT=x: not an integer in [0, 65535]");
}

TEST_F(LayersTest, WhatWasGivenIsDescribedWithItsSource) {
  const auto options = ParseServerOptions({"--port=5"}, {"MINITRON_SERVER_BACKEND=cpu"});
  ASSERT_TRUE(options.ok());
  const base::LogFields expected = {{"port", "5 (flag)"}, {"backend", "cpu (environment)"}};
  EXPECT_EQ(DescribeOptions(*options), expected);
}

TEST(ServerOptionsTest, OptionsThatNeedEachOtherAreCheckedTogether) {
  EXPECT_EQ(ErrorOf({"--tls-cert=a"}), "--tls-cert and --tls-key: one without the other");
  EXPECT_EQ(ErrorOf({"--tls-client-ca=a"}), "--tls-client-ca needs --tls-cert and --tls-key");
  for (const std::string& digest : {std::string(63, 'a'), std::string(64, 'A'), std::string(63, 'a') + "g"}) {
    EXPECT_EQ(ErrorOf({"--tokenizer-sha256=" + digest}),
              "--tokenizer-sha256=" + digest + ": not 64 lower-case hex digits");
  }
  EXPECT_EQ(ErrorOf({"--tokenizer-sha256=" + std::string(64, 'a')}), "");
  EXPECT_EQ(ErrorOf({"--log-format=xml"}), "--log-format=xml: not one of text, json");
  EXPECT_EQ(ErrorOf({"--metrics-compat=tgi"}), "--metrics-compat=tgi: not one of none, vllm");
  EXPECT_EQ(ErrorOf({"--health-port=50051"}), "--health-port=50051: the same as another port");
}

TEST(ServerOptionsTest, HelpNamesEveryDefault) {
  const std::string help = ServerOptionsHelp();
  EXPECT_NE(help.find("--port=50051"), std::string::npos);
  EXPECT_NE(help.find("--write-stall-timeout=30"), std::string::npos);
}

}  // namespace
}  // namespace minitron::server
