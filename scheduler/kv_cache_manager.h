// Decides which KV blocks belong to which sequence: block tables, reservations, shared prefixes. Knows nothing of
// budgets or order.
//
// A block in a plan counts as computed for all later plans: the runner completes its batches in order.
// Engine thread only; not synchronized. Allocates memory only in Start.
#pragma once

#include <span>
#include <vector>

#include "absl/status/status.h"
#include "scheduler/block_allocator.h"
#include "scheduler/prefix_cache.h"
#include "scheduler/sequence.h"

namespace minitron::scheduler {

class KvCacheManager {
 public:
  // What is there of a sequence's tokens.
  struct Prefix {
    int num_blocks = 0;              // of its first blocks, computed and ready to share
    int num_idle_blocks = 0;         // of these, those that nobody owns: sharing them takes them from the available
    bool next_is_computing = false;  // another sequence is computing the next block right now
  };

  KvCacheManager(int num_blocks, int block_size, PrefixHashKey key = {}, int hash_bits = 64);

  // Blocks that hold num_tokens.
  int NumBlocksFor(int num_tokens) const { return (num_tokens + block_size_ - 1) / block_size_; }

  // Leading tokens of the sequence that it may take from others: full blocks; never its last token, whose row it has to
  // run to sample from; and no row that still has a prompt logprob to report.
  int NumShareableTokens(const Sequence& sequence) const;

  // Looks the waiting sequence's tokens up.
  Prefix FindPrefix(const Sequence& sequence) const;

  // Gives the waiting sequence its blocks: the prefix, shared; the rest of those that hold its tokens, new; and a right
  // to as many as num_reserved_tokens need. Returns the number of tokens it need not compute.
  // Requires: `prefix` is what FindPrefix says now, and the blocks beyond it and its idle ones are unreserved.
  int Start(const Prefix& prefix, int num_reserved_tokens, Sequence& sequence);

  // Grows the table until it holds num_tokens, first from the sequence's reservation.
  // False: not enough unreserved blocks; nothing changed.
  bool TryGrow(int num_tokens, Sequence& sequence);

  // The sequence's blocks that its planned rows fill are computed from the next plan on.
  void NotePlanned(Sequence& sequence);

  // Its blocks that known, computed tokens fill can be found by others.
  void NoteComputed(Sequence& sequence);

  // Nobody finds the sequence's blocks any more; their content is not to be trusted.
  void Distrust(const Sequence& sequence);

  // Gives all blocks and reservations of the sequence back; its table is empty afterwards. Computed blocks keep their
  // content for later sequences; its last block is the first to go.
  void Release(Sequence& sequence);

  int num_blocks() const { return allocator_.num_blocks(); }
  int num_available_blocks() const { return allocator_.num_available(); }  // free or cached
  int num_unreserved_blocks() const { return num_available_blocks() - num_reserved_; }
  int num_cached_blocks() const { return allocator_.num_cached(); }
  int num_used_blocks() const { return allocator_.num_used(); }
  int block_size() const { return block_size_; }
  const BlockAllocator& allocator() const { return allocator_; }
  const PrefixCache& prefix_cache() const { return prefix_cache_; }

  // Whether the tables of `sequences`, which must be all that own blocks, explain every block: refcounts equal the
  // number of tables a block is in; free, cached and owned are the pool; no table names a block twice; exactly the
  // cached blocks are known to the prefix cache without an owner; reservations add up.
  // Error: INTERNAL with the first contradiction. For tests and the simulator: walks everything.
  absl::Status CheckConsistent(const std::vector<const Sequence*>& sequences) const;

 private:
  std::span<const TokenId> BlockTokens(const Sequence& sequence, int index) const;
  void AppendNewBlock(Sequence& sequence);
  void InsertFilled(int num_blocks, Sequence& sequence);

  const int block_size_;
  BlockAllocator allocator_;
  PrefixCache prefix_cache_;
  int num_reserved_ = 0;
};

}  // namespace minitron::scheduler
