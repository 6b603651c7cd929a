#include "server/detokenizer.h"

#include <gtest/gtest.h>

#include <cwchar>
#include <random>

namespace minitron::server {
namespace {

// An independent check of well-formedness: decode to a code point, then compare with its only encoding.
bool WellFormed(const std::string& text) {
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&](size_t k) { return i + k < text.size() ? static_cast<unsigned char>(text[i + k]) : 0u; };
    const unsigned lead = byte(0);
    const size_t length = lead < 0x80 ? 1 : (lead >> 5) == 6 ? 2 : (lead >> 4) == 14 ? 3 : (lead >> 3) == 30 ? 4 : 0;
    if (length == 0 || i + length > text.size()) return false;
    unsigned point = length == 1 ? lead : lead & (0x7Fu >> length);
    for (size_t k = 1; k < length; ++k) {
      if ((byte(k) & 0xC0) != 0x80) return false;
      point = point << 6 | (byte(k) & 0x3F);
    }
    const size_t shortest = point < 0x80 ? 1 : point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
    if (shortest != length || point > 0x10FFFF || (point >= 0xD800 && point <= 0xDFFF)) return false;
    i += length;
  }
  return true;
}

std::string Convert(const std::string& bytes) {
  std::string held;
  std::string out;
  AppendUtf8(held, bytes, out);
  if (!held.empty()) out.append(kReplacementCharacter);
  return out;
}

const std::string kR(kReplacementCharacter);

TEST(Utf8Test, EachMaximalIllFormedPartBecomesOneReplacement) {
  // The example of the Unicode Standard, table 3-8, and its neighbours 3-9 to 3-11.
  EXPECT_EQ(Convert("\x61\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64"),
            "a" + kR + kR + kR + "b" + kR + "c" + kR + kR + "d");
  EXPECT_EQ(Convert("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"), kR + kR + kR + kR + kR + kR + kR + kR + "A");
  EXPECT_EQ(Convert("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"), kR + kR + kR + kR + kR + kR + kR + kR + "A");
  EXPECT_EQ(Convert("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"), kR + kR + kR + kR + kR + "A" + kR + kR + "B");
  EXPECT_EQ(Convert("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), kR + kR + kR + kR + "A");
  EXPECT_EQ(Convert("\xF0\x9F\x98"), kR);
}

TEST(Utf8Test, OutputIsWellFormedAndTheSameForEveryChunking) {
  std::mt19937 random(7);
  const std::string alphabet = "a\x80\xBF\xC2\xE0\xA0\xE2\x96\x81\xED\x9F\xEF\xBB\xF0\x9F\x98\xF4\x8F\xFF";
  for (int i = 0; i < 20000; ++i) {
    std::string bytes(random() % 12, ' ');
    for (char& c : bytes) c = alphabet[random() % alphabet.size()];
    const std::string whole = Convert(bytes);
    ASSERT_TRUE(WellFormed(whole));
    if (WellFormed(bytes)) {
      ASSERT_EQ(whole, bytes);
    }
    std::string held;
    std::string out;
    for (size_t at = 0; at < bytes.size();) {
      const size_t length = 1 + random() % 3;
      AppendUtf8(held, std::string_view(bytes).substr(at, length), out);
      ASSERT_LE(held.size(), 3u);
      ASSERT_TRUE(WellFormed(out));
      at += length;
    }
    if (!held.empty()) out.append(kReplacementCharacter);
    ASSERT_EQ(out, whole);
  }
}

class DetokenizerTest : public testing::Test {
 protected:
  void SetUp() override {
    auto loaded = Tokenizer::Load(MINITRON_SOURCE_DIR "/deploy/models/minitron-tiny", 2064);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    tokenizer_ = std::move(loaded).value();
  }

  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(DetokenizerTest, DeltasConcatenateToTheWholeDecode) {
  std::mt19937 random(8);
  const TokenId first_byte = tokenizer_->spm().PieceToId("<0x00>");
  for (int i = 0; i < 20000; ++i) {
    std::vector<TokenId> ids(random() % 20);
    // Half bytes (most of them ill-formed together), the rest any id, padding and special ids included.
    for (TokenId& id : ids) id = random() % 2 == 0 ? first_byte + random() % 256 : random() % 2064;
    const DecodeOptions options{.skip_special = random() % 2 == 0, .at_text_start = random() % 2 == 0};
    Detokenizer detokenizer(tokenizer_.get(), options);
    std::string text;
    for (const TokenId id : ids) {
      const std::string delta = detokenizer.Append(id);
      ASSERT_TRUE(WellFormed(delta));
      text += delta;
    }
    text += detokenizer.Finish();
    ASSERT_EQ(text, tokenizer_->Decode(ids, options));
  }
}

TEST_F(DetokenizerTest, ACharacterSplitOverTokensArrivesWholeWithItsLastByte) {
  const TokenId first_byte = tokenizer_->spm().PieceToId("<0x00>");
  Detokenizer detokenizer(tokenizer_.get(), {});
  EXPECT_EQ(detokenizer.Append(first_byte + 0xF0), "");
  EXPECT_EQ(detokenizer.Append(first_byte + 0x9F), "");
  EXPECT_EQ(detokenizer.Append(first_byte + 0x98), "");
  EXPECT_EQ(detokenizer.Append(first_byte + 0x80), "\xF0\x9F\x98\x80");
  EXPECT_EQ(detokenizer.Append(first_byte + 0xE2), "");
  EXPECT_EQ(detokenizer.Append(first_byte + 'a'), kR + "a");
  EXPECT_EQ(detokenizer.Append(first_byte + 0xE2), "");
  EXPECT_EQ(detokenizer.Finish(), kR);
}

}  // namespace
}  // namespace minitron::server
