// Hostile tokenizer.model files: each is refused with one line or loads and works. Run under ASan and UBSan as well.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <random>

#include "server/spm_model.h"
#include "server/utf8.h"
#include "tests/server/sentencepiece_reference.h"

namespace minitron::server {
namespace {

using ::testing::HasSubstr;

// Loads `data`; when that works, every entry point must too.
bool LoadAndUse(const std::string& data) {
  std::string error;
  const std::unique_ptr<SpmModel> model = SpmModel::Parse(data, &error);
  if (model == nullptr) {
    EXPECT_FALSE(error.empty());
    EXPECT_EQ(error.find('\n'), std::string::npos);
    EXPECT_TRUE(IsValidUtf8(error));
    return false;
  }
  for (const int id : model->Encode("the quick ＡＢ fox é \xFF <extra_id_1>\t")) {
    EXPECT_TRUE(id >= 0 && id < model->vocab_size());
    EXPECT_EQ(model->PieceToId(model->Piece(id)), id);
  }
  return true;
}

TEST(SpmHostileTest, FlippedBytesNeverCrash) {
  std::mt19937 random(21);
  int num_loaded = 0;
  int num_refused = 0;
  for (const char* path : {"tests/server/testdata/no_prefix.model", "tests/server/testdata/nfkc.model"}) {
    const std::string original = ReadSourceFile(path);
    for (int i = 0; i < 6000; ++i) {
      std::string data = original;
      for (int flips = 1 + random() % 4; flips > 0; --flips) data[random() % data.size()] = static_cast<char>(random());
      if (i % 2 == 0) data += std::string("\x12\x02\x18\x01", 4);  // unigram: the library builds a trie of the pieces
      (LoadAndUse(data) ? num_loaded : num_refused)++;
    }
  }
  EXPECT_GT(num_loaded, 100);
  EXPECT_GT(num_refused, 100);
}

TEST(SpmHostileTest, HostileCharacterMapsNeverCrash) {
  const std::string original = ReadSourceFile("tests/server/testdata/nfkc.model");
  const size_t map = original.find("user_defined");  // the normalizer's name; its map follows
  ASSERT_NE(map, std::string::npos);
  std::mt19937 random(22);
  for (int i = 0; i < 5000; ++i) {
    std::string data = original;
    for (int flips = 1 + random() % 16; flips > 0; --flips) {
      data[map + 15 + random() % (data.size() - map - 15)] = static_cast<char>(random());
    }
    LoadAndUse(data);
  }
}

TEST(SpmHostileTest, TruncationAtEveryByteNeverCrashes) {
  const std::string original = ReadSourceFile("tests/server/testdata/nfkc.model");
  for (size_t size = 0; size < original.size(); ++size) LoadAndUse(original.substr(0, size));
  std::string error;
  EXPECT_EQ(SpmModel::Parse("", &error), nullptr);
  EXPECT_THAT(error, HasSubstr("no pieces"));
}

TEST(SpmHostileTest, LengthsBeyondTheFileAreRefused) {
  for (const std::string& data :
       {std::string("\x0A\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01", 11), std::string("\x0A\x7F\x0A", 3),
        std::string(100, '\xFF'), std::string("\x0B\x0B\x0B", 3), std::string(3, '\0')}) {
    EXPECT_FALSE(LoadAndUse(data));
  }
}

// One piece: text, score, type.
std::string Piece(const std::string& text, float score, int type) {
  std::string body;
  body.push_back(0x0A);
  body.push_back(static_cast<char>(text.size()));
  body.append(text);
  body.push_back(0x15);
  body.append(reinterpret_cast<const char*>(&score), sizeof(score));
  body.push_back(0x18);
  body.push_back(static_cast<char>(type));
  std::string field;
  field.push_back(0x0A);
  field.push_back(static_cast<char>(body.size()));
  return field.append(body);
}

std::string ErrorOf(const std::string& pieces) {
  std::string error;
  const std::string bpe("\x12\x02\x18\x02", 4);
  EXPECT_EQ(SpmModel::Parse(pieces + bpe, &error), nullptr);
  return error;
}

TEST(SpmHostileTest, EachRuleIsNamedInItsRefusal) {
  const std::string unknown = Piece("<unk>", 0, 2);
  std::string error;
  EXPECT_NE(SpmModel::Parse(unknown + Piece("a", 0, 1) + std::string("\x12\x02\x18\x02", 4), &error), nullptr) << error;
  EXPECT_EQ(ErrorOf(unknown + Piece("", 0, 1)), "piece 1 is empty");
  EXPECT_EQ(ErrorOf(unknown + Piece("\xFF", 0, 1)), "piece 1 is not valid UTF-8");
  EXPECT_EQ(ErrorOf(unknown + Piece("a", std::numeric_limits<float>::quiet_NaN(), 1)),
            "piece 1 has a score that is not finite");
  EXPECT_EQ(ErrorOf(unknown + Piece("a", std::numeric_limits<float>::infinity(), 1)),
            "piece 1 has a score that is not finite");
  EXPECT_EQ(ErrorOf(unknown + Piece("a", 0, 7)), "piece 1 has an unknown type");
  EXPECT_EQ(ErrorOf(unknown + Piece("a", 0, 1) + Piece("a", 0, 1)), "piece 2 has the text of an earlier piece");
  EXPECT_EQ(ErrorOf(Piece("a", 0, 1)), "0 unknown pieces, exactly 1 needed");
  EXPECT_EQ(ErrorOf(unknown + Piece("<0xZZ>", 0, 6)), "piece 1 is a byte piece but not spelled <0xNN>");
  EXPECT_EQ(ErrorOf(unknown + Piece("<0x41>", 0, 6)), "byte pieces are there but byte_fallback is off");
  EXPECT_EQ(ErrorOf(unknown + Piece(std::string("a\0b", 3), 0, 1)), "piece 1 contains NUL");
  EXPECT_EQ(SpmModel::Parse(unknown + Piece("a", 0, 1) + std::string("\x12\x02\x18\x05", 4), &error), nullptr);
  EXPECT_EQ(error, "model type 5 outside [1, 4]");
}

TEST(SpmHostileTest, APieceOfOneCharacterThatIsSpecialIsNotGivenForThatCharacter) {
  for (const int type : {3, 4}) {
    std::string error;
    const std::unique_ptr<SpmModel> model =
        SpmModel::Parse(Piece("<unk>", 0, 2) + Piece("x", 0, type) + std::string("\x12\x02\x18\x02", 4), &error);
    ASSERT_NE(model, nullptr) << error;
    for (const int id : model->Encode("x")) EXPECT_EQ(id, 0);
    EXPECT_EQ(model->PieceToId("x"), 1);
  }
}

TEST(SpmHostileTest, TheNamesGivenToSpecialPiecesCollideWithNoPiece) {
  EXPECT_EQ(ErrorOf(Piece("<unk>", 0, 2) + Piece("<s>", 0, 3) + Piece("\xEF\xBF\xBFspecial 1", 0, 1)),
            "piece 2 has a name that the server needs");
}

TEST(SpmHostileTest, AFileOverTheLimitIsRefusedBeforeItIsParsed) {
  std::string error;
  EXPECT_EQ(SpmModel::Parse(std::string((64u << 20) + 1, '\0'), &error), nullptr);
  EXPECT_THAT(error, HasSubstr("limit 67108864"));
}

}  // namespace
}  // namespace minitron::server
