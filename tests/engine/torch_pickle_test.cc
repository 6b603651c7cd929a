// torch_pickle: what torch.save writes is read, everything else is refused by name, nothing crashes.
#include "engine/checkpoint/torch_pickle.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <random>
#include <string>

#include "tests/engine/model_files.h"

namespace minitron::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::PickledTensorText;
using testing::PickleGlobal;
using testing::PickleInt;
using testing::PickleString;
using testing::PickleTensor;
using testing::Raw;
using testing::StateDictPickle;
using testing::StoredZip;

std::string Fixture(const std::string& name) {
  return testing::ReadFile(std::string(MINITRON_SOURCE_DIR) + "/tests/engine/testdata/" + name);
}

absl::StatusOr<std::vector<StoredTensor>> ParseFile(const std::string& bytes) {
  // An exact heap copy, so that a sanitizer sees a read past the end.
  const std::vector<uint8_t> exact(bytes.begin(), bytes.end());
  return ParseTorchCheckpoint(exact.data(), static_cast<int64_t>(exact.size()), "f.bin");
}

absl::StatusOr<std::vector<PickledTensor>> ParsePickle(const std::string& bytes) {
  const std::vector<uint8_t> exact(bytes.begin(), bytes.end());
  return ParseTorchPickle(exact.data(), static_cast<int64_t>(exact.size()));
}

void ExpectPickleRefused(const std::string& pickle, const std::string& why) {
  const auto tensors = ParsePickle(pickle);
  ASSERT_FALSE(tensors.ok()) << "not refused: " << why;
  EXPECT_EQ(tensors.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(tensors.status().message()), HasSubstr(why));
}

void ExpectTensorRefused(const PickleTensor& tensor, const std::string& why) {
  ExpectPickleRefused(StateDictPickle({tensor}), why);
}

void ExpectFileRefused(const std::string& file, const std::string& why) {
  const auto tensors = ParseFile(file);
  ASSERT_FALSE(tensors.ok()) << "not refused: " << why;
  EXPECT_EQ(tensors.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(tensors.status().message()), HasSubstr(why));
}

std::string TorchZip(const std::string& pickle, bool zip64 = true) {
  return StoredZip({{"m/data.pkl", pickle}, {"m/byteorder", "little"}, {"m/data/0", std::string(12, 'x')}}, zip64);
}

