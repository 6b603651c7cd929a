#include "tests/simulation/marks.h"

namespace minitron::simulation {

Marks::Marks() {
  for (const char* name : {
           "cancelled follower in queue",
           "cancelled in decode",
           "cancelled in prefill",
           "cancelled in queue",
           "cancelled one of several",
           "deadline after tokens",
           "deadline in queue",
           "finished unharmed",
           "follower shared prefix",
           "leader aborted before sharing",
           "leader preempted",
           "preempted",
           "preempted between prompt logprobs",
           "preempted in prompt",
           "preempted twice",
           "preempted with history",
           "prompt logprobs in several chunks",
           "refused: queue full",
           "row not finite",
           "scored only",
           "step with decode and prefill",
           "stopped by token",
       }) {
    counts_[name] = 0;
  }
}

void Marks::Hit(const std::string& name) {
  const auto found = counts_.find(name);
  CHECK(found != counts_.end());
  ++found->second;
}

}  // namespace minitron::simulation
