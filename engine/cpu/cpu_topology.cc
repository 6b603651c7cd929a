#include "engine/cpu/cpu_topology.h"

#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <system_error>
#include <utility>

namespace minitron::engine::cpu {
namespace {

// The hardware threads this process may run on, ascending.
std::vector<int> AllowedCpus() {
  std::vector<int> cpus;
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
  }
  return cpus;
}

// Those of `cpus` that are in the kernel's list `text`: "0-3,8".
std::vector<int> InList(const std::vector<int>& cpus, const std::string& text) {
  std::vector<int> found;
  std::istringstream list(text);
  std::string range;
  while (std::getline(list, range, ',')) {
    int first = 0, last = 0;
    const int fields = std::sscanf(range.c_str(), "%d-%d", &first, &last);
    if (fields < 1) continue;
    if (fields == 1) last = first;
    std::copy_if(cpus.begin(), cpus.end(), std::back_inserter(found),
                 [&](int cpu) { return first <= cpu && cpu <= last; });
  }
  return found;
}

// The nodes below `sys_node_dir`, ascending.
std::vector<int> NodesIn(const std::string& sys_node_dir) {
  std::vector<int> nodes;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(sys_node_dir, ignored)) {
    int node = 0;
    if (std::sscanf(entry.path().filename().c_str(), "node%d", &node) == 1) nodes.push_back(node);
  }
  std::sort(nodes.begin(), nodes.end());
  return nodes;
}

}  // namespace

int CountPhysicalCores(const std::vector<int>& cpus, const std::string& sys_cpu_dir) {
  std::set<std::pair<int, int>> cores;  // package and core id; package -1 for those unknown
  for (const int cpu : cpus) {
    const std::string topology = sys_cpu_dir + "/cpu" + std::to_string(cpu) + "/topology/";
    int package = -1, core = cpu;
    std::ifstream package_file(topology + "physical_package_id"), core_file(topology + "core_id");
    if (!(package_file >> package) || !(core_file >> core)) {
      package = -1;
      core = cpu;
    }
    cores.emplace(package, core);
  }
  return static_cast<int>(cores.size());
}

int QuotaCpus(const std::string& cpu_max) {
  std::istringstream text(cpu_max);
  long long quota = 0, period = 0;
  if (!(text >> quota >> period) || quota <= 0 || period <= 0) return 0;
  return static_cast<int>(std::min<long long>((quota + period - 1) / period, 1 << 20));
}

int NumUsableCores() {
  const int cores = std::max(1, CountPhysicalCores(AllowedCpus(), "/sys/devices/system/cpu"));
  std::string cpu_max;
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::getline(file, cpu_max);
  const int quota = QuotaCpus(cpu_max);
  return quota > 0 ? std::min(cores, quota) : cores;
}

std::vector<std::vector<int>> CpusByNode(const std::vector<int>& cpus, const std::string& sys_node_dir) {
  std::vector<std::vector<int>> nodes;
  for (const int node : NodesIn(sys_node_dir)) {
    std::ifstream file(sys_node_dir + "/node" + std::to_string(node) + "/cpulist");
    std::string list;
    std::getline(file, list);
    std::vector<int> here = InList(cpus, list);
    if (!here.empty()) nodes.push_back(std::move(here));
  }
  return nodes;
}

std::vector<std::vector<int>> ThreadCpus(int num_threads, const std::vector<std::vector<int>>& nodes) {
  if (nodes.size() < 2) return {};
  int64_t total = 0;
  for (const std::vector<int>& node : nodes) total += static_cast<int64_t>(node.size());
  std::vector<std::vector<int>> threads;
  for (int64_t thread = 0; thread < num_threads; ++thread) {
    // The CPU in the middle of the thread's share of all, and the node that has it.
    int64_t left = (2 * thread + 1) * total / (int64_t{2} * num_threads);
    size_t node = 0;
    while (left >= static_cast<int64_t>(nodes[node].size())) left -= static_cast<int64_t>(nodes[node++].size());
    threads.push_back(nodes[node]);
  }
  return threads;
}

std::vector<std::vector<int>> ThreadCpusHere(int num_threads) {
  return ThreadCpus(num_threads, CpusByNode(AllowedCpus(), "/sys/devices/system/node"));
}

}  // namespace minitron::engine::cpu
