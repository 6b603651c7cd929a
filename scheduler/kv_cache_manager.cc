#include "scheduler/kv_cache_manager.h"

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"

namespace minitron::scheduler {

KvCacheManager::KvCacheManager(int num_blocks, int block_size) : block_size_(block_size), allocator_(num_blocks) {
  CHECK(block_size > 0);
}

int KvCacheManager::NumShareableTokens(const Request& request) const {
  const int num_prompt_tokens = static_cast<int>(request.prompt_token_ids.size());
  return (num_prompt_tokens - 1) / block_size_ * block_size_;
}

absl::Status KvCacheManager::Grow(int num_tokens, Sequence& sequence) {
  BlockTable& table = sequence.mutable_block_table();
  const int num_missing = NumBlocksFor(num_tokens) - static_cast<int>(table.size());
  if (num_missing <= 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::vector<BlockId> blocks, allocator_.Allocate(num_missing));
  table.insert(table.end(), blocks.begin(), blocks.end());
  return absl::OkStatus();
}

int KvCacheManager::ShareComputedPrefix(const Sequence& from, Sequence& to) {
  const int num_tokens = NumShareableTokens(to.request());
  CHECK(&from.request() == &to.request() && from.num_computed_tokens() >= num_tokens);
  BlockTable& table = to.mutable_block_table();
  CHECK(table.empty());
  for (int i = 0; i < num_tokens / block_size_; ++i) {
    allocator_.Share(from.block_table()[i]);
    table.push_back(from.block_table()[i]);
  }
  return num_tokens;
}

void KvCacheManager::Release(Sequence& sequence) {
  BlockTable& table = sequence.mutable_block_table();
  for (const BlockId block : table) allocator_.Release(block);
  table.clear();
}

absl::Status KvCacheManager::CheckConsistent(const std::vector<const Sequence*>& sequences) const {
  std::vector<int> num_owners(num_blocks(), 0);
  std::vector<const Sequence*> last_owner(num_blocks(), nullptr);
  for (const Sequence* sequence : sequences) {
    for (const BlockId block : sequence->block_table()) {
      if (block < 0 || block >= num_blocks()) return absl::InternalError(absl::StrCat("no block ", block));
      if (last_owner[block] == sequence) return absl::InternalError(absl::StrCat("block ", block, " twice in a table"));
      last_owner[block] = sequence;
      ++num_owners[block];
    }
  }
  int num_owned = 0;
  for (BlockId block = 0; block < num_blocks(); ++block) {
    if (num_owners[block] != allocator_.ref_count(block)) {
      return absl::InternalError(absl::StrCat("block ", block, " is in ", num_owners[block], " tables but counts ",
                                              allocator_.ref_count(block), " owners"));
    }
    num_owned += num_owners[block] > 0 ? 1 : 0;
  }
  if (num_owned + num_free_blocks() != num_blocks()) {
    return absl::InternalError(absl::StrCat(num_owned, " owned + ", num_free_blocks(), " free != ", num_blocks()));
  }
  for (const BlockId block : allocator_.free_blocks()) {
    if (num_owners[block] != 0) return absl::InternalError(absl::StrCat("free block ", block, " is owned"));
  }
  return absl::OkStatus();
}

}  // namespace minitron::scheduler
