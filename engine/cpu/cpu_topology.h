// How many threads are worth starting, and where they should stay.
#pragma once

#include <string>
#include <vector>

namespace minitron::engine::cpu {

// Physical cores among `cpus` (ids of hardware threads), by the kernel's topology files below `sys_cpu_dir`
// (/sys/devices/system/cpu). A hardware thread whose files cannot be read counts as a core of its own.
int CountPhysicalCores(const std::vector<int>& cpus, const std::string& sys_cpu_dir);

// Whole CPUs a control group's cpu.max allows ("200000 100000" is 2, "max 100000" no limit), rounded up; 0: no limit.
int QuotaCpus(const std::string& cpu_max);

// Physical cores this process may run on (affinity, cpuset, CPU quota of its control group), at least 1. Hyper-threads
// share the units that multiply and the path to memory: a second one per core makes a step slower, not faster.
int NumUsableCores();

// `cpus` by memory node, in the nodes' order, by the kernel's files below `sys_node_dir` (/sys/devices/system/node).
// Nodes with none of them are left out; a CPU that no node names is in none.
std::vector<std::vector<int>> CpusByNode(const std::vector<int>& cpus, const std::string& sys_node_dir);

// The CPUs each of `num_threads` threads should stay on: those of one node, neighbouring threads on the same one, nodes
// in proportion to their CPUs. Empty with fewer than two nodes: the kernel places threads better than we do.
std::vector<std::vector<int>> ThreadCpus(int num_threads, const std::vector<std::vector<int>>& nodes);

// The same for the CPUs this process may run on.
std::vector<std::vector<int>> ThreadCpusHere(int num_threads);

}  // namespace minitron::engine::cpu
