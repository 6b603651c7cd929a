// Counts heap allocations: linking counting_new.cc into a program replaces its operator new. Any thread.
#pragma once

#include <cstdint>

namespace minitron::testing {

// Allocations by this thread so far.
int64_t NumAllocations();

}  // namespace minitron::testing
