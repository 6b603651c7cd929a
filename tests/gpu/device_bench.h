// The parts of minitron-gpu-bench that speak to the device: its ceilings, and each kernel at the 8B's shapes.
#pragma once

#include <string>

namespace minitron::gpu {

// Copy and read bandwidth, and the rate of a large bf16 product. `tiny`: sizes for the emulation, whose times mean
// nothing. Prints JSON lines; returns the exit code.
int Ceilings(bool tiny);

// Every kernel of a decode step and of a prompt: time, bytes that must move, floating-point operations.
int Roofline(bool tiny);

// One of them, by the name and the shape Roofline prints, three times without a graph: for a profiler.
int OneKernel(bool tiny, const std::string& name, int rows, int context);

}  // namespace minitron::gpu
