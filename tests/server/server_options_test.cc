#include "server/server_options.h"

#include <gtest/gtest.h>

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
  EXPECT_EQ(ErrorOf({"--quantize=int2"}), "--quantize=int2: not one of none, int8, int4");
  EXPECT_EQ(ErrorOf({"--reflection=maybe"}), "--reflection=maybe: not true or false");
  EXPECT_EQ(ErrorOf({"--nonsense"}), "unknown flag --nonsense; see --help");
  EXPECT_EQ(ErrorOf({"--no-port"}), "unknown flag --no-port; see --help");
  EXPECT_EQ(ErrorOf({"--port"}), "--port needs a value");
  EXPECT_EQ(ErrorOf({"model"}), "\"model\" is not a flag; see --help");
  EXPECT_EQ(ErrorOf({"--model="}), "--model=: is empty");
}

TEST(ServerOptionsTest, HelpNamesEveryDefault) {
  const std::string help = ServerOptionsHelp();
  EXPECT_NE(help.find("--port=50051"), std::string::npos);
  EXPECT_NE(help.find("--write-stall-timeout=30"), std::string::npos);
}

}  // namespace
}  // namespace minitron::server
