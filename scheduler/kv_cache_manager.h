// Decides which KV blocks belong to which sequence. Fills and empties the sequences' block tables; knows nothing of
// steps, budgets or order. The prefix cache will live here, beside ShareComputedPrefix.
// Engine thread only; not synchronized.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "scheduler/block_allocator.h"
#include "scheduler/sequence.h"

namespace minitron::scheduler {

class KvCacheManager {
 public:
  KvCacheManager(int num_blocks, int block_size);

  // Blocks that hold num_tokens.
  int NumBlocksFor(int num_tokens) const { return (num_tokens + block_size_ - 1) / block_size_; }

  // Prompt tokens that the sequences of one request can share: full blocks, and never the last prompt token, because
  // every sequence has to run that row itself to sample from it.
  int NumShareableTokens(const Request& request) const;

  // Grows the sequence's table until it holds num_tokens. All or nothing.
  // Error: RESOURCE_EXHAUSTED; the table is unchanged.
  absl::Status Grow(int num_tokens, Sequence& sequence);

  // Lets `to` (same request, empty table) use the shareable prompt blocks of `from`, which has computed them.
  // Returns the number of tokens that `to` need not compute. They are full, so nobody writes to them again.
  int ShareComputedPrefix(const Sequence& from, Sequence& to);

  // Gives all blocks of the sequence back; its table is empty afterwards.
  void Release(Sequence& sequence);

  int num_blocks() const { return allocator_.num_blocks(); }
  int num_free_blocks() const { return allocator_.num_free(); }
  int num_used_blocks() const { return allocator_.num_used(); }
  int block_size() const { return block_size_; }
  const BlockAllocator& allocator() const { return allocator_; }

  // Whether the tables of `sequences`, which must be all that own blocks, explain every block: refcounts equal the
  // number of tables a block is in, free plus owned is the pool, no table names a block twice.
  // Error: INTERNAL with the first contradiction. For tests and the simulator: walks everything.
  absl::Status CheckConsistent(const std::vector<const Sequence*>& sequences) const;

 private:
  const int block_size_;
  BlockAllocator allocator_;
};

}  // namespace minitron::scheduler
