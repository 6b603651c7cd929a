#include "engine/checkpoint/checkpoint.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/hash.h"
#include "engine/checkpoint/json.h"
#include "engine/checkpoint/mapped_file.h"
#include "engine/checkpoint/safetensors.h"
#include "engine/checkpoint/torch_pickle.h"

namespace minitron::engine {
namespace {

constexpr char kSafetensorsFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr char kTorchFile[] = "pytorch_model.bin";
constexpr int64_t kMaxIndexBytes = 64 << 20;
constexpr size_t kMaxShards = 4096;

using WeightMap = std::map<std::string, std::string>;  // tensor -> shard file

// Files and copies the entries point into.
class FileCheckpoint : public Checkpoint {
 public:
  absl::Status AddFile(std::unique_ptr<MappedFile> file, std::vector<StoredTensor> stored) {
    for (StoredTensor& tensor : stored) {
      TensorEntry entry{tensor.dtype, std::move(tensor.shape), file->data() + tensor.offset, tensor.num_bytes};
      const uintptr_t address = reinterpret_cast<uintptr_t>(entry.data);
      if (entry.num_bytes == 0 || address % DTypeBytes(entry.dtype) != 0) entry.data = CopyAligned(entry);
      if (!tensors_.emplace(tensor.name, std::move(entry)).second) {
        return absl::InvalidArgumentError(absl::StrCat(file->path(), ": tensor \"", tensor.name, "\" is there twice"));
      }
    }
    files_.push_back(std::move(file));
    return absl::OkStatus();
  }

  void Prefault(bool show_progress) const override { engine::Prefault(files_, show_progress); }

  uint64_t identity() const override {
    uint64_t identity = 0;
    for (const auto& file : files_) {
      const uint64_t next = file->identity();
      identity = HashBytes(&next, sizeof(next), identity);
    }
    return identity;
  }

  void MapIn(const void* data, int64_t num_bytes) const override {
    const auto* begin = static_cast<const uint8_t*>(data);
    if (FileOf(begin, num_bytes) != nullptr) MapPages(begin, num_bytes);
  }

  void WillNeed(const void* data, int64_t num_bytes) const override { Advise(data, num_bytes, MADV_WILLNEED); }
  void DoneWith(const void* data, int64_t num_bytes) const override { Advise(data, num_bytes, MADV_DONTNEED); }

 private:
  // Only inside a mapped file: there pages are private, never written, and come back as they were.
  void Advise(const void* data, int64_t num_bytes, int advice) const {
    const auto* first = static_cast<const uint8_t*>(data);
    const MappedFile* file = FileOf(first, num_bytes);
    if (file == nullptr) return;
    const int64_t page = sysconf(_SC_PAGESIZE), offset = first - file->data();
    const int64_t begin = (offset + page - 1) / page * page, end = (offset + num_bytes) / page * page;
    if (end > begin) madvise(const_cast<uint8_t*>(file->data()) + begin, end - begin, advice);
  }

  // The file that holds the range; null for a copy.
  const MappedFile* FileOf(const uint8_t* first, int64_t num_bytes) const {
    const std::less<const uint8_t*> before;  // pointers into different files have no order of their own
    for (const auto& file : files_) {
      if (!before(first, file->data()) && !before(file->data() + file->size(), first + num_bytes)) return file.get();
    }
    return nullptr;
  }

  // The copy is as long as a range of the file, so a header cannot ask for more than the file holds.
  const void* CopyAligned(const TensorEntry& entry) {
    std::vector<uint64_t>& words = copies_.emplace_back((entry.num_bytes + 7) / 8 + 1);
    if (entry.num_bytes > 0) std::memcpy(words.data(), entry.data, entry.num_bytes);
    return words.data();
  }

