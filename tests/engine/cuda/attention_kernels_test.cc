// Attention over the paged cache: both kernels against softmax in double, and against each other bit for bit.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "engine/cuda/kernels.h"
#include "gtest/gtest.h"
#include "tests/engine/cuda/device_array.h"

namespace minitron::engine::cuda {
namespace {

struct Shape {
  int group_size = 6;
  int kv_heads = 2;
  int head_dim = 64;
  int block_shift = 4;
  bool fp8 = false;
  int num_heads() const { return group_size * kv_heads; }
  int width() const { return num_heads() * head_dim; }
};

// Sequences of random keys and values in shuffled blocks. Slots nobody owns hold NaN, as recycled blocks may. With fp8
// the values are such that E4M3 holds them: what is tested is the reading, not the rounding.
class Cache {
 public:
  Cache(const Shape& shape, const std::vector<int>& lengths, uint64_t seed)
      : shape_(shape), lengths_(lengths), random_(seed) {
    const int block_tokens = 1 << shape.block_shift;
    int num_blocks = 3;
    for (const int length : lengths) num_blocks += (length + block_tokens - 1) / block_tokens;
    std::vector<int32_t> free(num_blocks);
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), random_);
    keys_.assign(int64_t{num_blocks} * block_tokens * shape.kv_heads * shape.head_dim, HostBf16(NAN));
    values_ = keys_;
    key_codes_.assign(keys_.size(), 0xFF);
    value_codes_ = key_codes_;
    key_exponents_.assign(keys_.size() / shape.head_dim, -128);
    value_exponents_ = key_exponents_;
    block_start_.push_back(0);
    for (const int length : lengths) {
      for (int first = 0; first < length; first += block_tokens) {
        block_ids_.push_back(free.back());
        free.pop_back();
      }
      block_start_.push_back(static_cast<int32_t>(block_ids_.size()));
    }
    for (size_t s = 0; s < lengths.size(); ++s) {
      for (int key = 0; key < lengths[s]; ++key) {
        for (int head = 0; head < shape.kv_heads; ++head) Fill(static_cast<int>(s), key, head);
      }
    }
  }

  int64_t Offset(int sequence, int key, int head) const {
    const int64_t block = block_ids_[block_start_[sequence] + (key >> shape_.block_shift)];
    const int64_t in_block = key & ((1 << shape_.block_shift) - 1);
    return (((block * shape_.kv_heads + head) << shape_.block_shift) + in_block) * shape_.head_dim;
  }
  // Softmax attention in double of one query over keys [0, num_keys).
  std::vector<double> Attend(const Bf16* query, int sequence, int num_keys, int kv_head) const {
    std::vector<double> scores(num_keys), out(shape_.head_dim, 0.0);
    for (int key = 0; key < num_keys; ++key) {
      const Bf16* k = &keys_[Offset(sequence, key, kv_head)];
      for (int d = 0; d < shape_.head_dim; ++d) scores[key] += double{HostFloat(query[d])} * HostFloat(k[d]);
      scores[key] /= std::sqrt(shape_.head_dim);
    }
    const double maximum = *std::max_element(scores.begin(), scores.end());
    double total = 0.0;
    for (double& score : scores) total += score = std::exp(score - maximum);
    for (int key = 0; key < num_keys; ++key) {
      const Bf16* v = &values_[Offset(sequence, key, kv_head)];
      for (int d = 0; d < shape_.head_dim; ++d) out[d] += scores[key] / total * HostFloat(v[d]);
    }
    return out;
  }

  void BreakKey(int sequence, int key) {
    for (int head = 0; head < shape_.kv_heads; ++head)
      key_exponents_[Offset(sequence, key, head) / shape_.head_dim] = -128;
  }
  const std::vector<Bf16>& keys() const { return keys_; }
  const std::vector<Bf16>& values() const { return values_; }
  const std::vector<uint8_t>& key_codes() const { return key_codes_; }
  const std::vector<uint8_t>& value_codes() const { return value_codes_; }
  const std::vector<int8_t>& key_exponents() const { return key_exponents_; }
  const std::vector<int8_t>& value_exponents() const { return value_exponents_; }
  const std::vector<int32_t>& block_ids() const { return block_ids_; }
  const std::vector<int32_t>& block_start() const { return block_start_; }
  std::mt19937_64& random() { return random_; }

