// CUDA's host API as the engine uses it: the real one, or the subset the emulation has under the same names.
#pragma once

#if defined(MINITRON_CUDA_EMULATION)
#include "engine/cuda/emulation/runtime_api.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace minitron::engine::cuda {

// Where a kernel is put. `early`: its blocks may start while the kernel in front still runs ("programmatic dependent
// launch", sm_90 and later; elsewhere it changes nothing), so it has to call BeginKernel before it touches what another
// kernel writes or reads.
struct LaunchStream {
  // NOLINTNEXTLINE(google-explicit-constructor): a stream is one on which kernels do not start early
  LaunchStream(cudaStream_t on, bool may_start_early = false) : stream(on), early(may_start_early) {}
  cudaStream_t stream;
  bool early;
};

}  // namespace minitron::engine::cuda
