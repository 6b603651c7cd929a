#include "engine/checkpoint/torch_pickle.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/checked_math.h"
#include "engine/checkpoint/zip_archive.h"

namespace minitron::engine {
namespace {

constexpr char kPickleSuffix[] = "/data.pkl";

// Null when there is none. `entries` are sorted by name.
const ZipEntry* FindEntry(const std::vector<ZipEntry>& entries, const std::string& name) {
  const auto found = std::lower_bound(entries.begin(), entries.end(), name,
                                      [](const ZipEntry& entry, const std::string& key) { return entry.name < key; });
  return found == entries.end() || found->name != name ? nullptr : &*found;
}

// The folder all entries lie in: the part of "<prefix>/data.pkl" before the only slash.
absl::StatusOr<std::string> FindPrefix(const std::vector<ZipEntry>& entries, const std::string& file) {
  std::vector<std::string> prefixes;
  for (const ZipEntry& entry : entries) {
    const size_t slash = entry.name.find('/');
    if (slash != std::string::npos && entry.name.substr(slash) == kPickleSuffix) {
      prefixes.push_back(entry.name.substr(0, slash));
    }
  }
  if (prefixes.size() == 1) return prefixes[0];
  return absl::InvalidArgumentError(absl::StrCat(file, ": ", prefixes.size(), " data.pkl in the zip, expected 1"));
}

absl::Status CheckByteOrder(const std::vector<ZipEntry>& entries, const std::string& prefix, const uint8_t* data,
                            const std::string& file) {
  const ZipEntry* record = FindEntry(entries, prefix + "/byteorder");
  if (record == nullptr) return absl::OkStatus();  // written since torch 2.1; before, always little
  const std::string order(reinterpret_cast<const char*>(data) + record->offset,
                          std::min<int64_t>(record->num_bytes, 16));
  if (order == "little") return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(file, ": byteorder \"", order, "\", only \"little\" is supported"));
}

absl::StatusOr<StoredTensor> Locate(PickledTensor pickled, const std::vector<ZipEntry>& entries,
                                    const std::string& prefix, const std::string& file) {
  const std::string label = absl::StrCat(file, ": tensor \"", pickled.name, "\": ");
  const int64_t element_bytes = DTypeBytes(pickled.dtype);
  const ZipEntry* storage = FindEntry(entries, absl::StrCat(prefix, "/data/", pickled.storage_key));
  if (storage == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(label, "no storage \"", pickled.storage_key, "\" in the zip"));
  }
  const std::optional<int64_t> expected = CheckedMul(pickled.storage_elements, element_bytes);
  if (!expected || *expected != storage->num_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(label, "storage \"", pickled.storage_key, "\" holds ",
                                                   storage->num_bytes, " bytes, the pickle says ",
                                                   pickled.storage_elements, " ", DTypeName(pickled.dtype)));
  }
  // No overflow from here: offset and count were checked against storage_elements, whose bytes fit the file.
  const int64_t count = *CheckedProduct(pickled.shape);
  return StoredTensor{std::move(pickled.name), pickled.dtype, std::move(pickled.shape),
                      storage->offset + pickled.storage_offset * element_bytes, count * element_bytes};
}

}  // namespace

absl::StatusOr<std::vector<StoredTensor>> ParseTorchCheckpoint(const uint8_t* data, int64_t size,
                                                               const std::string& file) {
  ASSIGN_OR_RETURN(const std::vector<ZipEntry> entries, ReadStoredZip(data, size, file));
  ASSIGN_OR_RETURN(const std::string prefix, FindPrefix(entries, file));
  RETURN_IF_ERROR(CheckByteOrder(entries, prefix, data, file));
  const ZipEntry* pickle = FindEntry(entries, prefix + kPickleSuffix);
  absl::StatusOr<std::vector<PickledTensor>> pickled = ParseTorchPickle(data + pickle->offset, pickle->num_bytes);
  if (!pickled.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": ", std::string(pickled.status().message())));
  }
  std::vector<StoredTensor> tensors;
  tensors.reserve(pickled->size());
  for (PickledTensor& tensor : *pickled) {
    ASSIGN_OR_RETURN(StoredTensor stored, Locate(std::move(tensor), entries, prefix, file));
    tensors.push_back(std::move(stored));
  }
  return tensors;
}

}  // namespace minitron::engine