 private:
  void Fill(int sequence, int key, int head) {
    const int64_t at = Offset(sequence, key, head);
    const std::vector<Bf16> k = RandomBf16(random_, shape_.head_dim), v = RandomBf16(random_, shape_.head_dim);
    std::copy(k.begin(), k.end(), keys_.begin() + at);
    std::copy(v.begin(), v.end(), values_.begin() + at);
    if (!shape_.fp8) return;
    Round(at, keys_, key_codes_, key_exponents_);
    Round(at, values_, value_codes_, value_exponents_);
  }
  void Round(int64_t at, std::vector<Bf16>& elements, std::vector<uint8_t>& codes, std::vector<int8_t>& exponents) {
    std::vector<double> row(shape_.head_dim);
    for (int d = 0; d < shape_.head_dim; ++d) row[d] = HostFloat(elements[at + d]);
    const HostFp8Row encoded = EncodeFp8Row(row);
    for (int d = 0; d < shape_.head_dim; ++d) elements[at + d] = HostBf16(static_cast<float>(encoded.Value(d)));
    std::copy(encoded.codes.begin(), encoded.codes.end(), codes.begin() + at);
    exponents[at / shape_.head_dim] = encoded.exponent;
  }
  Shape shape_;
  std::vector<int> lengths_;
  std::mt19937_64 random_;
  std::vector<Bf16> keys_, values_;
  std::vector<uint8_t> key_codes_, value_codes_;
  std::vector<int8_t> key_exponents_, value_exponents_;
  std::vector<int32_t> block_ids_, block_start_;
};

// The cache on the device and what both kernels need with it.
class Device {
 public:
  Device(const Shape& shape, const Cache& cache, const std::vector<Bf16>& q)
      : keys_(cache.keys()),
        values_(cache.values()),
        key_codes_(cache.key_codes()),
        value_codes_(cache.value_codes()),
        key_exponents_(cache.key_exponents()),
        value_exponents_(cache.value_exponents()),
        block_ids_(cache.block_ids()),
        block_start_(cache.block_start()),
        q_(q),
        out_(static_cast<int64_t>(q.size())) {
    params_ = {
        q_.data(),         out_.data(),         {keys_.data(), values_.data(), shape.kv_heads, shape.block_shift},
        block_ids_.data(), block_start_.data(), shape.group_size,
        shape.head_dim,    shape.width(),       1.44269504f / std::sqrt(static_cast<float>(shape.head_dim))};
    if (!shape.fp8) return;
    params_.cache = {nullptr,
                     nullptr,
                     shape.kv_heads,
                     shape.block_shift,
                     {key_codes_.data(), value_codes_.data(), key_exponents_.data(), value_exponents_.data()}};
  }

  // Row r is the token at position num_keys[r] - 1 of sequence r.
  std::vector<Bf16> Decode(const std::vector<int>& num_keys, int max_blocks, int max_merge_rows) {
    std::vector<DecodeItem> items;
    std::vector<MergeRow> rows;
    for (int r = 0; r < static_cast<int>(num_keys.size()); ++r) {
      const int chunks = (num_keys[r] + kChunkKeys - 1) / kChunkKeys;
      if (chunks > 1) rows.push_back({r, static_cast<int32_t>(items.size()), chunks, 0});
      for (int chunk = 0; chunk < chunks; ++chunk) items.push_back({r, r, num_keys[r], chunk});
    }
    const DecodeCounts counts{static_cast<int32_t>(items.size()), static_cast<int32_t>(rows.size())};
    if (rows.empty()) rows.push_back({});
    const DeviceArray<DecodeItem> device_items(items);
    const DeviceArray<MergeRow> device_rows(rows);
    const DeviceArray<DecodeCounts> device_counts(std::vector<DecodeCounts>{counts});
    DeviceArray<float> partials(counts.num_items * PartialFloats(params_.cache.num_kv_heads, params_.head_dim));
    EXPECT_EQ(DecodeAttention(params_, device_items.data(), device_rows.data(), device_counts.data(), partials.data(),
                              max_blocks, max_merge_rows, TestStream()),
              cudaSuccess);
    return out_.Get();
  }

  std::vector<Bf16> Prefill(const std::vector<PrefillTile>& tiles) {
    const DeviceArray<PrefillTile> device_tiles(tiles);
    EXPECT_EQ(PrefillAttention(params_, device_tiles.data(), static_cast<int>(tiles.size()), TestStream()),
              cudaSuccess);
    return out_.Get();
  }

 private:
  DeviceArray<Bf16> keys_, values_;
  DeviceArray<uint8_t> key_codes_, value_codes_;
  DeviceArray<int8_t> key_exponents_, value_exponents_;
  DeviceArray<int32_t> block_ids_, block_start_;
  DeviceArray<Bf16> q_, out_;
  AttentionParams params_;
};

// Relative error of one row and head. Weights are rounded to bf16 (2^-9 each, averaging out), the result once more.
constexpr double kTolerance = 5e-3;

