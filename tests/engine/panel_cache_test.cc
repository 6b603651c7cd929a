// The cache of packed weights: mapped when it is right, made anew when anything about it is wrong.
#include "engine/cpu/panel_cache.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "engine/checkpoint/checkpoint.h"
#include "engine/cpu/packed_weights.h"
#include "engine/model_config.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/model_files.h"

namespace minitron::engine::cpu {
namespace {

using ::testing::HasSubstr;
using testing::ReadFile;
using testing::TempDir;
namespace fs = std::filesystem;

// A copy of the shipped model, a folder for caches, and what packing in memory gives.
class PanelCacheTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string source = std::string(MINITRON_SOURCE_DIR) + "/deploy/models/minitron-tiny";
    for (const char* name : {"config.json", "model.safetensors"}) {
      fs::copy(source + "/" + name, model_.File(name));
      fs::permissions(model_.File(name), fs::perms::owner_read | fs::perms::owner_write);
    }
    OpenModel();
  }

  void OpenModel() {
    config_ = *LoadNemotronConfig(model_.path());
    auto checkpoint = Checkpoint::Open(model_.path());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    checkpoint_ = *std::move(checkpoint);
    auto weights = MapNemotronWeights(*checkpoint_, config_);
    ASSERT_TRUE(weights.ok()) << weights.status();
    source_ = *weights;
  }

  std::string InMemory(Quantization quantization) {
    const PackPlan plan(source_, quantization);
    std::string image(plan.num_bytes, '\0');
    EXPECT_TRUE(PackImage(plan, checkpoint_.get(), pool_, false, reinterpret_cast<uint8_t*>(image.data())).ok());
    return image;
  }

  // Loads through the cache; the image as bytes.
  std::string Load(Quantization quantization) {
    const PackOptions options{
        .quantization = quantization, .cache_dir = cache_.path(), .model_dir = model_.path(), .show_progress = false};
    const auto packed = PackedWeights::Load(source_, *checkpoint_, options, pool_);
    if (!packed.ok()) return packed.status().ToString();
    const auto* image = static_cast<const char*>((*packed)->weights().layers[0].q_proj.data);
    return {image, static_cast<size_t>(PackPlan(source_, quantization).num_bytes)};
  }

  // The only file in the cache folder.
  std::string CacheFile() const {
    std::vector<std::string> files;
    for (const auto& entry : fs::directory_iterator(cache_.path())) files.push_back(entry.path());
    EXPECT_EQ(files.size(), 1u);
    return files.empty() ? "" : files.front();
  }

  absl::Status FindStatus(Quantization quantization) {
    const PackPlan plan(source_, quantization);
    auto cache = PanelCache::Open(cache_.path(), plan, *checkpoint_, pool_);
    return cache.ok() ? cache->Find().status() : cache.status();
  }

  static ino_t Inode(const std::string& path) {
    struct stat info {};
    EXPECT_EQ(stat(path.c_str(), &info), 0);
    return info.st_ino;
  }

  TempDir model_, cache_;
  ThreadPool pool_{2};
  NemotronConfig config_;
  std::unique_ptr<Checkpoint> checkpoint_;
  NemotronWeights source_;
};

TEST_F(PanelCacheTest, SecondStartMapsTheFileOfTheFirst) {
  for (const Quantization quantization : {Quantization::kOff, Quantization::kInt8, Quantization::kInt4}) {
    const std::string expected = InMemory(quantization);
    EXPECT_EQ(FindStatus(quantization).code(), absl::StatusCode::kNotFound);
    EXPECT_EQ(Load(quantization), expected);
    const std::string file = CacheFile();
    const ino_t first = Inode(file);
    EXPECT_TRUE(FindStatus(quantization).ok());
    EXPECT_EQ(Load(quantization), expected);
    EXPECT_EQ(Inode(file), first);
    fs::remove(file);
  }
}

TEST_F(PanelCacheTest, EveryDamageIsNoticedAndRepaired) {
  const std::string expected = InMemory(Quantization::kInt4);
  ASSERT_EQ(Load(Quantization::kInt4), expected);
  const std::string file = CacheFile(), good = ReadFile(file);
  const size_t image = good.size() - expected.size();
  // Magic, version, plan, size, table hash, content hash, padding, checksum table, image: first, middle, last byte.
  for (const size_t at : {size_t{0}, size_t{8}, size_t{16}, size_t{24}, size_t{32}, size_t{40}, size_t{4000},
                          size_t{4096}, image, image + expected.size() / 2, good.size() - 1}) {
    std::string damaged = good;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x10);
    cache_.Write(fs::path(file).filename(), damaged);
    // A damaged content hash does not matter while the source files are known to be the same.
    EXPECT_EQ(FindStatus(Quantization::kInt4).code(), at == 40 ? absl::StatusCode::kOk : absl::StatusCode::kDataLoss)
        << at;
    EXPECT_EQ(Load(Quantization::kInt4), expected) << at;
    EXPECT_TRUE(FindStatus(Quantization::kInt4).ok()) << at;
  }
  for (const size_t size : {size_t{0}, size_t{1}, size_t{55}, size_t{4096}, image, good.size() - 1}) {
    cache_.Write(fs::path(file).filename(), good.substr(0, size));
    EXPECT_EQ(FindStatus(Quantization::kInt4).code(), absl::StatusCode::kDataLoss) << size;
    EXPECT_EQ(Load(Quantization::kInt4), expected) << size;
  }
  cache_.Write(fs::path(file).filename(), good + "x");
  EXPECT_EQ(Load(Quantization::kInt4), expected);
  EXPECT_EQ(ReadFile(file), good);
}

