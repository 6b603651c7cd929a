// minitron-gpu-bench: what a device can do, what each kernel reaches on it, and a whole model without a server. Prints
// a JSON object per line. The tests have two halves of it: over the emulation, without models from files, and on the
// CPU backend, without kernels.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#if !defined(MINITRON_GPU_BENCH_WITHOUT_KERNELS)
#include "tests/gpu/device_bench.h"
#endif
#include "tests/gpu/runner_bench.h"

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const std::vector<std::string> arguments(argv + (argc > 1 ? 2 : 1), argv + argc);
#if !defined(MINITRON_GPU_BENCH_WITHOUT_KERNELS)
  if (arguments.size() == 1 && (arguments[0] == "8b" || arguments[0] == "tiny")) {
    if (mode == "ceilings") return minitron::gpu::Ceilings(arguments[0] == "tiny");
    if (mode == "roofline") return minitron::gpu::Roofline(arguments[0] == "tiny");
  }
  if (mode == "kernel" && arguments.size() == 4) {
    return minitron::gpu::OneKernel(arguments[0] == "tiny", arguments[1], std::atoi(arguments[2].c_str()),
                                    std::atoi(arguments[3].c_str()));
  }
#endif
  if (mode == "steps" && arguments.size() == 6) return minitron::gpu::RunnerSteps(arguments);
  if (mode == "score" && arguments.size() == 4) return minitron::gpu::RunnerScore(arguments);
  std::fprintf(
      stderr,
      "usage: minitron-gpu-bench ceilings|roofline 8b|tiny\n"
      "       minitron-gpu-bench kernel 8b|tiny NAME ROWS CONTEXT\n"
      "       minitron-gpu-bench steps MODEL cuda|cpu none|int8|int4|fp8|fp8-dynamic bf16|fp8 plain|early|free\n"
      "                                full|brief|small\n"
      "       minitron-gpu-bench score MODEL cuda|cpu TOKENS_FILE alone,together,steps\n"
      "MODEL: a folder, or random:SHAPE for weights made on the device\n");
  return 2;
}
