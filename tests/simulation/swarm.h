// Swarm: one seed is one world. The seed draws pool, budgets, requests, arrivals, aborts and deadlines, and replays bit
// for bit.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/simulation/marks.h"

namespace minitron::simulation {

struct SwarmResult {
  uint64_t event_hash = 0;
  int64_t num_steps = 0;
  std::vector<std::string> violations;  // empty when every claim held
};

// Ends at the first step with a violation. `marks` collects over many seeds. Broken memory or a broken batch may also
// abort the process (CHECK).
SwarmResult RunSeed(uint64_t seed, Marks* marks);

}  // namespace minitron::simulation