TEST_F(PanelCacheTest, WhatIsNoRegularFileIsNotFollowed) {
  const std::string expected = InMemory(Quantization::kInt8);
  ASSERT_EQ(Load(Quantization::kInt8), expected);
  const std::string file = CacheFile();
  const TempDir elsewhere;
  fs::copy(file, elsewhere.File("copy"));
  fs::remove(file);
  fs::create_symlink(elsewhere.File("copy"), file);
  EXPECT_EQ(FindStatus(Quantization::kInt8).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(Load(Quantization::kInt8), expected);
  EXPECT_FALSE(fs::is_symlink(file));
  fs::remove(file);
  ASSERT_EQ(mkfifo(file.c_str(), 0600), 0);
  EXPECT_EQ(Load(Quantization::kInt8), expected);
  fs::remove(file);
  fs::create_directory(file);  // cannot be replaced: the weights stay in memory
  EXPECT_EQ(Load(Quantization::kInt8), expected);
  EXPECT_TRUE(fs::is_directory(file));
}

TEST_F(PanelCacheTest, OtherWeightsOfTheSameShapeAreNotServedFromIt) {
  ASSERT_EQ(Load(Quantization::kInt8), InMemory(Quantization::kInt8));
  // One weight, between the bytes the name's hash looks at.
  const int64_t offset = 3000 * 2;
  const auto* q = static_cast<const char*>(source_.layers[0].up_proj.data);
  std::string bytes = ReadFile(model_.File("model.safetensors"));
  const size_t at = bytes.find(std::string(q + offset, 64));
  ASSERT_NE(at, std::string::npos);
  bytes[at + 1] = static_cast<char>(bytes[at + 1] ^ 0x01);
  checkpoint_.reset();
  model_.Write("model.safetensors", bytes);
  OpenModel();
  const absl::Status status = FindStatus(Quantization::kInt8);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("made from other weights"));
  EXPECT_EQ(Load(Quantization::kInt8), InMemory(Quantization::kInt8));
  EXPECT_TRUE(FindStatus(Quantization::kInt8).ok());
}

TEST_F(PanelCacheTest, ACopyOfTheModelUsesTheSameFile) {
  const std::string expected = InMemory(Quantization::kInt4);
  ASSERT_EQ(Load(Quantization::kInt4), expected);
  const std::string file = CacheFile();
  const ino_t first = Inode(file);
  const std::string bytes = ReadFile(model_.File("model.safetensors"));
  checkpoint_.reset();
  fs::remove(model_.File("model.safetensors"));
  model_.Write("model.safetensors", bytes);
  OpenModel();
  EXPECT_EQ(Load(Quantization::kInt4), expected);
  EXPECT_EQ(Load(Quantization::kInt4), expected);
  EXPECT_EQ(Inode(CacheFile()), first);
}

TEST_F(PanelCacheTest, FoldersThatCannotBeUsed) {
  const std::string expected = InMemory(Quantization::kInt8);
  PackOptions options{
      .quantization = Quantization::kInt8, .cache_dir = cache_.File("absent"), .model_dir = model_.path()};
  const auto absent = PackedWeights::Load(source_, *checkpoint_, options, pool_);
  EXPECT_EQ(absent.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(absent.status().message()), HasSubstr(options.cache_dir));
  options.cache_dir = "/proc";  // a folder where nobody can create a file
  const auto read_only = PackedWeights::Load(source_, *checkpoint_, options, pool_);
  ASSERT_TRUE(read_only.ok()) << read_only.status();
  EXPECT_EQ(std::memcmp((*read_only)->weights().layers[0].q_proj.data, expected.data(), expected.size()), 0);
  options.cache_dir.clear();  // a small model writes nothing beside itself
  ASSERT_TRUE(PackedWeights::Load(source_, *checkpoint_, options, pool_).ok());
  EXPECT_EQ(std::distance(fs::directory_iterator(model_.path()), fs::directory_iterator()), 2);
}

// Quantised, NaN would spoil its group and nobody could say why. As loaded it stays what it is.
TEST_F(PanelCacheTest, WeightsThatAreNotFiniteAreRefusedByNameWhereTheyAreQuantised) {
  WeightView& up = source_.layers[1].up_proj;
  std::vector<uint16_t> numbers(up.size());
  std::memcpy(numbers.data(), up.data, up.bytes());
  numbers[21 * up.cols + 5] = 0x7FC0;
  up.data = numbers.data();
  for (const bool in_file : {false, true}) {
    for (const Quantization quantization : {Quantization::kInt8, Quantization::kInt4}) {
      const PackOptions options{
          .quantization = quantization, .cache_dir = in_file ? cache_.path() : "", .model_dir = model_.path()};
      const absl::Status status = PackedWeights::Load(source_, *checkpoint_, options, pool_).status();
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_EQ(status.message(),
                "tensor model.layers.1.mlp.up_proj.weight has nan at [21, 5]: only finite weights can be quantized");
    }
  }
  EXPECT_TRUE(fs::is_empty(cache_.path()));
  const PackOptions as_loaded{.quantization = Quantization::kOff, .cache_dir = "", .model_dir = model_.path()};
  EXPECT_TRUE(PackedWeights::Load(source_, *checkpoint_, as_loaded, pool_).ok());
}

}  // namespace
}  // namespace minitron::engine::cpu
