// checkpoint and mapped_file: which file is chosen, shards against their index, and names that try to leave the folder.
#include "engine/checkpoint/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <cstring>
#include <filesystem>
#include <string>

#include "engine/checkpoint/mapped_file.h"
#include "tests/engine/model_files.h"

namespace minitron::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::Safetensors;
using testing::TempDir;

// A file with one f32 tensor [2] per name, values 1.5 and -2.
std::string Tensors(const std::vector<std::string>& names, const std::string& padding = "") {
  std::string header = "{", data;
  for (const std::string& name : names) {
    const std::string begin = std::to_string(data.size()), end = std::to_string(data.size() + 8);
    header += (data.empty() ? "\"" : ",\"") + name + R"(":{"dtype":"F32","shape":[2],"data_offsets":[)" + begin + "," +
              end + "]}";
    data += testing::Raw(1.5f) + testing::Raw(-2.0f);
  }
  header += "}";
  header.append((8 - header.size() % 8) % 8, ' ');
  return Safetensors(header + padding, data);
}

std::string Index(const std::string& weight_map) {
  return R"({"metadata": {"total_size": 16}, "weight_map": {)" + weight_map + "}}";
}

void ExpectRefused(const TempDir& dir, const std::string& why) {
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_FALSE(checkpoint.ok()) << "not refused: " << why;
  EXPECT_EQ(checkpoint.status().code(), absl::StatusCode::kInvalidArgument) << checkpoint.status();
  EXPECT_THAT(std::string(checkpoint.status().message()), HasSubstr(why));
}

TEST(Checkpoint, ReadsSingleFileAligned) {
  // One byte of padding moves the data off every alignment: then it is copied.
  for (const std::string padding : {"", " ", "  ", "   "}) {
    const TempDir dir;
    dir.Write("model.safetensors", Tensors({"a", "b"}, padding));
    const auto checkpoint = Checkpoint::Open(dir.path());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    ASSERT_EQ((*checkpoint)->tensors().size(), 2u);
    for (const auto& [name, entry] : (*checkpoint)->tensors()) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(entry.data) % 4, 0u);
      EXPECT_THAT(entry.shape, ElementsAre(2));
      EXPECT_EQ(entry.num_bytes, 8);
      EXPECT_EQ(static_cast<const float*>(entry.data)[0], 1.5f);
      EXPECT_EQ(static_cast<const float*>(entry.data)[1], -2.0f);
    }
  }
}

TEST(Checkpoint, ReadsTorchFile) {
  const TempDir dir;
  std::filesystem::copy(std::string(MINITRON_SOURCE_DIR) + "/tests/engine/testdata/torch_state_dict.bin",
                        dir.File("pytorch_model.bin"));
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const TensorEntry& entry = (*checkpoint)->tensors().at("single");
  EXPECT_THAT(entry.shape, ElementsAre(2, 3));
  EXPECT_EQ(static_cast<const float*>(entry.data)[0], -1.25f);
}

TEST(Checkpoint, TorchFileWithANameTwiceIsRefused) {
  const TempDir dir;
  const std::string pickle = testing::StateDictPickle({testing::PickleTensor(), testing::PickleTensor()});
  dir.Write("pytorch_model.bin", testing::StoredZip({{"m/data.pkl", pickle}, {"m/data/0", std::string(12, 'x')}}));
  ExpectRefused(dir, "tensor \"w\" is there twice");
}

TEST(Checkpoint, PrefersSafetensorsOverTorch) {
  const TempDir dir;
  dir.Write("pytorch_model.bin", "not a zip");
  ExpectRefused(dir, "no zip end record");
  dir.Write("model.safetensors", Tensors({"a"}));
  EXPECT_TRUE(Checkpoint::Open(dir.path()).ok());
  // A broken preferred file is an error, not a reason to take the next.
  dir.Write("model.safetensors", "");
  ExpectRefused(dir, "too short");
}

