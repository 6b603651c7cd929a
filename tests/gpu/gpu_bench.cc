// minitron-gpu-bench: what a device can do, what each kernel reaches on it, and a whole model without a server. Prints
// a JSON object per line. The tests have two halves of it: the kernels over the emulation, and the model on the CPU
// backend.
#include <cstdio>
#include <string>
#include <vector>

#if !defined(MINITRON_GPU_BENCH_WITHOUT_KERNELS)
#include "tests/gpu/device_bench.h"
#endif
#if !defined(MINITRON_GPU_BENCH_WITHOUT_RUNNER)
#include "tests/gpu/runner_bench.h"
#endif

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const std::vector<std::string> arguments(argv + (argc > 1 ? 2 : 1), argv + argc);
#if !defined(MINITRON_GPU_BENCH_WITHOUT_KERNELS)
  if (arguments.size() == 1 && (arguments[0] == "8b" || arguments[0] == "tiny")) {
    if (mode == "ceilings") return minitron::gpu::Ceilings(arguments[0] == "tiny");
    if (mode == "roofline") return minitron::gpu::Roofline(arguments[0] == "tiny");
  }
#endif
#if !defined(MINITRON_GPU_BENCH_WITHOUT_RUNNER)
  if (mode == "steps" && arguments.size() == 5) return minitron::gpu::RunnerSteps(arguments);
  if (mode == "score" && arguments.size() == 3) return minitron::gpu::RunnerScore(arguments);
#endif
  std::fprintf(
      stderr,
      "usage: minitron-gpu-bench ceilings|roofline 8b|tiny\n"
      "       minitron-gpu-bench steps MODEL_DIR cuda|cpu none|int8|int4|fp8|fp8-dynamic bf16|fp8 plain|early\n"
      "       minitron-gpu-bench score MODEL_DIR cuda|cpu TOKENS_FILE\n");
  return 2;
}
