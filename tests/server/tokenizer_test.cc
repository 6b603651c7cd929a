#include "server/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "server/utf8.h"
#include "tests/server/sentencepiece_reference.h"

namespace minitron::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr EncodeOptions kPlain;
constexpr EncodeOptions kSpecial{.add_bos = false, .parse_special = true};
constexpr DecodeOptions kFromStart{.skip_special = true, .at_text_start = true};

// A model folder that holds one tokenizer of testdata/.
std::unique_ptr<Tokenizer> LoadFixture(const std::string& name) {
  const std::filesystem::path dir = std::filesystem::path(testing::TempDir()) / ("tokenizer_test_" + name);
  std::filesystem::create_directories(dir);
  std::ofstream(dir / "tokenizer.model", std::ios::binary)
      << ReadSourceFile("tests/server/testdata/" + name + ".model");
  auto tokenizer = Tokenizer::Load(dir.string(), 512);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return std::move(tokenizer).value();
}

std::unique_ptr<Tokenizer> LoadTiny() {
  auto tokenizer = Tokenizer::Load(MINITRON_SOURCE_DIR "/deploy/models/minitron-tiny", 2048);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return std::move(tokenizer).value();
}

TEST(TokenizerTest, TinyModelRoundTripsText) {
  const std::unique_ptr<Tokenizer> tokenizer = LoadTiny();
  EXPECT_EQ(tokenizer->num_pieces(), 2048);
  EXPECT_EQ(tokenizer->bos_id(), 2);
  for (const std::string text :
       {"To be or not to be, that is   the question\n", "\n\nnaïve 東京 \xF0\x9F\x98\x80", " ", ""}) {
    EXPECT_EQ(tokenizer->Decode(tokenizer->Encode(text, kPlain), kFromStart), text);
  }
}

TEST(TokenizerTest, BosIsAddedOnlyOnRequest) {
  const std::unique_ptr<Tokenizer> tokenizer = LoadTiny();
  const std::vector<TokenId> without = tokenizer->Encode("Hello", kPlain);
  std::vector<TokenId> with = tokenizer->Encode("Hello", {.add_bos = true, .parse_special = false});
  ASSERT_EQ(with.size(), without.size() + 1);
  EXPECT_EQ(with[0], 2);
  with.erase(with.begin());
  EXPECT_EQ(with, without);
  EXPECT_THAT(tokenizer->Encode("", {.add_bos = true, .parse_special = false}), ElementsAre(2));
  EXPECT_TRUE(tokenizer->Encode("", kPlain).empty());
}

TEST(TokenizerTest, SpecialSpellingsStayPlainTextUnlessAskedFor) {
  for (const char* name : {"prefix", "no_prefix"}) {
    const std::unique_ptr<Tokenizer> tokenizer = LoadFixture(name);
    const std::string text = "the <extra_id_1>fox</s> <extra_id_11> <s>";
    const std::vector<TokenId> plain = tokenizer->Encode(text, kPlain);
    for (const TokenId id : plain) EXPECT_FALSE(tokenizer->IsSpecial(id)) << id;
    EXPECT_EQ(tokenizer->Decode(plain, kFromStart), text);

    const std::vector<TokenId> parsed = tokenizer->Encode(text, kSpecial);
    std::vector<TokenId> special;
    for (const TokenId id : parsed) {
      if (tokenizer->IsSpecial(id)) special.push_back(id);
    }
    EXPECT_THAT(special, ElementsAre(5, 3, 15, 2)) << "longest spelling first: 15 is <extra_id_11>";
    EXPECT_EQ(tokenizer->Decode(parsed, {.skip_special = false, .at_text_start = true}), text);
    EXPECT_EQ(tokenizer->Decode(parsed, kFromStart), "the fox  ");
  }
}

