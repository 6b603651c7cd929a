#include "engine/cpu/kv_cache.h"

#include <algorithm>
#include <vector>

#include "gtest/gtest.h"

namespace minitron::engine::cpu {
namespace {

TEST(KvCacheTest, HeadBlocksTileTheCacheWithoutGapOrOverlap) {
  const KvCacheShape shape{
      .num_layers = 2, .num_blocks = 3, .num_heads = 2, .head_dim = 5, .block_size = 8, .type = KvCacheType::kF32};
  const KvCache cache(shape);
  std::vector<const float*> keys, values;
  for (int layer = 0; layer < 2; ++layer) {
    for (int block = 0; block < 3; ++block) {
      for (int head = 0; head < 2; ++head) {
        keys.push_back(cache.KeyBlock<float>(layer, block, head));
        values.push_back(cache.ValueBlock<float>(layer, block, head));
      }
    }
  }
  for (size_t i = 1; i < keys.size(); ++i) {
    EXPECT_EQ(keys[i] - keys[i - 1], 40);
    EXPECT_EQ(values[i] - values[i - 1], 40);
  }
  EXPECT_EQ(shape.total_elements(), static_cast<int64_t>(keys.size()) * 40);
}

TEST(KvCacheTest, StartsZeroedAndKeepsWhatIsWritten) {
  const KvCache cache(
      {.num_layers = 1, .num_blocks = 2, .num_heads = 1, .head_dim = 4, .block_size = 8, .type = KvCacheType::kF32});
  EXPECT_TRUE(std::all_of(cache.KeyBlock<float>(0, 0, 0), cache.KeyBlock<float>(0, 0, 0) + 64,
                          [](float x) { return x == 0.0f; }));
  std::fill_n(cache.ValueBlock<float>(0, 1, 0), 32, 3.0f);
  EXPECT_EQ(cache.ValueBlock<float>(0, 0, 0)[31], 0.0f);
  EXPECT_EQ(cache.ValueBlock<float>(0, 1, 0)[31], 3.0f);
}

// 69 GB are only address space until it is touched.
TEST(KvCacheTest, UntouchedMemoryIsNotCommitted) {
  const KvCache cache({.num_layers = 32,
                       .num_blocks = 1 << 14,
                       .num_heads = 8,
                       .head_dim = 128,
                       .block_size = 16,
                       .type = KvCacheType::kF32});
  cache.KeyBlock<float>(31, (1 << 14) - 1, 7)[0] = 1.0f;
  EXPECT_EQ(cache.KeyBlock<float>(31, (1 << 14) - 1, 7)[0], 1.0f);
}

}  // namespace
}  // namespace minitron::engine::cpu