void ExpectNear(const Shape& shape, const Cache& cache, const std::vector<Bf16>& q, const std::vector<Bf16>& out,
                int row, int sequence, int num_keys) {
  for (int head = 0; head < shape.num_heads(); ++head) {
    const int64_t at = int64_t{row} * shape.width() + head * shape.head_dim;
    const std::vector<double> expected = cache.Attend(&q[at], sequence, num_keys, head / shape.group_size);
    double error = 0.0, norm = 0.0;
    for (int d = 0; d < shape.head_dim; ++d) {
      const double difference = HostFloat(out[at + d]) - expected[d];
      error += difference * difference;
      norm += expected[d] * expected[d];
    }
    ASSERT_LE(std::sqrt(error / norm), kTolerance)
        << "row " << row << " head " << head << " of " << num_keys << " keys, head_dim " << shape.head_dim << " group "
        << shape.group_size;
  }
}

TEST(AttentionKernelsTest, DecodeEqualsDoubleReferenceAroundEveryTileEdge) {
  const std::vector<int> lengths = {1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 320, 513};
  for (const auto& [head_dim, fp8] : {std::pair{64, false}, {128, false}, {64, true}, {128, true}}) {
    const Shape shape{.kv_heads = 1, .head_dim = head_dim, .block_shift = head_dim == 64 ? 4 : 5, .fp8 = fp8};
    Cache cache(shape, lengths, 5);
    const std::vector<Bf16> q = RandomBf16(cache.random(), static_cast<int64_t>(lengths.size()) * shape.width());
    Device device(shape, cache, q);
    ForEachOrder([&] {
      const std::vector<Bf16> out = device.Decode(lengths, 64, 64);
      for (size_t r = 0; r < lengths.size(); ++r) {
        ExpectNear(shape, cache, q, out, static_cast<int>(r), static_cast<int>(r), lengths[r]);
      }
    });
  }
}

TEST(AttentionKernelsTest, EveryGroupSizeIsServedByBothKernels) {
  for (const auto& [head_dim, fp8] : {std::pair{64, false}, {128, false}, {64, true}, {128, true}}) {
    for (int group_size = 1; group_size <= kMaxGroupSize; ++group_size) {
      const Shape shape{.group_size = group_size, .kv_heads = 2, .head_dim = head_dim, .block_shift = 3, .fp8 = fp8};
      const std::vector<int> lengths = {70};
      Cache cache(shape, lengths, group_size);
      const std::vector<Bf16> q = RandomBf16(cache.random(), shape.width());
      Device device(shape, cache, q);
      ExpectNear(shape, cache, q, device.Decode(lengths, 4, 4), 0, 0, 70);
      ExpectNear(shape, cache, q, device.Prefill({{0, 1, 0, 69}}), 0, 0, 70);
    }
  }
}

TEST(AttentionKernelsTest, PrefillEqualsDoubleReferenceAroundEveryTileEdge) {
  struct Case {
    int head_dim, first_position, num_rows;
    bool fp8 = false;
  };
  // A tile has 21 rows of group 6; keys end around tiles of 64 and chunks of 256.
  for (const Case& c : {Case{64, 0, 1}, Case{64, 0, 21}, Case{64, 43, 21}, Case{64, 44, 20}, Case{128, 50, 21},
                        Case{128, 240, 21}, Case{64, 505, 16}, Case{64, 0, 1, true}, Case{64, 44, 20, true},
                        Case{128, 50, 21, true}, Case{128, 250, 8, true}}) {
    const Shape shape{.kv_heads = 1, .head_dim = c.head_dim, .fp8 = c.fp8};
    Cache cache(shape, {33, c.first_position + c.num_rows}, 9);
    const std::vector<Bf16> q = RandomBf16(cache.random(), (c.num_rows + 2) * shape.width());
    Device device(shape, cache, q);
    ForEachOrder([&] {
      const std::vector<Bf16> out = device.Prefill({{2, c.num_rows, 1, c.first_position}});
      for (int r = 0; r < c.num_rows; ++r) {
        ExpectNear(shape, cache, q, out, 2 + r, 1, c.first_position + r + 1);
      }
      for (int i = 0; i < 2 * shape.width(); ++i) ASSERT_EQ(out[i].bits, 0xFFFF) << "rows of no tile are not written";
    });
  }
}

