// safetensors: the format is read, every malformed header and layout is refused, nothing crashes.
#include "engine/checkpoint/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>

#include "tests/engine/model_files.h"

namespace minitron::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::Raw;
using testing::Safetensors;

absl::StatusOr<std::vector<StoredTensor>> Parse(const std::string& bytes) {
  // An exact heap copy, so that a sanitizer sees a read past the end.
  const std::vector<uint8_t> exact(bytes.begin(), bytes.end());
  return ParseSafetensors(exact.data(), static_cast<int64_t>(exact.size()), "f.safetensors");
}

void ExpectRefused(const std::string& bytes, const std::string& why) {
  const auto tensors = Parse(bytes);
  ASSERT_FALSE(tensors.ok()) << "not refused: " << why;
  EXPECT_EQ(tensors.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(tensors.status().message()), HasSubstr("f.safetensors: "));
  EXPECT_THAT(std::string(tensors.status().message()), HasSubstr(why));
}

// One tensor "w" with the given members, over twelve data bytes.
std::string OneTensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  const std::string header =
      R"({"w": {"dtype": )" + dtype + R"(, "shape": )" + shape + R"(, "data_offsets": )" + offsets + "}}";
  return Safetensors(header, std::string(12, 'x'));
}

TEST(Safetensors, ReadsEveryDType) {
  const std::string header =
      R"({"__metadata__": {"format": "pt"}, "b": {"dtype": "BF16", "shape": [3], "data_offsets": [4, 10]},)"
      R"("a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},)"
      R"("empty": {"dtype": "F32", "shape": [0, 5], "data_offsets": [10, 10]},)"
      R"("c": {"dtype": "F16", "shape": [1, 1], "data_offsets": [10, 12]}}   )";
  const auto tensors = Parse(Safetensors(header, std::string(12, 'x')));
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 4u);
  EXPECT_EQ((*tensors)[0].name, "b");
  EXPECT_EQ((*tensors)[0].dtype, DType::kBf16);
  EXPECT_THAT((*tensors)[0].shape, ElementsAre(3));
  EXPECT_EQ((*tensors)[0].offset, static_cast<int64_t>(8 + header.size() + 4));
  EXPECT_EQ((*tensors)[0].num_bytes, 6);
  EXPECT_THAT((*tensors)[1].shape, ElementsAre());
  EXPECT_EQ((*tensors)[2].num_bytes, 0);
  EXPECT_EQ((*tensors)[3].dtype, DType::kF16);
}

TEST(Safetensors, ReadsABytePerNumber) {
  const auto tensors = Parse(OneTensor("\"F8_E4M3\"", "[3, 4]", "[0, 12]"));
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  EXPECT_EQ((*tensors)[0].dtype, DType::kE4m3);
  EXPECT_EQ((*tensors)[0].num_bytes, 12);
  ExpectRefused(OneTensor("\"F8_E4M3\"", "[3, 4]", "[0, 11]"), "of fp8 takes 12 bytes, data_offsets span 11");
}

TEST(Safetensors, RefusesWrongHeaderLengths) {
  const std::string body = R"({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}})" + std::string(12, 'x');
  ExpectRefused("", "too short");
  ExpectRefused("1234567", "too short");
  ExpectRefused(Raw<uint64_t>(0) + body, "does not start with '{'");
  ExpectRefused(Raw<uint64_t>(7) + body, "not valid JSON");
  ExpectRefused(Raw<uint64_t>(body.size() + 1) + body, "truncated");
  ExpectRefused(Raw<uint64_t>(100'000'000) + body, "truncated");
  ExpectRefused(Raw<uint64_t>(100'000'001) + body, "header of 100000001 bytes, limit 100000000");
  ExpectRefused(Raw<uint64_t>(uint64_t{1} << 63) + body, "limit 100000000");
  ExpectRefused(Raw<uint64_t>(~uint64_t{0}) + body, "limit 100000000");
  ExpectRefused(Raw<uint64_t>(~uint64_t{0} - 7) + body, "limit 100000000");
}

TEST(Safetensors, TruncationAtEveryByteIsRefused) {
  const std::string bytes =
      testing::ReadFile(std::string(MINITRON_SOURCE_DIR) + "/deploy/models/minitron-tiny/model.safetensors");
  ASSERT_TRUE(Parse(bytes).ok());
  for (size_t length = 0; length < 4096; ++length) ASSERT_FALSE(Parse(bytes.substr(0, length)).ok()) << length;
  std::mt19937 random(1);
  for (int round = 0; round < 40; ++round) {
    const size_t length = random() % bytes.size();
    // The pages of the cut file, without copying them: the parser never touches tensor data.
    const auto cut =
        ParseSafetensors(reinterpret_cast<const uint8_t*>(bytes.data()), static_cast<int64_t>(length), "f");
    ASSERT_FALSE(cut.ok()) << length;
  }
}