TEST(TokenizerTest, ParsedUserDefinedPiecesEqualSentencepiece) {
  for (const char* name : {"prefix", "no_prefix"}) {
    const std::unique_ptr<Tokenizer> tokenizer = LoadFixture(name);
    const SentencePieceReference reference(ReadSourceFile(std::string("tests/server/testdata/") + name + ".model"));
    const std::vector<std::string> parts = {"<extra_id_1>", "<extra_id_11>", "the", " fox", " ", "\n", "<", "é"};
    std::mt19937 random(3);
    for (int i = 0; i < 3000; ++i) {
      std::string text =
          "the";  // plain start: before a special piece sentencepiece puts a lone dummy prefix, we do not
      for (int n = random() % 10; n > 0; --n) text += parts[random() % parts.size()];
      ASSERT_EQ(tokenizer->Encode(text, kSpecial), reference.Encode(text)) << text;
    }
  }
}

TEST(TokenizerTest, OnlyAPlainStartGetsTheDummyPrefix) {
  const std::unique_ptr<Tokenizer> tokenizer = LoadFixture("prefix");
  const TokenId e = tokenizer->spm().PieceToId("e");
  const TokenId space_the = tokenizer->spm().PieceToId("\xE2\x96\x81the");
  EXPECT_THAT(tokenizer->Encode("the<extra_id_0>e", kSpecial), ElementsAre(space_the, 4, e));
  EXPECT_THAT(tokenizer->Encode("<extra_id_0>e", kSpecial), ElementsAre(4, e));
}

TEST(TokenizerTest, ManyBracketsAreParsedInLinearTime) {
  const std::unique_ptr<Tokenizer> tokenizer = LoadFixture("no_prefix");
  EXPECT_FALSE(tokenizer->Encode(std::string(1'000'000, '<'), kSpecial).empty());
}

TEST(TokenizerTest, DecodeEqualsSentencepieceOnEncodedText) {
  for (const char* name : {"prefix", "no_prefix", "nfkc"}) {
    const std::unique_ptr<Tokenizer> tokenizer = LoadFixture(name);
    const SentencePieceReference reference(ReadSourceFile(std::string("tests/server/testdata/") + name + ".model"));
    const std::vector<std::string> parts = {"the", " fox", " ", "  ", "\n", "é", "東", "\xF0\x9F\x98\x80", "?", "Q"};
    std::mt19937 random(4);
    for (int i = 0; i < 3000; ++i) {
      std::string text;
      for (int n = random() % 12; n > 0; --n) text += parts[random() % parts.size()];
      const std::vector<TokenId> ids = tokenizer->Encode(text, kPlain);
      ASSERT_EQ(tokenizer->Decode(ids, {.skip_special = false, .at_text_start = true}), reference.Decode(ids)) << text;
    }
  }
}

TEST(TokenizerTest, DecodeEqualsSentencepieceOnRandomPieces) {
  for (const char* name : {"prefix", "no_prefix", "nfkc"}) {
    const std::unique_ptr<Tokenizer> tokenizer = LoadFixture(name);
    const SentencePieceReference reference(ReadSourceFile(std::string("tests/server/testdata/") + name + ".model"));
    std::vector<TokenId> choices;  // ill-formed bytes and control pieces are where the two differ on purpose
    for (TokenId id = 0; id < tokenizer->num_pieces(); ++id) {
      const SpmModel::PieceType type = tokenizer->spm().Type(id);
      if (type == SpmModel::PieceType::kControl || !IsValidUtf8(tokenizer->TokenBytes(id, false))) continue;
      choices.push_back(id);
    }
    std::mt19937 random(5);
    for (int i = 0; i < 5000; ++i) {
      std::vector<TokenId> ids(random() % 8);
      for (TokenId& id : ids) id = choices[random() % choices.size()];
      ASSERT_EQ(tokenizer->Decode(ids, {.skip_special = false, .at_text_start = true}), reference.Decode(ids))
          << name << " round " << i;
    }
  }
}

