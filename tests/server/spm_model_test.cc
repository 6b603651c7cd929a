// SpmModel against the real sentencepiece, over the models of testdata/ and the one that ships.
#include "server/spm_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "tests/server/sentencepiece_reference.h"

namespace minitron::server {
namespace {

using ::testing::HasSubstr;

const char* const kModels[] = {"tests/server/testdata/prefix.model", "tests/server/testdata/no_prefix.model",
                               "tests/server/testdata/nfkc.model", "deploy/models/minitron-tiny/tokenizer.model"};

std::unique_ptr<SpmModel> Parse(const std::string& data) {
  std::string error;
  std::unique_ptr<SpmModel> model = SpmModel::Parse(data, &error);
  EXPECT_NE(model, nullptr) << error;
  return model;
}

// Random text of words, spaces, specials' spellings, multi-byte characters and, now and then, invalid bytes.
std::string RandomText(std::mt19937& random, bool valid) {
  static const std::vector<std::string> kParts = {" ",
                                                  "  ",
                                                  "\n",
                                                  "\t",
                                                  "the",
                                                  "be",
                                                  "question",
                                                  "extra",
                                                  "_id_",
                                                  "1",
                                                  "20",
                                                  "<",
                                                  ">",
                                                  "/",
                                                  "</s>",
                                                  "<s>",
                                                  "<unk>",
                                                  "<pad>",
                                                  "<extra_id_1>",
                                                  "<extra_id_11>",
                                                  "<0x41>",
                                                  "é",
                                                  "ü",
                                                  "東京",
                                                  "\xF0\x9F\x98\x80",
                                                  "ＡＢ",
                                                  "　",
                                                  "ﬁ",
                                                  "\xE2\x80\x8D",
                                                  "\xE2\x96\x81",
                                                  "e\xCC\x81",
                                                  ".",
                                                  ",",
                                                  "X",
                                                  "q",
                                                  std::string(1, '\0')};
  static const std::vector<std::string> kBad = {"\xFF", "\xC3", "\xE2\x96", "\xED\xA0\x80", "\xC0\x80", "\x80"};
  std::string text;
  const int parts = random() % 24;
  for (int i = 0; i < parts; ++i) {
    text += !valid && random() % 4 == 0 ? kBad[random() % kBad.size()] : kParts[random() % kParts.size()];
  }
  return text;
}

TEST(SpmModelTest, EncodeEqualsSentencepieceWithUserDefinedPiecesAsControl) {
  for (const char* path : kModels) {
    const std::string data = ReadSourceFile(path);
    const std::unique_ptr<SpmModel> model = Parse(data);
    ASSERT_NE(model, nullptr) << path;
    const SentencePieceReference reference(WithUserDefinedAsControl(data));
    std::mt19937 random(1);
    for (int i = 0; i < 5000; ++i) {
      const std::string text = RandomText(random, /*valid=*/i % 2 == 0);
      ASSERT_EQ(model->Encode(text), reference.Encode(text)) << path << " round " << i;
    }
  }
}

// The last model type in a file counts.
std::string WithModelType(const std::string& data, char type) { return data + "\x12\x02\x18" + type; }

TEST(SpmModelTest, UnigramAndCharacterModelsEncodeAsSentencepieceToo) {
  for (const char* path : kModels) {
    for (const char type : {1, 4}) {
      const std::string data = WithModelType(ReadSourceFile(path), type);
      const std::unique_ptr<SpmModel> model = Parse(data);
      ASSERT_NE(model, nullptr) << path;
      const SentencePieceReference reference(WithUserDefinedAsControl(data));
      std::mt19937 random(6);
      for (int i = 0; i < 1000; ++i) {
        const std::string text = RandomText(random, /*valid=*/i % 2 == 0);
        ASSERT_EQ(model->Encode(text), reference.Encode(text)) << path << " type " << int{type} << " round " << i;
      }
    }
  }
}

TEST(SpmModelTest, EncodeWithoutSpecialSpellingsEqualsSentencepieceItself) {
  for (const char* path : kModels) {
    const std::string data = ReadSourceFile(path);
    const std::unique_ptr<SpmModel> model = Parse(data);
    ASSERT_NE(model, nullptr) << path;
    const SentencePieceReference reference(data);
    std::mt19937 random(2);
    for (int i = 0; i < 5000; ++i) {
      const std::string text = RandomText(random, /*valid=*/true);
      if (text.find("<extra_id_") != std::string::npos) continue;
      ASSERT_EQ(model->Encode(text), reference.Encode(text)) << path << " round " << i;
    }
  }
}

TEST(SpmModelTest, EncodeNeverGivesAControlOrUserDefinedPiece) {
  for (const char* path : kModels) {
    for (const char type : {1, 2, 3, 4}) {
      const std::unique_ptr<SpmModel> model = Parse(WithModelType(ReadSourceFile(path), type));
      ASSERT_NE(model, nullptr) << path;
      std::vector<std::string> texts = {""};
      for (int id = 0; id < model->vocab_size(); ++id) {
        texts[0] += model->Piece(id);
        texts.push_back(model->Piece(id));
      }
      for (const std::string& text : texts) {
        for (const int id : model->Encode(text)) {
          ASSERT_NE(model->Type(id), SpmModel::PieceType::kControl) << text;
          ASSERT_NE(model->Type(id), SpmModel::PieceType::kUserDefined) << text;
        }
      }
    }
  }
}

TEST(SpmModelTest, APartInTheMiddleGetsNoDummyPrefix) {
  const std::unique_ptr<SpmModel> prefix = Parse(ReadSourceFile(kModels[0]));
  ASSERT_NE(prefix, nullptr);
  const std::vector<int> middle = prefix->Encode("the", false);
  EXPECT_EQ(prefix->Piece(middle[0]), "t");
  EXPECT_EQ(prefix->Encode("the", true), std::vector<int>{prefix->PieceToId("\xE2\x96\x81the")});
  EXPECT_EQ(prefix->Encode("the"), prefix->Encode(" the", false));
}

TEST(SpmModelTest, FlagsAndIdsComeFromTheFile) {
  const std::unique_ptr<SpmModel> prefix = Parse(ReadSourceFile(kModels[0]));
  EXPECT_TRUE(prefix->flags().add_dummy_prefix);
  EXPECT_TRUE(prefix->flags().byte_fallback);
  EXPECT_FALSE(prefix->flags().remove_extra_whitespaces);
  EXPECT_EQ(prefix->flags().normalizer, "identity");
  EXPECT_EQ(prefix->pad_id(), 0);
  EXPECT_EQ(prefix->unk_id(), 1);
  EXPECT_EQ(prefix->bos_id(), 2);
  EXPECT_EQ(prefix->eos_id(), 3);
  EXPECT_EQ(prefix->PieceToId("<extra_id_1>"), 5);
  EXPECT_EQ(prefix->Type(5), SpmModel::PieceType::kUserDefined);
  EXPECT_EQ(prefix->PieceToId("no such piece"), -1);
  EXPECT_FALSE(Parse(ReadSourceFile(kModels[1]))->flags().add_dummy_prefix);
  const std::unique_ptr<SpmModel> nfkc = Parse(ReadSourceFile(kModels[2]));
  EXPECT_FALSE(nfkc->flags().byte_fallback);
  EXPECT_TRUE(nfkc->flags().remove_extra_whitespaces);
}

TEST(SpmModelTest, LongTextOfOneCharacterCostsLittleMoreThanItsLength) {
  const std::unique_ptr<SpmModel> model = Parse(ReadSourceFile(kModels[1]));
  // A quadratic merge loop would take minutes here and run into the test's time limit.
  EXPECT_FALSE(model->Encode(std::string(2'000'000, 'e')).empty());
}

}  // namespace
}  // namespace minitron::server
