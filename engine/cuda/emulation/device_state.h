// The state of the emulated device, shared by its host API's files; nobody else includes it.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "engine/cuda/emulation/runtime_api.h"

using Work = std::function<void()>;

struct EmulatedGraph {
  std::vector<Work> nodes;
};
struct EmulatedGraphExec {
  std::shared_ptr<const std::vector<Work>> nodes;
};
struct EmulatedStream {
  std::deque<Work> queue;
  uint64_t num_enqueued = 0, num_done = 0;
  EmulatedGraph* capturing = nullptr;
  std::vector<std::pair<uint64_t, float>> passed;  // what work said it took: its position and milliseconds
};
struct EmulatedEvent {
  EmulatedStream* stream = nullptr;  // null until recorded
  uint64_t position = 0;             // work of the stream in front of it
};

namespace minitron::engine::cuda::emulation {

struct Allocation {
  size_t num_bytes;
  unsigned char* block;  // guard, data, guard
};

// The device and everything created on it. One lock: host threads may come from anywhere.
struct Device {
  std::recursive_mutex mutex;
  std::map<uintptr_t, Allocation> memory;
  std::vector<EmulatedStream*> streams;
  LiveObjects live;
  size_t total_bytes = size_t{1} << 40;
  size_t used_bytes = 0;
  int num_devices = 1;
  int compute_capability = 89;
  EmulatedStream* running = nullptr;  // the stream whose work runs
  int num_calls = 0;
  int num_early_kernels = 0;
  int failing_call = 0;
  bool sticky = false;
  bool skip_kernels = false;
  cudaError_t failure = cudaSuccess;
};

Device& TheDevice();

using Lock = std::lock_guard<std::recursive_mutex>;

// Counts a call; what it has to fail with, if anything.
cudaError_t Count();

#define RETURN_IF_PLANTED()     \
  Lock lock(TheDevice().mutex); \
  if (const cudaError_t planted = Count(); planted != cudaSuccess) return planted

// The allocation that holds [pointer, pointer + num_bytes), or null.
const Allocation* FindAllocation(const void* pointer, size_t num_bytes);
// Aborts if somebody wrote around an allocation.
void CheckGuards(const Allocation& allocation);
// Runs a stream's work up to a position, then looks at all guards.
void RunUntil(EmulatedStream& stream, uint64_t position);

}  // namespace minitron::engine::cuda::emulation