float Element(const std::string& bytes, const StoredTensor& tensor, int64_t i) {
  const char* at = bytes.data() + tensor.offset + i * DTypeBytes(tensor.dtype);
  if (tensor.dtype == DType::kF32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  uint16_t half;
  std::memcpy(&half, at, sizeof(half));
  if (tensor.dtype == DType::kF16) {
    _Float16 value;
    std::memcpy(&value, &half, sizeof(value));
    return static_cast<float>(value);
  }
  const uint32_t wide = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

TEST(TorchPickle, ReadsWhatTorchSaved) {
  const std::string bytes = Fixture("torch_state_dict.bin");
  const auto tensors = ParseFile(bytes);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  std::map<std::string, StoredTensor> by_name;
  for (const StoredTensor& tensor : *tensors) by_name[tensor.name] = tensor;
  ASSERT_EQ(by_name.size(), 6u);
  EXPECT_THAT(by_name["model.embed_tokens.weight"].shape, ElementsAre(6, 4));
  EXPECT_EQ(by_name["model.embed_tokens.weight"].dtype, DType::kBf16);
  EXPECT_EQ(by_name["half"].dtype, DType::kF16);
  EXPECT_EQ(by_name["single"].dtype, DType::kF32);
  for (const std::string name : {"model.embed_tokens.weight", "model.norm.weight", "half", "single"}) {
    const StoredTensor& tensor = by_name[name];
    for (int64_t i = 0; i < tensor.num_bytes / DTypeBytes(tensor.dtype); ++i) {
      EXPECT_EQ(Element(bytes, tensor, i), static_cast<float>(i - 5) / 4.0f) << name << " " << i;
    }
  }
  EXPECT_THAT(by_name["scalar"].shape, ElementsAre());
  EXPECT_EQ(Element(bytes, by_name["scalar"], 0), 2.5f);
  EXPECT_THAT(by_name["second_half_of_single"].shape, ElementsAre(1, 3));
  EXPECT_EQ(by_name["second_half_of_single"].offset, by_name["single"].offset + 12);
}

TEST(TorchPickle, RefusesTransposedTensorTorchSaved) {
  ExpectFileRefused(Fixture("torch_transposed.bin"), "not contiguous");
}

TEST(TorchPickle, RefusesDoubleNamingTheStorage) {
  ExpectFileRefused(Fixture("torch_double.bin"), "global \"torch.DoubleStorage\" refused");
}

TEST(TorchPickle, RefusesLegacyFormat) { ExpectFileRefused(Fixture("torch_legacy.bin"), "before 1.6"); }

TEST(TorchPickle, ReadsZipWithAndWithoutZip64) {
  for (const bool zip64 : {false, true}) {
    const auto tensors = ParseFile(TorchZip(StateDictPickle({PickleTensor()}), zip64));
    ASSERT_TRUE(tensors.ok()) << tensors.status();
    ASSERT_EQ(tensors->size(), 1u);
    EXPECT_EQ((*tensors)[0].num_bytes, 12);
  }
}

// The real file is 16.5 GB: entries and directory lie beyond 32 bits. The middle is address space without memory.
TEST(TorchPickle, ReadsEntriesBeyondFourGigabytes) {
  constexpr int64_t kHole = int64_t{5} << 30;
  const std::string pickle =
      StateDictPickle({{.name = "big", .key = "0", .elements = kHole / 2, .shape = {kHole / 2}, .stride = {1}},
                       {.name = "after", .key = "1"}});
  const auto pieces = testing::StoredZipPieces(
      {{"m/data.pkl", pickle}, {"m/data/0", "", kHole}, {"m/data/1", std::string(12, 'y')}}, true, 0);
  const int64_t size = static_cast<int64_t>(pieces.back().first + pieces.back().second.size());
  void* map = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(map, MAP_FAILED);
  auto* bytes = static_cast<uint8_t*>(map);
  for (const auto& [offset, text] : pieces) std::memcpy(bytes + offset, text.data(), text.size());
  const auto tensors = ParseTorchCheckpoint(bytes, size, "f.bin");
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 2u);
  EXPECT_EQ((*tensors)[0].num_bytes, kHole);
  EXPECT_GT((*tensors)[1].offset, kHole);
  EXPECT_EQ(bytes[(*tensors)[1].offset], 'y');
  EXPECT_EQ(munmap(map, size), 0);
}

TEST(TorchPickle, RefusesEveryOtherGlobalByName) {
  const std::pair<const char*, const char*> globals[] = {{"os", "system"},
                                                         {"posix", "system"},
                                                         {"builtins", "eval"},
                                                         {"__builtin__", "exec"},
                                                         {"subprocess", "Popen"},
                                                         {"torch", "load"},
                                                         {"torch", "DoubleStorage"},
                                                         {"torch", "ByteStorage"},
                                                         {"torch", "bfloat16"},
                                                         {"torch._utils", "_rebuild_parameter"},
                                                         {"torch._utils", "_rebuild_tensor"},
                                                         {"torch.storage", "_load_from_bytes"},
                                                         {"collections", "defaultdict"},
                                                         {"collections.OrderedDict", "OrderedDict"},
                                                         {"", ""},
                                                         {"numpy.core.multiarray", "_reconstruct"}};
  for (const auto& [module, name] : globals) {
    ExpectPickleRefused(std::string("\x80\x02") + PickleGlobal(module, name) + ")R.",
                        std::string("global \"") + module + "." + name + "\" refused");
  }
}

TEST(TorchPickle, RefusesEveryOtherOpcode) {
  const std::string known =
      "()]}t\x85\x86\x87"
      "aesuqhrjcQRbN\x88\x89JKM\x8aGX.";
  for (int opcode = 0; opcode < 256; ++opcode) {
    if (known.find(static_cast<char>(opcode)) != std::string::npos) continue;
    ExpectPickleRefused(std::string("\x80\x02}") + static_cast<char>(opcode) + "....", "refused");
  }
}

TEST(TorchPickle, RefusesOtherProtocols) {
  for (const char* start : {"\x80\x03}.", "\x80\x04}.", "(dp0\n."}) ExpectPickleRefused(start, "protocol 2");
  ExpectPickleRefused("", "truncated");
}

TEST(TorchPickle, RefusesMisuseOfTheStack) {
  const std::string p = "\x80\x02";
  ExpectPickleRefused(p + ".", "does not end with one value");
  ExpectPickleRefused(p + "}}.", "does not end with one value");
  ExpectPickleRefused(p + "}(.", "does not end with one value");
  ExpectPickleRefused(p + "}.x", "after the end");
  ExpectPickleRefused(p + "t", "no mark");
  ExpectPickleRefused(p + "}(\x85", "stack is empty");
  ExpectPickleRefused(p + "s", "stack is empty");
  ExpectPickleRefused(p + "q" + std::string(1, '\0'), "stack is empty");
  ExpectPickleRefused(p + "h\x07", "memo slot 7");
  ExpectPickleRefused(p + "j" + Raw<uint32_t>(0xFFFFFFFF), "memo slot 4294967295");
  ExpectPickleRefused(p + "](NNu.", "items set on a list");
  ExpectPickleRefused(p + "}(Nu.", "without a value");
  ExpectPickleRefused(p + "}Na.", "append to a dict");
  ExpectPickleRefused(p + "})R.", "call of a dict");
  ExpectPickleRefused(p + PickleGlobal("collections", "OrderedDict") + "}R.", "argument tuple");
  ExpectPickleRefused(p + PickleGlobal("collections", "OrderedDict") + "]\x85R.", "with arguments");
  ExpectPickleRefused(p + "N}b.", "attributes set on a None");
  ExpectPickleRefused(p + "NQ.", "not a storage");
  ExpectPickleRefused(p + "cos", "end of line");
  ExpectPickleRefused(p + "X" + Raw<uint32_t>(0xFFFFFFFF), "limit 4096");
  ExpectPickleRefused(p + "\x8a\x09" + std::string(9, 'x'), "limit 8");
  ExpectPickleRefused(p + std::string(100'001, 'N'), "stack over");
  ExpectPickleRefused(p + std::string(65, '('), "nested deeper");
}

TEST(TorchPickle, SelfReferenceThroughTheMemoIsHarmless) {
  // d = {}; d["w"] = d
  ExpectPickleRefused(std::string("\x80\x02}q\x01") + PickleString("w") + "h\x01s.", "is a dict, not a tensor");
  // Attributes that hold themselves are dropped.
  EXPECT_TRUE(ParsePickle(std::string("\x80\x02}}q\x01") + PickleString("w") + "h\x01sb.").ok());
}

TEST(TorchPickle, RefusesTensorsOutsideTheirStorage) {
  ExpectTensorRefused({.elements = 5}, "outside its storage of 5");
  ExpectTensorRefused({.offset = 1}, "outside its storage of 6");
  ExpectTensorRefused({.offset = INT64_MAX}, "outside its storage");
  ExpectTensorRefused({.offset = -1}, "not a non-negative integer");
  ExpectTensorRefused({.elements = -6}, "storage of -6 elements");
  ExpectTensorRefused({.shape = {int64_t{1} << 32, int64_t{1} << 32}, .stride = {int64_t{1} << 32, 1}}, "63 bits");
  ExpectTensorRefused({.shape = {0, INT64_MAX, 3}, .stride = {1, 1, 1}}, "63 bits");
  ExpectTensorRefused({.shape = {-2, -3}}, "not a non-negative integer");
  ExpectTensorRefused({.shape = {2, 3}, .stride = {1, 2}}, "not contiguous");
  ExpectTensorRefused({.shape = {2, 3}, .stride = {0, 0}}, "not contiguous");
  ExpectTensorRefused({.shape = {6}, .stride = {1, 1}}, "another rank");
  ExpectTensorRefused({.shape = {1, 1, 1, 1, 1, 1, 1, 1, 1}, .stride = {}}, "tuple of up to 8");
  ExpectTensorRefused({.name = ""}, "not a tensor name");
  ExpectTensorRefused({.name = std::string("a\0b", 3)}, "not a tensor name");
}

TEST(TorchPickle, LongStringsCannotBeMultiplied) {
  ExpectTensorRefused({.key = std::string(33, '1')}, "storage key of 33 bytes, limit 32");
  ExpectPickleRefused(StateDictPickle({PickleTensor(), PickleTensor()}), "tensor \"w\" is there twice");
}

TEST(TorchPickle, StrideOfAUnitDimDoesNotMatter) {
  EXPECT_TRUE(ParsePickle(StateDictPickle({{.shape = {1, 6}, .stride = {99, 1}}})).ok());
  EXPECT_TRUE(ParsePickle(StateDictPickle({{.shape = {0, 6}, .stride = {99, 7}}})).ok());
}

TEST(TorchPickle, RefusesStoragesTheZipDoesNotHold) {
  ExpectFileRefused(TorchZip(StateDictPickle({{.key = "1"}})), "no storage \"1\"");
  ExpectFileRefused(TorchZip(StateDictPickle({{.key = "../data.pkl"}})), "no storage");
  ExpectFileRefused(TorchZip(StateDictPickle({{.elements = 7}})), "holds 12 bytes, the pickle says 7 bf16");
  ExpectFileRefused(TorchZip(StateDictPickle({{.storage = "FloatStorage"}})), "the pickle says 6 f32");
  ExpectFileRefused(TorchZip(StateDictPickle({{.elements = INT64_MAX}})), "the pickle says");
}

TEST(TorchPickle, RefusesBrokenZips) {
  const std::string pickle = StateDictPickle({PickleTensor()});
  ExpectFileRefused(StoredZip({{"m/data.pkl", pickle}, {"m/data/0", std::string(12, 'x')}}, true, 8), "method 8");
  ExpectFileRefused(StoredZip({{"m/byteorder", "big"}, {"m/data.pkl", pickle}}), "byteorder \"big\"");
  ExpectFileRefused(StoredZip({{"m/data/0", ""}}), "0 data.pkl");
  ExpectFileRefused(StoredZip({{"m/data.pkl", pickle}, {"n/data.pkl", pickle}}), "2 data.pkl");
  ExpectFileRefused(StoredZip({{"m/data.pkl", pickle}, {"m/data.pkl", pickle}}), "two zip entries");
  ExpectFileRefused(std::string("x") + TorchZip(pickle), "");
  ExpectFileRefused(TorchZip(pickle) + "x", "no zip end record");
  ExpectFileRefused("", "no zip end record");
}

TEST(TorchPickle, TruncationAtEveryByteIsRefused) {
  const std::string bytes = Fixture("torch_state_dict.bin");
  for (size_t length = 0; length < bytes.size(); ++length) {
    ASSERT_FALSE(ParseFile(bytes.substr(0, length)).ok()) << length;
  }
  const std::string pickle = StateDictPickle({PickleTensor()});
  for (size_t length = 0; length < pickle.size(); ++length) {
    ASSERT_FALSE(ParsePickle(pickle.substr(0, length)).ok()) << length;
  }
}

// Random damage either is refused or leaves every tensor inside the file.
TEST(TorchPickle, RandomDamageNeverReachesOutsideTheFile) {
  const std::string original = Fixture("torch_state_dict.bin");
  std::mt19937 random(20261124);
  for (int round = 0; round < 4000; ++round) {
    std::string bytes = original;
    const int flips = 1 + static_cast<int>(random() % 4);
    for (int i = 0; i < flips; ++i) bytes[random() % bytes.size()] = static_cast<char>(random());
    const auto tensors = ParseFile(bytes);
    if (!tensors.ok()) continue;
    for (const StoredTensor& tensor : *tensors) {
      ASSERT_GE(tensor.offset, 0);
      ASSERT_GE(tensor.num_bytes, 0);
      ASSERT_LE(tensor.offset + tensor.num_bytes, static_cast<int64_t>(bytes.size())) << "round " << round;
    }
  }
}

TEST(TorchPickle, RandomOpcodesNeverCrash) {
  const std::string alphabet =
      "()]}t\x85\x86\x87"
      "aesuqhrjcQRbNJKMX.\x88\x8a";
  std::mt19937 random(7);
  for (int round = 0; round < 4000; ++round) {
    std::string pickle = std::string("\x80\x02}") + PickledTensorText(PickleTensor());
    for (int i = 0; i < 40; ++i) {
      pickle += random() % 4 == 0 ? static_cast<char>(random() % 8) : alphabet[random() % alphabet.size()];
    }
    static_cast<void>(ParsePickle(pickle));
  }
}

}  // namespace
}  // namespace minitron::engine
