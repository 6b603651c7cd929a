// CUDA's host API as the engine uses it: the real one, or the subset the emulation has under the same names.
#pragma once

#if defined(MINITRON_CUDA_EMULATION)
#include "engine/cuda/emulation/runtime_api.h"
#else
#include <cuda_runtime_api.h>
#endif
