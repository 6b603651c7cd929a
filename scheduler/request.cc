#include "scheduler/request.h"

namespace minitron::scheduler {

uint64_t SequenceSeed(uint64_t seed, int index) {
  if (index == 0) return seed;
  // The finalizer of splitmix64 over the index-th point of its Weyl sequence: every bit of both arguments matters.
  uint64_t x = seed + 0x9E3779B97F4A7C15ull * static_cast<uint64_t>(index);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

}  // namespace minitron::scheduler
