#include "tests/simulation/marks.h"

namespace minitron::simulation {

Marks::Marks() {
  for (const char* name : {
           "blocks held for a row in flight",
           "cancelled follower in queue",
           "cancelled in decode",
           "cancelled in prefill",
           "cancelled in queue",
           "cancelled one of several",
           "deadline after tokens",
           "deadline in queue",
           "drained",
           "engine failed",
           "evicted behind a block in use",
           "finished unharmed",
           "follower shared prefix",
           "hit among colliding hashes",
           "hit on block of another request",
           "hit on block with generated tokens",
           "hit, then evicted",
           "killed",
           "leader aborted before sharing",
           "leader preempted",
           "preempted",
           "preempted as often as allowed",
           "preempted between prompt logprobs",
           "preempted found blocks again",
           "preempted in prompt",
           "preempted twice",
           "preempted with history",
           "prompt logprobs in several chunks",
           "first token too late",
           "given up before it started",
           "passed-over class had its turn",
           "refused: deadline out of reach",
           "refused: queue share full",
           "refused: tokens full",
           "refused: bytes full",
           "refused: draining",
           "refused: queue full",
           "reserved to completion",
           "row broken",
           "row broken by accident",
           "shared a broken block under way",
           "cancelled while a step ran",
           "a step took very long",
           "two tenants kept waiting",
           "waited for blocks",
           "salt kept apart",
           "scored only",
           "step with decode and prefill",
           "stopped by token",
           "two steps in flight",
           "waited for a block being computed",
           "waited long enough for a block",
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
