#include "engine/cpu/cpu_topology.h"

#include <filesystem>
#include <string>

#include "gtest/gtest.h"
#include "tests/engine/model_files.h"

namespace minitron::engine::cpu {
namespace {

void AddCpu(const testing::TempDir& dir, int cpu, int package, int core) {
  const std::string topology = "cpu" + std::to_string(cpu) + "/topology";
  std::filesystem::create_directories(dir.File(topology));
  dir.Write(topology + "/physical_package_id", std::to_string(package) + "\n");
  dir.Write(topology + "/core_id", std::to_string(core) + "\n");
}

TEST(CpuTopology, HyperThreadsOfACoreCountOnce) {
  const testing::TempDir dir;
  for (int cpu = 0; cpu < 8; ++cpu) AddCpu(dir, cpu, 0, cpu % 4);
  EXPECT_EQ(CountPhysicalCores({0, 1, 2, 3, 4, 5, 6, 7}, dir.path()), 4);
  EXPECT_EQ(CountPhysicalCores({0, 4}, dir.path()), 1);
  EXPECT_EQ(CountPhysicalCores({1, 4}, dir.path()), 2);
}

TEST(CpuTopology, CoresOfTwoPackagesAreDifferent) {
  const testing::TempDir dir;
  for (int cpu = 0; cpu < 4; ++cpu) AddCpu(dir, cpu, cpu / 2, cpu % 2);
  EXPECT_EQ(CountPhysicalCores({0, 1, 2, 3}, dir.path()), 4);
}

TEST(CpuTopology, WithoutTopologyEveryThreadIsACore) {
  const testing::TempDir dir;
  EXPECT_EQ(CountPhysicalCores({0, 1, 5}, dir.path()), 3);
  EXPECT_EQ(CountPhysicalCores({}, dir.path()), 0);
}

TEST(CpuTopology, QuotaIsRoundedUpAndMaxIsNone) {
  EXPECT_EQ(QuotaCpus("200000 100000"), 2);
  EXPECT_EQ(QuotaCpus("150000 100000"), 2);
  EXPECT_EQ(QuotaCpus("1000 100000"), 1);
  EXPECT_EQ(QuotaCpus("max 100000"), 0);
  EXPECT_EQ(QuotaCpus(""), 0);
  EXPECT_EQ(QuotaCpus("5 0"), 0);
}

TEST(CpuTopology, ThisMachineHasACore) { EXPECT_GE(NumUsableCores(), 1); }

}  // namespace
}  // namespace minitron::engine::cpu
