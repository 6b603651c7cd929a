#include "engine/cpu/cpu_topology.h"

#include <filesystem>
#include <string>
#include <vector>

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

void AddNode(const testing::TempDir& dir, int node, const std::string& cpulist) {
  std::filesystem::create_directories(dir.File("node" + std::to_string(node)));
  dir.Write("node" + std::to_string(node) + "/cpulist", cpulist + "\n");
}

using Lists = std::vector<std::vector<int>>;

TEST(CpuTopology, CpusAreGroupedByTheirMemoryNode) {
  const testing::TempDir dir;
  AddNode(dir, 10, "6");
  AddNode(dir, 0, "0-1,4-5");
  AddNode(dir, 1, "2-3");
  AddNode(dir, 2, "");  // memory without CPUs
  std::filesystem::create_directories(dir.File("power"));
  EXPECT_EQ(CpusByNode({0, 1, 2, 3, 4, 5, 6}, dir.path()), (Lists{{0, 1, 4, 5}, {2, 3}, {6}}));
  EXPECT_EQ(CpusByNode({1, 5}, dir.path()), (Lists{{1, 5}}));
  EXPECT_EQ(CpusByNode({7}, dir.path()), Lists{});
  EXPECT_EQ(CpusByNode({0}, dir.File("absent")), Lists{});
}

TEST(CpuTopology, ThreadsAreSharedOutToNodesInProportionAndNeighboursStayTogether) {
  const std::vector<int> a = {0, 1, 2, 3}, b = {4, 5}, c = {6, 7};
  EXPECT_EQ(ThreadCpus(8, {a, b, c}), (Lists{a, a, a, a, b, b, c, c}));
  EXPECT_EQ(ThreadCpus(4, {a, b, c}), (Lists{a, a, b, c}));
  EXPECT_EQ(ThreadCpus(2, {b, c}), (Lists{b, c}));
  EXPECT_EQ(ThreadCpus(1, {a, b}), Lists{a});
  EXPECT_EQ(ThreadCpus(3, {{0}, {1}}), (Lists{{0}, {1}, {1}}));
}

TEST(CpuTopology, OnOneNodeThreadsGoWhereTheKernelPutsThem) {
  EXPECT_EQ(ThreadCpus(4, {{0, 1, 2, 3}}), Lists{});
  EXPECT_EQ(ThreadCpus(4, {}), Lists{});
}

TEST(CpuTopology, ThisMachineHasACore) { EXPECT_GE(NumUsableCores(), 1); }

}  // namespace
}  // namespace minitron::engine::cpu
