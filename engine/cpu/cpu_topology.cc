#include "engine/cpu/cpu_topology.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>
#include <utility>

namespace minitron::engine::cpu {

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
  std::vector<int> cpus;
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
    }
  }
  const int cores = std::max(1, CountPhysicalCores(cpus, "/sys/devices/system/cpu"));
  std::string cpu_max;
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::getline(file, cpu_max);
  const int quota = QuotaCpus(cpu_max);
  return quota > 0 ? std::min(cores, quota) : cores;
}

}  // namespace minitron::engine::cpu
