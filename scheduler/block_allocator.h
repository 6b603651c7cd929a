// Hands out fixed-size KV blocks by id. Owns no memory: ids index the KV cache of the runner.
// A block is free, cached (nobody owns it, but its content is kept for whoever wants it again) or in use by one or more
// owners. Allocate prefers free blocks, then takes the one cached longest ago.
// Allocates no memory after construction. Engine thread only; not synchronized.
#pragma once

#include <vector>

#include "engine/batch.h"

namespace minitron::scheduler {

using engine::BlockId;

class BlockAllocator {
 public:
  explicit BlockAllocator(int num_blocks);

  // Takes a block, with one owner. CHECKs that num_available() > 0. A cached block loses its content: the caller tells
  // whoever knows it by that.
  BlockId Allocate();

  // Adds an owner to a block that is in use or cached.
  void Share(BlockId block);

  // Takes an owner away; CHECKs that there is one. After the last one the block is cached or free.
  void Release(BlockId block, bool keep_content);

  int num_blocks() const { return static_cast<int>(ref_counts_.size()); }
  int num_available() const { return num_free() + num_cached_; }
  int num_free() const { return static_cast<int>(free_.size()); }
  int num_cached() const { return num_cached_; }
  int num_used() const { return num_blocks() - num_available(); }
  int ref_count(BlockId block) const;
  bool is_cached(BlockId block) const { return next_[block] != kNotInList; }

  // For inspection: in any order / the one cached longest ago first.
  const std::vector<BlockId>& free_blocks() const { return free_; }
  std::vector<BlockId> cached_blocks() const;

 private:
  static constexpr BlockId kNotInList = -1;

  void Unlink(BlockId block);

  std::vector<int> ref_counts_;
  std::vector<BlockId> free_;  // a stack: the block freed last is still warm in the caches
  // The cached blocks as a ring through the extra element num_blocks, whose next is the one cached longest ago.
  std::vector<BlockId> next_, previous_;
  int num_cached_ = 0;
};

}  // namespace minitron::scheduler
