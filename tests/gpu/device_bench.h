// The parts of minitron-gpu-bench that speak to the device: its ceilings, and each kernel at the 8B's shapes.
#pragma once

namespace minitron::gpu {

// Copy and read bandwidth, and the rate of a large bf16 product. `tiny`: sizes for the emulation, whose times mean
// nothing. Prints JSON lines; returns the exit code.
int Ceilings(bool tiny);

// Every kernel of a decode step and of a prompt: time, bytes that must move, floating-point operations.
int Roofline(bool tiny);

}  // namespace minitron::gpu
