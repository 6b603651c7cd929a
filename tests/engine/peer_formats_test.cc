#include "tests/engine/peer_formats.h"

#include <array>

#include "gtest/gtest.h"

namespace minitron::engine {
namespace {

using Block = std::array<float, kPeerBlock>;

TEST(PeerFormatsTest, Q80KeepsTheLargestAndRoundsTheRestToItsHundredAndTwentySeventh) {
  Block block{};
  block[0] = -127.0f, block[1] = 0.49f, block[2] = 0.5f, block[3] = -1.5f, block[4] = 3.0f;
  RoundThroughQ80(block.data(), kPeerBlock);
  EXPECT_EQ(block, (Block{-127.0f, 0.0f, 1.0f, -2.0f, 3.0f}));  // the scale is 1
}

TEST(PeerFormatsTest, Q80RoundsItsScaleToFp16AfterTheNumbersWereDividedByIt) {
  Block block{};
  block[0] = 127.0f * (1.0f + 0x1.8p-11f);  // fp16 has 10 bits behind the point
  RoundThroughQ80(block.data(), kPeerBlock);
  EXPECT_EQ(block[0], 127.0f * (1.0f + 0x1p-10f));
}

TEST(PeerFormatsTest, ScalesBelowTheNormalNumbersOfFp16AreMultiplesOfItsSmallest) {
  Block block{};
  block[0] = 127.0f * 0x1.2p-22f;  // 4.5 times 2^-24
  RoundThroughQ80(block.data(), kPeerBlock);
  EXPECT_EQ(block[0], 127.0f * 0x1p-22f);
}

TEST(PeerFormatsTest, Q40MakesTheExtremeMinusEightAndCutsTheOtherSideAtSeven) {
  Block block{};
  block[0] = 8.0f, block[1] = -8.0f, block[2] = -6.6f, block[3] = 0.4f, block[4] = 2.6f;
  RoundThroughQ40(block.data(), kPeerBlock);
  EXPECT_EQ(block, (Block{8.0f, -7.0f, -7.0f, 0.0f, 3.0f}));  // the scale is -1
}

TEST(PeerFormatsTest, BlocksHaveScalesOfTheirOwnAndZerosStayZero) {
  std::array<float, 3 * kPeerBlock> numbers{};
  numbers[0] = 127.0f, numbers[1] = 0.3f;
  numbers[kPeerBlock] = 12.7f, numbers[kPeerBlock + 1] = 0.3f;
  std::array<float, 3 * kPeerBlock> four_bits = numbers;
  RoundThroughQ80(numbers.data(), numbers.size());
  EXPECT_EQ(numbers[1], 0.0f);
  EXPECT_NEAR(numbers[kPeerBlock + 1], 0.3f, 1e-4f);
  EXPECT_EQ(numbers[2 * kPeerBlock], 0.0f);
  RoundThroughQ40(four_bits.data(), four_bits.size());
  EXPECT_EQ(four_bits[2 * kPeerBlock], 0.0f);
}

TEST(PeerFormatsTest, Bf16RoundsHalfToEven) {
  Block block{};
  block[0] = 1.0f + 0x1p-8f, block[1] = 1.0f + 0x3p-8f, block[2] = -1.0f - 0x1.1p-8f;
  RoundThroughBf16(block.data(), kPeerBlock);
  EXPECT_EQ(block, (Block{1.0f, 1.0f + 0x1p-6f, -1.0f - 0x1p-7f}));
}

}  // namespace
}  // namespace minitron::engine