TEST(Checkpoint, NothingToReadIsNotFound) {
  const TempDir dir;
  const auto checkpoint = Checkpoint::Open(dir.path());
  EXPECT_EQ(checkpoint.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(checkpoint.status().message()), HasSubstr("pytorch_model.bin"));
  EXPECT_EQ(Checkpoint::Open(dir.File("absent")).status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(Checkpoint::Open("").ok());
}

TEST(Checkpoint, ReadsShards) {
  const TempDir dir;
  dir.Write("model-1.safetensors", Tensors({"a", "b"}));
  dir.Write("model-2.safetensors", Tensors({"c"}));
  dir.Write("model.safetensors.index.json",
            Index(R"("a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors")"));
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ((*checkpoint)->tensors().size(), 3u);
  EXPECT_EQ(static_cast<const float*>((*checkpoint)->tensors().at("c").data)[1], -2.0f);
}

TEST(Checkpoint, ShardsMustMatchTheirIndex) {
  const TempDir dir;
  const std::string index = "model.safetensors.index.json";
  dir.Write("1", Tensors({"a", "b"}));
  dir.Write("2", Tensors({"c"}));
  dir.Write("3", Tensors({"a"}));
  dir.Write(index, Index(R"("a": "1", "c": "2")"));
  ExpectRefused(dir, "tensor \"b\" is not in model.safetensors.index.json");
  dir.Write(index, Index(R"("a": "1", "b": "2", "c": "2")"));
  ExpectRefused(dir, "tensor \"b\" is listed in model.safetensors.index.json under 2");
  dir.Write(index, Index(R"("a": "1", "b": "1", "c": "2", "d": "2")"));
  ExpectRefused(dir, "tensor \"d\" is not in 2");
  dir.Write("4", Tensors({"d", "a"}));
  dir.Write(index, Index(R"("a": "1", "b": "1", "d": "4")"));
  ExpectRefused(dir, "tensor \"a\" is listed in model.safetensors.index.json under 1");
  dir.Write(index, Index(R"("a": "1", "b": "1", "a": "3")"));
  ExpectRefused(dir, "duplicate key \"a\"");
  dir.Write(index, Index(R"("a": "absent.safetensors")"));
  ExpectRefused(dir, "names a shard that is not there");
  dir.Write(index, Index(R"("a": 7)"));
  ExpectRefused(dir, "not a tensor name and a file name");
  dir.Write(index, Index(""));
  ExpectRefused(dir, "weight_map missing, empty");
  dir.Write(index, "[]");
  ExpectRefused(dir, "weight_map missing");
  dir.Write(index, "{");
  ExpectRefused(dir, "not valid JSON");
}

TEST(Checkpoint, HardLinkOfAShardIsATensorInTwoShards) {
  const TempDir dir;
  dir.Write("1", Tensors({"a", "b"}));
  std::filesystem::create_hard_link(dir.File("1"), dir.File("2"));
  dir.Write("model.safetensors.index.json", Index(R"("a": "1", "b": "2")"));
  ExpectRefused(dir, "is listed in");
}

TEST(Checkpoint, IndexNamesCannotLeaveTheFolder) {
  const TempDir outside;
  outside.Write("secret", Tensors({"a"}));
  const TempDir dir;
  dir.Write("good", Tensors({"a"}));
  std::filesystem::create_directory(dir.File("sub"));
  std::filesystem::copy(dir.File("good"), dir.File("sub/good"));
  const std::string up = "../" + std::filesystem::path(outside.path()).filename().string() + "/secret";
  for (const std::string& name : {outside.File("secret"), up, std::string(".."), std::string("."), std::string(""),
                                  std::string("sub/good"), std::string("sub/./good"), std::string("./good"),
                                  std::string("good/"), std::string("good\\u0000.x"), std::string(300, 'n')}) {
    dir.Write("model.safetensors.index.json", Index("\"a\": \"" + name + "\""));
    ExpectRefused(dir, "is not a plain file name");
  }
  dir.Write("model.safetensors.index.json", Index(R"("a": "sub")"));
  ExpectRefused(dir, "not a regular file");
}

TEST(Checkpoint, SymlinkFromIndexMustStayInTheFolder) {
  const TempDir outside;
  outside.Write("secret", Tensors({"a"}));
  const TempDir dir;
  dir.Write("model.safetensors.index.json", Index(R"("a": "shard")"));
  const auto link_to = [&](const std::string& target) {
    std::filesystem::remove(dir.File("shard"));
    std::filesystem::create_symlink(target, dir.File("shard"));
  };
  link_to(outside.File("secret"));
  ExpectRefused(dir, "symlink that leads out");
  link_to("../" + std::filesystem::path(outside.path()).filename().string() + "/secret");
  ExpectRefused(dir, "symlink that leads out");
  link_to("/proc/self/mem");
  ExpectRefused(dir, "symlink that leads out");
  link_to("shard");  // a loop
  ExpectRefused(dir, "symlink");
}

TEST(Checkpoint, SpecialFilesAreRefusedWithoutHanging) {
  const TempDir dir;
  ASSERT_EQ(mkfifo(dir.File("fifo").c_str(), 0600), 0);
  dir.Write("model.safetensors.index.json", Index(R"("a": "fifo")"));
  ExpectRefused(dir, "not a regular file");
  ASSERT_EQ(mkfifo(dir.File("model.safetensors").c_str(), 0600), 0);
  ExpectRefused(dir, "not a regular file");
  for (const std::string target : {"/dev/null", "/dev/zero", "/dev", "/"}) {
    std::filesystem::remove(dir.File("model.safetensors"));
    std::filesystem::create_symlink(target, dir.File("model.safetensors"));
    ExpectRefused(dir, "not a regular file");
  }
}

TEST(Checkpoint, WellKnownNamesMayLinkToACache) {
  const TempDir blobs;
  blobs.Write("0123abcd", Tensors({"a"}));
  const TempDir dir;
  std::filesystem::create_symlink(blobs.File("0123abcd"), dir.File("model.safetensors"));
  EXPECT_TRUE(Checkpoint::Open(dir.path()).ok());
}

TEST(Checkpoint, MappingOutlivesTheName) {
  const TempDir dir;
  dir.Write("model.safetensors", Tensors({"a"}));
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok());
  std::filesystem::remove(dir.File("model.safetensors"));
  EXPECT_EQ(static_cast<const float*>((*checkpoint)->tensors().at("a").data)[0], 1.5f);
}

