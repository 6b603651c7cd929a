#include "clients/bench/arrivals.h"

#include <algorithm>
#include <cmath>
#include <random>

namespace minitron::bench {

std::vector<double> ArrivalOffsets(const ArrivalOptions& options, size_t count) {
  std::mt19937_64 generator(options.seed);
  // Gaps of mean 1: arrivals of a process with unit rate. Time is then stretched so that the rate is the wanted one.
  std::gamma_distribution<double> gap(options.burstiness, 1 / options.burstiness);
  const double begin = options.rate;
  const double end = options.final_rate > 0 ? options.final_rate : options.rate;
  const double ramp_s = 2 * static_cast<double>(count) / (begin + end);  // `count` requests at the mean rate
  const double slope = count > 0 ? (end - begin) / ramp_s : 0;
  std::vector<double> offsets(count);
  double arrived = 0;
  for (double& offset : offsets) {
    arrived += gap(generator);
    // Solves begin * t + slope / 2 * t^2 = arrived; in this form nothing cancels when the slope is near 0.
    const double root = std::sqrt(std::max(0.0, begin * begin + 2 * slope * arrived));
    offset = 2 * arrived / (begin + root);
    // After the ramp the rate stays where it is.
    if (arrived > static_cast<double>(count)) offset = ramp_s + (arrived - static_cast<double>(count)) / end;
  }
  return offsets;
}

}  // namespace minitron::bench