TEST(Safetensors, RefusesShapesThatOverflow) {
  const std::string big = "4294967296";
  ExpectRefused(OneTensor("\"F32\"", "[" + big + ", " + big + "]", "[0, 12]"), "overflows 63 bits");
  ExpectRefused(OneTensor("\"F32\"", "[4611686018427387904]", "[0, 12]"), "overflows 63 bits");
  ExpectRefused(OneTensor("\"F32\"", "[0, " + big + ", " + big + "]", "[0, 0]"), "overflows 63 bits");
  ExpectRefused(OneTensor("\"BF16\"", "[9223372036854775807]", "[0, 12]"), "overflows 63 bits");
  ExpectRefused(OneTensor("\"BF16\"", "[9223372036854775808]", "[0, 12]"), "not a list");
  ExpectRefused(OneTensor("\"F32\"", "[-3]", "[0, 12]"), "not a list");
  ExpectRefused(OneTensor("\"F32\"", "[-1, -3]", "[0, 12]"), "not a list");
  ExpectRefused(OneTensor("\"F32\"", "[3.0]", "[0, 12]"), "not a list");
  ExpectRefused(OneTensor("\"F32\"", "[1, 1, 1, 1, 1, 1, 1, 1, 3]", "[0, 12]"), "up to 8 sizes");
  std::string million = "[1";
  for (int i = 0; i < 1'000'000; ++i) million += ",1";
  ExpectRefused(OneTensor("\"F32\"", million + "]", "[0, 12]"), "up to 8 sizes");
}

TEST(Safetensors, RefusesWrongOffsets) {
  ExpectRefused(OneTensor("\"F32\"", "[3]", "[12, 0]"), "outside the 12 data bytes");
  ExpectRefused(OneTensor("\"F32\"", "[3]", "[0, 16]"), "outside the 12 data bytes");
  ExpectRefused(OneTensor("\"F32\"", "[3]", "[9223372036854775804, 9223372036854775807]"), "outside");
  ExpectRefused(OneTensor("\"F32\"", "[3]", "[-12, 0]"), "not a pair");
  ExpectRefused(OneTensor("\"F32\"", "[3]", "[0, 18446744073709551615]"), "not a pair");
  ExpectRefused(OneTensor("\"F32\"", "[3]", "[0]"), "not a pair");
  ExpectRefused(OneTensor("\"F32\"", "[3]", "[0, 12, 12]"), "not a pair");
  ExpectRefused(OneTensor("\"F32\"", "[2]", "[0, 12]"), "takes 8 bytes, data_offsets span 12");
  ExpectRefused(OneTensor("\"F32\"", "[2]", "[0, 8]"), "4 bytes after the last tensor");
  ExpectRefused(OneTensor("\"F32\"", "[2]", "[4, 12]"), "(hole)");
  ExpectRefused(OneTensor("\"F32\"", "[0]", "[4, 4]"), "(hole)");
}

TEST(Safetensors, RefusesOverlapsHolesAndTrailingBytes) {
  const auto two = [](const std::string& first, const std::string& second, int data_bytes) {
    return Safetensors(R"({"a": {"dtype": "BF16", "shape": [3], "data_offsets": )" + first +
                           R"(}, "b": {"dtype": "BF16", "shape": [3], "data_offsets": )" + second + "}}",
                       std::string(data_bytes, 'x'));
  };
  EXPECT_TRUE(Parse(two("[0, 6]", "[6, 12]", 12)).ok());
  EXPECT_TRUE(Parse(two("[6, 12]", "[0, 6]", 12)).ok());
  ExpectRefused(two("[0, 6]", "[4, 10]", 12), "(overlap)");
  ExpectRefused(two("[0, 6]", "[0, 6]", 12), "(overlap)");
  ExpectRefused(two("[0, 6]", "[8, 14]", 14), "(hole)");
  ExpectRefused(two("[0, 6]", "[6, 12]", 13), "1 bytes after the last tensor");
  ExpectRefused(Safetensors("{}", "x"), "1 bytes after the last tensor");
  EXPECT_TRUE(Parse(Safetensors("{}", "")).ok());
}

