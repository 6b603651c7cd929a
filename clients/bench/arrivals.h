// When requests are sent, as offsets from the start. Pure functions of options and seed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace minitron::bench {

// An arrival process. Gaps follow a gamma distribution; the mean gap is one over the rate at that moment.
struct ArrivalOptions {
  double rate = 1;        // requests per second, above 0
  double final_rate = 0;  // the rate moves linearly to this one over the run; 0: it stays
  double burstiness = 1;  // shape of the gamma distribution, above 0: 1 is Poisson, below 1 burstier, above 1 steadier
  uint64_t seed = 0;
};

// `count` offsets in seconds, ascending.
std::vector<double> ArrivalOffsets(const ArrivalOptions& options, size_t count);

}  // namespace minitron::bench