TEST(TokenizerTest, TokenBytesCoversEveryId) {
  const std::unique_ptr<Tokenizer> tokenizer = LoadFixture("prefix");
  EXPECT_EQ(tokenizer->TokenBytes(5, false), "<extra_id_1>");
  EXPECT_EQ(tokenizer->TokenBytes(5, true), "");
  EXPECT_EQ(tokenizer->TokenBytes(2, false), "<s>");
  EXPECT_EQ(tokenizer->TokenBytes(tokenizer->spm().PieceToId("<0x0A>"), true), "\n");
  EXPECT_EQ(tokenizer->TokenBytes(tokenizer->spm().PieceToId("<0x00>"), true), std::string(1, '\0'));
  EXPECT_EQ(tokenizer->TokenBytes(tokenizer->spm().PieceToId("\xE2\x96\x81the"), true), " the");
  for (const TokenId id : {-1, 500, 511, 1 << 30}) {
    EXPECT_EQ(tokenizer->TokenBytes(id, false), "") << id;
    EXPECT_FALSE(tokenizer->IsSpecial(id));
  }
  EXPECT_EQ(tokenizer->vocab_size(), 512);
}

TEST(TokenizerTest, GeneratedTextKeepsItsLeadingSpace) {
  const std::unique_ptr<Tokenizer> tokenizer = LoadFixture("prefix");
  const TokenId space_the = tokenizer->spm().PieceToId("\xE2\x96\x81the");
  EXPECT_EQ(tokenizer->Decode({space_the, space_the}, {.skip_special = true, .at_text_start = false}), " the the");
  EXPECT_EQ(tokenizer->Decode({space_the, space_the}, kFromStart), "the the");
  EXPECT_EQ(tokenizer->Decode({2, space_the}, kFromStart), "the") << "a skipped BOS does not count as text";
}

TEST(TokenizerTest, LoadRefusesWhatIsMissingOrTooLarge) {
  EXPECT_EQ(Tokenizer::Load("/nowhere", 10).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(Tokenizer::Load("/nowhere", 10).status().message()), HasSubstr("/nowhere/tokenizer.model"));
  const absl::Status status = Tokenizer::Load(MINITRON_SOURCE_DIR "/deploy/models/minitron-tiny", 2047).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("2048 pieces, but the model's vocabulary has 2047"));
}

TEST(TokenizerTest, LoadNamesTheFileAndTheCause) {
  const std::filesystem::path dir = std::filesystem::path(testing::TempDir()) / "tokenizer_test_bad";
  std::filesystem::remove_all(dir);
  std::filesystem::create_directories(dir / "tokenizer.model");
  EXPECT_THAT(std::string(Tokenizer::Load(dir.string(), 512).status().message()), HasSubstr("not a regular file"));
  std::filesystem::remove(dir / "tokenizer.model");
  std::ofstream(dir / "tokenizer.model") << "{\"no\": \"tokenizer\"}";
  const absl::Status status = Tokenizer::Load(dir.string(), 512).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("tokenizer.model: not a sentencepiece model"));
}

TEST(TokenizerTest, APinIsComparedBeforeAnythingLooksAtTheBytes) {
  const std::filesystem::path dir = std::filesystem::path(testing::TempDir()) / "tokenizer_test_pin";
  std::filesystem::create_directories(dir);
  std::ofstream(dir / "tokenizer.model") << "abc";  // FIPS 180-2, B.1
  const std::string digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
  const std::string other(64, '0');
  const absl::Status refused = Tokenizer::Load(dir.string(), 512, other).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(std::string(refused.message()),
            "--tokenizer-sha256=" + other + ": " + (dir / "tokenizer.model").string() + " has " + digest);
  const absl::Status parsed = Tokenizer::Load(dir.string(), 512, digest).status();
  EXPECT_EQ(parsed.code(), absl::StatusCode::kInvalidArgument) << "the right bytes, but no tokenizer: " << parsed;
}

}  // namespace
}  // namespace minitron::server