// The contract of the scheduler: it decides by load which kernel a row meets, how prompts are cut and what shares a
// batch. None of it may show.
TEST(AttentionKernelsTest, ARowHasTheSameBitsInEitherKernelAndAnyTile) {
  for (const auto& [head_dim, fp8] : {std::pair{64, false}, {128, false}, {64, true}}) {
    const Shape shape{.kv_heads = 1, .head_dim = head_dim, .fp8 = fp8};
    constexpr int kLength = 530;  // three chunks
    const std::vector<int> positions = {0, 20, 62, 63, 64, 254, 255, 256, 300, 511, 512, 529};
    Cache cache(shape, {kLength}, 21);
    const std::vector<Bf16> all = RandomBf16(cache.random(), int64_t{kLength} * shape.width());
    Device whole(shape, cache, all);
    std::vector<PrefillTile> tiles;
    for (int first = 0; first < kLength; first += 21) tiles.push_back({first, std::min(21, kLength - first), 0, first});
    // Enough tiles to hold every position tested; the rest would only cost time.
    std::erase_if(tiles, [&](const PrefillTile& tile) {
      return std::none_of(positions.begin(), positions.end(), [&](int position) {
        return position >= tile.first_row && position < tile.first_row + tile.num_rows;
      });
    });
    const std::vector<Bf16> expected = whole.Prefill(tiles);
    for (const int position : positions) {
      const std::vector<Bf16> q(all.begin() + int64_t{position} * shape.width(),
                                all.begin() + int64_t{position + 1} * shape.width());
      Device single(shape, cache, q);
      const std::vector<Bf16> decoded = single.Decode({position + 1}, 1, 1);
      const std::vector<Bf16> prefilled = single.Prefill({{0, 1, 0, position}});
      for (int i = 0; i < shape.width(); ++i) {
        ASSERT_EQ(decoded[i].bits, expected[int64_t{position} * shape.width() + i].bits) << "decode, key " << position;
        ASSERT_EQ(prefilled[i].bits, decoded[i].bits) << "prefill alone, key " << position;
      }
    }
  }
}

// A key row that was not finite when it was stored reads as NaN, and only its own sequence sees it.
TEST(AttentionKernelsTest, ABrokenFp8RowReadsAsNan) {
  const Shape shape{.kv_heads = 1, .fp8 = true};
  Cache cache(shape, {70, 70}, 4);
  cache.BreakKey(0, 66);
  const std::vector<Bf16> q = RandomBf16(cache.random(), 2 * shape.width());
  const std::vector<Bf16> out = Device(shape, cache, q).Decode({70, 70}, 4, 4);
  for (int i = 0; i < shape.width(); ++i) {
    EXPECT_TRUE(std::isnan(HostFloat(out[i])));
    EXPECT_TRUE(std::isfinite(HostFloat(out[shape.width() + i])));
  }
}

TEST(AttentionKernelsTest, FewerBlocksThanItemsGiveTheSameBits) {
  const Shape shape{.kv_heads = 2};
  const std::vector<int> lengths = {300, 5, 600, 64};
  Cache cache(shape, lengths, 2);
  const std::vector<Bf16> q = RandomBf16(cache.random(), 4 * shape.width());
  Device device(shape, cache, q);
  const std::vector<Bf16> expected = device.Decode(lengths, 64, 64);
  for (const int blocks : {1, 3}) {
    const std::vector<Bf16> out = device.Decode(lengths, blocks, 1);
    for (size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i].bits, expected[i].bits);
  }
}

// 132 processors hold 3 blocks each at head_dim 128, 6 at 64: what recorded steps are launched with.
TEST(AttentionKernelsTest, AGridIsWhatFitsOnTheDevice) {
  AttentionParams params = {};
  params.cache.num_kv_heads = 8;
  params.group_size = 6;
  params.head_dim = 128;
  EXPECT_EQ(ResidentDecodeItems(params, 132), 49);  // 392 blocks for 396 places
  EXPECT_EQ(ResidentMergeRows(params, 132), 22);
  params.head_dim = 64;
  EXPECT_EQ(ResidentDecodeItems(params, 132), 99);
  EXPECT_EQ(ResidentDecodeItems(params, 1), 1);
  params.cache.num_kv_heads = 64;
  EXPECT_EQ(ResidentDecodeItems(params, 1), 1) << "one at least";
}

TEST(AttentionKernelsTest, ShapesWithoutAKernelAreRefused) {
  AttentionParams params = {};
  params.group_size = 9;
  params.head_dim = 64;
  EXPECT_EQ(DecodeAttention(params, nullptr, nullptr, nullptr, nullptr, 1, 1, TestStream()), cudaErrorInvalidValue);
  EXPECT_EQ(PrefillAttention(params, nullptr, 1, TestStream()), cudaErrorInvalidValue);
  params.group_size = 6;
  params.head_dim = 80;
  EXPECT_EQ(DecodeAttention(params, nullptr, nullptr, nullptr, nullptr, 1, 1, TestStream()), cudaErrorInvalidValue);
  EXPECT_EQ(PrefillAttention(params, nullptr, 1, TestStream()), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace minitron::engine::cuda
