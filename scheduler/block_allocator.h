// Hands out fixed-size KV blocks by id. Owns no memory: ids index the KV cache of the runner.
// A block is free or in use by one or more owners; the last Release frees it. The prefix cache will add a third state,
// cached (free, content reusable), and nothing above this class has to know.
// Engine thread only; not synchronized.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "engine/batch.h"

namespace minitron::scheduler {

using engine::BlockId;

class BlockAllocator {
 public:
  explicit BlockAllocator(int num_blocks);

  // Takes num_blocks, each with one owner. All or nothing.
  // Error: RESOURCE_EXHAUSTED if fewer are free; no block changes state.
  absl::StatusOr<std::vector<BlockId>> Allocate(int num_blocks);

  // Adds an owner to a block in use.
  void Share(BlockId block);

  // Takes an owner away; the block is free when it was the last. CHECKs that there is one.
  void Release(BlockId block);

  int num_blocks() const { return static_cast<int>(ref_counts_.size()); }
  int num_free() const { return static_cast<int>(free_.size()); }
  int num_used() const { return num_blocks() - num_free(); }
  int ref_count(BlockId block) const;
  const std::vector<BlockId>& free_blocks() const { return free_; }  // for inspection

 private:
  std::vector<int> ref_counts_;
  std::vector<BlockId> free_;  // a stack: the block freed last is still warm in the caches
};

}  // namespace minitron::scheduler