  std::vector<std::unique_ptr<MappedFile>> files_;
  std::vector<std::vector<uint64_t>> copies_;  // moving the outer vector keeps the inner buffers in place
};

absl::StatusOr<WeightMap> ReadIndex(const ModelDir& dir) {
  ASSIGN_OR_RETURN(const std::string text, dir.ReadText(kIndexFile, kMaxIndexBytes));
  JsonValue root;
  std::string error;
  const JsonLimits limits{.max_bytes = kMaxIndexBytes, .max_values = 3 * kMaxTensors, .max_depth = 64};
  if (!ParseJson(text.data(), static_cast<int64_t>(text.size()), limits, &root, &error)) {
    return absl::InvalidArgumentError(absl::StrCat(kIndexFile, ": ", error));
  }
  const JsonValue* weight_map = root.Find("weight_map");
  if (weight_map == nullptr || !weight_map->is(JsonValue::Type::kObject) || weight_map->items.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(kIndexFile, ": weight_map missing, empty or no object"));
  }
  if (static_cast<int64_t>(weight_map->items.size()) > kMaxTensors) {
    return absl::InvalidArgumentError(
        absl::StrCat(kIndexFile, ": ", weight_map->items.size(), " tensors, limit ", kMaxTensors));
  }
  WeightMap shard_of;
  for (size_t i = 0; i < weight_map->items.size(); ++i) {
    const JsonValue& shard = weight_map->items[i];
    if (!IsTensorName(weight_map->keys[i]) || !shard.is(JsonValue::Type::kString)) {
      return absl::InvalidArgumentError(absl::StrCat(kIndexFile, ": weight_map \"", weight_map->keys[i].substr(0, 64),
                                                     "\": ", shard.Describe(), ": not a tensor name and a file name"));
    }
    shard_of.emplace(weight_map->keys[i], shard.string);
  }
  return shard_of;
}

// Every tensor of a shard must be listed under that shard.
absl::Status CheckShard(const std::string& shard, const std::vector<StoredTensor>& stored, const WeightMap& shard_of) {
  for (const StoredTensor& tensor : stored) {
    const auto listed = shard_of.find(tensor.name);
    if (listed == shard_of.end()) {
      return absl::InvalidArgumentError(absl::StrCat(shard, ": tensor \"", tensor.name, "\" is not in ", kIndexFile));
    }
    if (listed->second != shard) {
      return absl::InvalidArgumentError(
          absl::StrCat(shard, ": tensor \"", tensor.name, "\" is listed in ", kIndexFile, " under ", listed->second));
    }
  }
  return absl::OkStatus();
}

absl::Status OpenShards(const ModelDir& dir, FileCheckpoint& checkpoint) {
  ASSIGN_OR_RETURN(const WeightMap shard_of, ReadIndex(dir));
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : shard_of) shards.insert(shard);
  if (shards.size() > kMaxShards) {
    return absl::InvalidArgumentError(absl::StrCat(kIndexFile, ": ", shards.size(), " shards, limit ", kMaxShards));
  }
  for (const std::string& shard : shards) {
    absl::StatusOr<std::unique_ptr<MappedFile>> file = dir.Map(shard, NameOrigin::kFromIndex);
    if (absl::IsNotFound(file.status())) {
      return absl::InvalidArgumentError(
          absl::StrCat(kIndexFile, " names a shard that is not there: ", std::string(file.status().message())));
    }
    if (!file.ok()) return file.status();
    ASSIGN_OR_RETURN(std::vector<StoredTensor> stored,
                     ParseSafetensors((*file)->data(), (*file)->size(), (*file)->path()));
    RETURN_IF_ERROR(CheckShard(shard, stored, shard_of));
    RETURN_IF_ERROR(checkpoint.AddFile(std::move(file).value(), std::move(stored)));
  }
  for (const auto& [tensor, shard] : shard_of) {
    if (checkpoint.tensors().count(tensor) == 0) {
      return absl::InvalidArgumentError(absl::StrCat(kIndexFile, ": tensor \"", tensor, "\" is not in ", shard));
    }
  }
  return absl::OkStatus();
}

using Parser = absl::StatusOr<std::vector<StoredTensor>> (*)(const uint8_t*, int64_t, const std::string&);

absl::Status OpenSingle(const ModelDir& dir, const std::string& name, Parser parse, FileCheckpoint& checkpoint) {
  ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> file, dir.Map(name, NameOrigin::kWellKnown));
  ASSIGN_OR_RETURN(std::vector<StoredTensor> stored, parse(file->data(), file->size(), file->path()));
  return checkpoint.AddFile(std::move(file), std::move(stored));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& model_dir) {
  ASSIGN_OR_RETURN(const ModelDir dir, ModelDir::Open(model_dir));
  auto checkpoint = std::make_unique<FileCheckpoint>();
  absl::Status status = OpenSingle(dir, kSafetensorsFile, ParseSafetensors, *checkpoint);
  if (absl::IsNotFound(status)) status = OpenShards(dir, *checkpoint);
  if (absl::IsNotFound(status)) status = OpenSingle(dir, kTorchFile, ParseTorchCheckpoint, *checkpoint);
  if (absl::IsNotFound(status)) {
    return absl::NotFoundError(
        absl::StrCat(model_dir, ": none of ", kSafetensorsFile, ", ", kIndexFile, ", ", kTorchFile, " is there"));
  }
  RETURN_IF_ERROR(status);
  return checkpoint;
}

}  // namespace minitron::engine