TEST(Safetensors, RefusesOtherDTypesByName) {
  for (const std::string dtype : {"F64", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL", "bf16", ""}) {
    ExpectRefused(OneTensor("\"" + dtype + "\"", "[3]", "[0, 12]"), "dtype \"" + dtype + "\", supported");
  }
  ExpectRefused(OneTensor("32", "[3]", "[0, 12]"), "dtype 32, supported");
}

TEST(Safetensors, RefusesHeadersThatAreNotTheFormat) {
  const std::string good = R"({"dtype": "F32", "shape": [3], "data_offsets": [0, 12]})";
  const auto header = [](const std::string& text) { return Safetensors(text, std::string(12, 'x')); };
  EXPECT_TRUE(Parse(header("{\"w\": " + good + "}")).ok());
  ExpectRefused(header(" {\"w\": " + good + "}"), "does not start with '{'");
  ExpectRefused(header("[" + good + "]"), "does not start with '{'");
  ExpectRefused(header("{\"w\": " + good + ", \"w\": " + good + "}"), "duplicate key \"w\"");
  ExpectRefused(header("{\"w\": " + good + "} {}"), "not valid JSON");
  ExpectRefused(header("{\"w\": " + good + "}" + std::string(1, '\0') + "x"), "NUL");
  ExpectRefused(header("{\"w\": " + good + ",}"), "not valid JSON");
  ExpectRefused(header("{\"w\": 7}"), "needs exactly");
  ExpectRefused(header(R"({"w": {"dtype": "F32", "shape": [3]}})"), "needs exactly");
  ExpectRefused(header(R"({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12], "x": 1}})"), "needs exactly");
  ExpectRefused(header(R"({"w": {"dtype": "F32", "dtype": "F32", "shape": [3]}})"), "duplicate key \"dtype\"");
  ExpectRefused(header(R"({"w": {"dtype": "F32", "shape": [3], "offsets": [0, 12]}})"), "data_offsets missing");
  ExpectRefused(header("{\"a\\u0000b\": " + good + "}"), "NUL");
  ExpectRefused(header("{\"\": " + good + "}"), "name is empty");
  ExpectRefused(header("{\"" + std::string(1 << 20, 'n') + "\": " + good + "}"), "over 4096 bytes");
  ExpectRefused(header("{\"\xff\": " + good + "}"), "not valid JSON");
  ExpectRefused(header("{\"\\ud800\": " + good + "}"), "not valid JSON");
  ExpectRefused(header(R"({"__metadata__": 7})"), "__metadata__ 7");
  ExpectRefused(header(R"({"__metadata__": {"a": 1}})"), "__metadata__.a 1 is not a string");
  std::string deep = "{\"w\": ";
  for (int i = 0; i < 100'000; ++i) deep += "{\"a\": ";
  ExpectRefused(header(deep), "nested deeper than 64");
}

TEST(Safetensors, AHundredThousandTensorsAreReadAndOneMoreIsRefused) {
  const auto file = [](int count) {
    std::string header = "{";
    for (int i = 0; i < count; ++i) {
      const std::string begin = std::to_string(2 * i), end = std::to_string(2 * i + 2);
      header += (i == 0 ? "\"t" : ",\"t") + std::to_string(i) + R"(":{"dtype":"BF16","shape":[1],"data_offsets":[)" +
                begin + "," + end + "]}";
    }
    return Safetensors(header + "}", std::string(2 * count, 'x'));
  };
  const auto tensors = Parse(file(100'000));
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  EXPECT_EQ(tensors->size(), 100'000u);
  ExpectRefused(file(100'001), "limit 100000");
}

TEST(Safetensors, MetadataOfAMillionKeysIsReadOrRefusedByCount) {
  const auto file = [](int count) {
    std::string header = R"({"__metadata__":{)";
    for (int i = 0; i < count; ++i) header += (i == 0 ? "\"k" : ",\"k") + std::to_string(i) + R"(":"")";
    return Safetensors(header + "}}", "");
  };
  EXPECT_TRUE(Parse(file(1'000'000)).ok());
  ExpectRefused(file(1'600'000), "more than 1500000 values");
}

TEST(Safetensors, RandomDamageNeverReachesOutsideTheFile) {
  const std::string original = Safetensors(
      R"({"__metadata__": {"format": "pt"}, "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},)"
      R"("b": {"dtype": "F32", "shape": [4], "data_offsets": [12, 28]}})",
      std::string(28, 'x'));
  std::mt19937 random(20261124);
  for (int round = 0; round < 5000; ++round) {
    std::string bytes = original;
    const int flips = 1 + static_cast<int>(random() % 3);
    for (int i = 0; i < flips; ++i) bytes[random() % bytes.size()] = static_cast<char>(random());
    const auto tensors = Parse(bytes);
    if (!tensors.ok()) continue;
    int64_t total = 0;
    for (const StoredTensor& tensor : *tensors) {
      ASSERT_LE(tensor.offset + tensor.num_bytes, static_cast<int64_t>(bytes.size())) << "round " << round;
      total += tensor.num_bytes;
    }
    ASSERT_EQ(total, 28) << "round " << round;
  }
}

}  // namespace
}  // namespace minitron::engine