TEST(ModelDir, TextOverTheLimitIsRefused) {
  const TempDir temp;
  temp.Write("text", std::string(100, 'x'));
  const auto dir = ModelDir::Open(temp.path());
  ASSERT_TRUE(dir.ok());
  EXPECT_EQ(dir->ReadText("text", 100)->size(), 100u);
  EXPECT_EQ(dir->ReadText("text", 99).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(dir->ReadText("absent", 99).status().code(), absl::StatusCode::kNotFound);
}

// Page faults of this thread that needed no disk.
int64_t MinorFaults() {
  rusage usage{};
  getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_minflt;
}

// Not instrumented: a sanitizer's shadow memory has page faults of its own.
__attribute__((no_sanitize("address", "thread"))) int64_t SumOfPages(const uint8_t* data, int64_t size) {
  int64_t sum = 0;
  for (int64_t i = 0; i < size; i += 4096) sum += data[i];
  return sum;
}

TEST(Prefault, LeavesNoPageToFaultIn) {
  constexpr int64_t kBytes = int64_t{64} << 20;
  const TempDir dir;
  dir.Write("weights", std::string(kBytes, 'x'));
  const auto opened = ModelDir::Open(dir.path());
  ASSERT_TRUE(opened.ok());
  for (const bool prefault : {false, true}) {
    std::vector<std::unique_ptr<MappedFile>> files;
    files.push_back(std::move(opened->Map("weights", NameOrigin::kWellKnown).value()));
    Prefault(files, false, prefault ? 0 : kPrefaultThresholdBytes);
    const int64_t before = MinorFaults();
    const int64_t sum = SumOfPages(files[0]->data(), kBytes);
    const int64_t faults = MinorFaults() - before;
    EXPECT_EQ(sum, int64_t{'x'} * (kBytes / 4096));
    // The kernel maps at most 16 to a few hundred neighbours per fault, so a file that is only mapped costs several.
    if (prefault) {
      EXPECT_LE(faults, 2);
    } else {
      EXPECT_GT(faults, 2);
    }
  }
}

TEST(Checkpoint, MapsOneTensorInAndNoOther) {
  const std::string header = R"({"first":{"dtype":"BF16","shape":[16777216],"data_offsets":[0,33554432]},)"
                             R"("second":{"dtype":"BF16","shape":[16777216],"data_offsets":[33554432,67108864]}})";
  const TempDir dir;
  dir.Write("model.safetensors",
            Safetensors(header + std::string(8 - header.size() % 8, ' '), std::string(64 << 20, '\0')));
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const TensorEntry& first = (*checkpoint)->tensors().at("first");
  const TensorEntry& second = (*checkpoint)->tensors().at("second");
  (*checkpoint)->MapIn(second.data, second.num_bytes);
  const auto faults_of = [](const TensorEntry& entry) {
    const int64_t before = MinorFaults();
    const int64_t sum = SumOfPages(static_cast<const uint8_t*>(entry.data), entry.num_bytes);
    const int64_t faults = MinorFaults() - before;
    EXPECT_EQ(sum, 0);
    return faults;
  };
  EXPECT_LE(faults_of(second), 2);
  EXPECT_GT(faults_of(first), 2);
}

TEST(ProgressLine, ShowsShareAndBytes) {
  EXPECT_EQ(ProgressLine(0, 16'500'000'000), "loading weights [" + std::string(30, ' ') + "]   0%  0.0 / 16.5 GB");
  EXPECT_EQ(ProgressLine(8'250'000'000, 16'500'000'000),
            "loading weights [" + std::string(15, '#') + std::string(15, ' ') + "]  50%  8.2 / 16.5 GB");
  EXPECT_EQ(ProgressLine(2'000'000'000, 2'000'000'000),
            "loading weights [" + std::string(30, '#') + "] 100%  2.0 / 2.0 GB");
}

}  // namespace
}  // namespace minitron::engine
