#include "engine/checkpoint/zip_archive.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/checked_math.h"

namespace minitron::engine {
namespace {

// Record layouts: PKWARE APPNOTE 6.3.9, sections 4.3.7 (local), 4.3.12 (central), 4.3.14 to 4.3.16 (ends), 4.5.3.
constexpr uint32_t kLocalSignature = 0x04034b50, kCentralSignature = 0x02014b50, kEndSignature = 0x06054b50;
constexpr uint32_t kEnd64Signature = 0x06064b50, kLocator64Signature = 0x07064b50;
constexpr int64_t kLocalBytes = 30, kCentralBytes = 46, kEndBytes = 22, kEnd64Bytes = 56, kLocator64Bytes = 20;
constexpr int64_t kMaxCommentBytes = 65535;
constexpr uint16_t kZip64Extra = 1;
constexpr uint32_t kInZip64 = 0xFFFFFFFF;
constexpr uint64_t kMaxEntries = 200'000;

class Reader {
 public:
  Reader(const uint8_t* data, int64_t size, const std::string& file) : data_(data), size_(size), file_(file) {}

  absl::StatusOr<std::vector<ZipEntry>> Read();

 private:
  struct Directory {
    uint64_t num_entries = 0, offset = 0, num_bytes = 0;
  };
  struct LocatedEntry {
    ZipEntry entry;
    int64_t header_offset = 0;
  };

  // Little-endian unsigned at `at`, which the caller has bounds-checked.
  template <typename T>
  T Load(uint64_t at) const {
    T value;
    std::memcpy(&value, data_ + at, sizeof(T));
    return value;
  }
  absl::Status Bad(const std::string& what) const {
    return absl::InvalidArgumentError(absl::StrCat(file_, ": ", what));
  }

  std::optional<int64_t> FindEnd() const;
  absl::StatusOr<Directory> FindDirectory() const;
  absl::StatusOr<LocatedEntry> ReadCentral(uint64_t& at, uint64_t end) const;
  absl::Status ReadZip64Extra(uint64_t at, uint64_t end, uint64_t* fields[3]) const;
  absl::Status CheckLayout(std::vector<LocatedEntry>& located, int64_t directory_begin) const;

  const uint8_t* const data_;  // the caller's mapping
  const int64_t size_;
  const std::string& file_;
};

std::optional<int64_t> Reader::FindEnd() const {
  const int64_t last = size_ - kEndBytes;
  for (int64_t at = last; at >= 0 && at >= last - kMaxCommentBytes; --at) {
    if (Load<uint32_t>(at) == kEndSignature && at + kEndBytes + Load<uint16_t>(at + 20) == size_) return at;
  }
  return std::nullopt;
}

absl::StatusOr<Reader::Directory> Reader::FindDirectory() const {
  const std::optional<int64_t> end = FindEnd();
  if (!end) {
    return Bad("no zip end record (truncated, or a torch.save file from before 1.6, which is not supported)");
  }
  if (Load<uint16_t>(*end + 4) != 0 || Load<uint16_t>(*end + 6) != 0) return Bad("zip of more than one disk");
  Directory directory{Load<uint16_t>(*end + 10), Load<uint32_t>(*end + 16), Load<uint32_t>(*end + 12)};
  uint64_t directory_end = *end;
  const int64_t locator = *end - kLocator64Bytes;
  if (locator >= 0 && Load<uint32_t>(locator) == kLocator64Signature) {
    const uint64_t end64 = Load<uint64_t>(locator + 8);
    if (!InRange(end64, kEnd64Bytes, locator) || Load<uint32_t>(end64) != kEnd64Signature) {
      return Bad(absl::StrCat("zip64 end record at ", end64, " is not there"));
    }
    if (Load<uint32_t>(end64 + 16) != 0 || Load<uint32_t>(end64 + 20) != 0) return Bad("zip of more than one disk");
    directory = {Load<uint64_t>(end64 + 32), Load<uint64_t>(end64 + 48), Load<uint64_t>(end64 + 40)};
    directory_end = end64;
  }
  if (!InRange(directory.offset, directory.num_bytes, directory_end) ||
      directory.offset + directory.num_bytes != directory_end) {
    return Bad(absl::StrCat("zip directory [", directory.offset, " + ", directory.num_bytes, "] does not end at ",
                            directory_end));
  }
  if (directory.num_entries > kMaxEntries || directory.num_entries > directory.num_bytes / kCentralBytes) {
    return Bad(absl::StrCat("zip of ", directory.num_entries, " entries in ", directory.num_bytes,
                            " bytes of directory, limit ", kMaxEntries));
  }
  return directory;
}

// Replaces, in this order, those of *fields that say kInZip64.
absl::Status Reader::ReadZip64Extra(uint64_t at, uint64_t end, uint64_t* fields[3]) const {
  while (InRange(at, 4, end)) {
    const uint16_t id = Load<uint16_t>(at), num_bytes = Load<uint16_t>(at + 2);
    if (!InRange(at + 4, num_bytes, end)) return Bad("zip extra field past its record");
    if (id != kZip64Extra) {
      at += 4 + uint64_t{num_bytes};
      continue;
    }
    uint64_t value_at = at + 4;
    const uint64_t values_end = value_at + num_bytes;
    for (int i = 0; i < 3; ++i) {
      if (*fields[i] != kInZip64) continue;
      if (!InRange(value_at, 8, values_end)) return Bad("zip64 extra field is short");
      *fields[i] = Load<uint64_t>(value_at);
      value_at += 8;
    }
    return absl::OkStatus();
  }
  return Bad("zip64 extra field missing");
}

// Reads the record at `at` and moves it on.
absl::StatusOr<Reader::LocatedEntry> Reader::ReadCentral(uint64_t& at, uint64_t end) const {
  if (!InRange(at, kCentralBytes, end) || Load<uint32_t>(at) != kCentralSignature) {
    return Bad(absl::StrCat("no zip directory record at ", at));
  }
  const uint64_t name_bytes = Load<uint16_t>(at + 28), extra_bytes = Load<uint16_t>(at + 30);
  const uint64_t record_bytes = kCentralBytes + name_bytes + extra_bytes + Load<uint16_t>(at + 32);
  if (!InRange(at, record_bytes, end)) return Bad(absl::StrCat("zip directory record at ", at, " is cut off"));
  LocatedEntry located;
  located.entry.name.assign(reinterpret_cast<const char*>(data_) + at + kCentralBytes, name_bytes);
  const std::string quoted = absl::StrCat("zip entry \"", located.entry.name, "\"");
  if ((Load<uint16_t>(at + 8) & 1) != 0) return Bad(quoted + " is encrypted");
  if (Load<uint16_t>(at + 10) != 0) {
    return Bad(absl::StrCat(quoted, " has compression method ", Load<uint16_t>(at + 10), ", only 0 (stored)"));
  }
  uint64_t stored_bytes = Load<uint32_t>(at + 20), num_bytes = Load<uint32_t>(at + 24);
  uint64_t header = Load<uint32_t>(at + 42);
  if (stored_bytes == kInZip64 || num_bytes == kInZip64 || header == kInZip64) {
    uint64_t* fields[3] = {&num_bytes, &stored_bytes, &header};
    const uint64_t extra = at + kCentralBytes + name_bytes;
    RETURN_IF_ERROR(ReadZip64Extra(extra, extra + extra_bytes, fields));
  }
  at += record_bytes;
  if (stored_bytes != num_bytes) {
    return Bad(absl::StrCat(quoted, " stores ", stored_bytes, " bytes of ", num_bytes));
  }
  if (!InRange(header, kLocalBytes, size_) || Load<uint32_t>(header) != kLocalSignature) {
    return Bad(absl::StrCat(quoted, " has no local header at ", header));
  }
  // The local extra field differs from the central one: torch pads there to align the data.
  const uint64_t prefix = kLocalBytes + uint64_t{Load<uint16_t>(header + 26)} + Load<uint16_t>(header + 28);
  const bool same_name = Load<uint16_t>(header + 26) == name_bytes && InRange(header, prefix, size_) &&
                         std::memcmp(data_ + header + kLocalBytes, located.entry.name.data(), name_bytes) == 0;
  if (!same_name) return Bad(quoted + " has another name in its local header");
  if (!InRange(header + prefix, num_bytes, size_))
    return Bad(absl::StrCat(quoted, " of ", num_bytes, " bytes is cut off"));
  located.header_offset = static_cast<int64_t>(header);
  located.entry.offset = static_cast<int64_t>(header + prefix);
  located.entry.num_bytes = static_cast<int64_t>(num_bytes);
  return located;
}

// Entries begin at 0, follow each other without overlap and end before the directory.
absl::Status Reader::CheckLayout(std::vector<LocatedEntry>& located, int64_t directory_begin) const {
  std::sort(located.begin(), located.end(),
            [](const LocatedEntry& a, const LocatedEntry& b) { return a.header_offset < b.header_offset; });
  if (!located.empty() && located[0].header_offset != 0) return Bad("bytes before the first zip entry");
  int64_t covered = 0;
  for (const LocatedEntry& item : located) {
    if (item.header_offset < covered) return Bad(absl::StrCat("zip entry \"", item.entry.name, "\" overlaps another"));
    covered = item.entry.offset + item.entry.num_bytes;
  }
  if (covered > directory_begin) return Bad("a zip entry overlaps the directory");
  return absl::OkStatus();
}

absl::StatusOr<std::vector<ZipEntry>> Reader::Read() {
  ASSIGN_OR_RETURN(const Directory directory, FindDirectory());
  std::vector<LocatedEntry> located;
  located.reserve(directory.num_entries);
  uint64_t at = directory.offset;
  const uint64_t end = directory.offset + directory.num_bytes;
  for (uint64_t i = 0; i < directory.num_entries; ++i) {
    ASSIGN_OR_RETURN(LocatedEntry entry, ReadCentral(at, end));
    located.push_back(std::move(entry));
  }
  if (at != end) return Bad(absl::StrCat(end - at, " bytes after the last zip directory record"));
  RETURN_IF_ERROR(CheckLayout(located, static_cast<int64_t>(directory.offset)));
  std::vector<ZipEntry> entries;
  entries.reserve(located.size());
  for (LocatedEntry& item : located) entries.push_back(std::move(item.entry));
  std::sort(entries.begin(), entries.end(), [](const ZipEntry& a, const ZipEntry& b) { return a.name < b.name; });
  for (size_t i = 1; i < entries.size(); ++i) {
    if (entries[i].name == entries[i - 1].name) return Bad(absl::StrCat("two zip entries \"", entries[i].name, "\""));
  }
  return entries;
}

}  // namespace

absl::StatusOr<std::vector<ZipEntry>> ReadStoredZip(const uint8_t* data, int64_t size, const std::string& file) {
  return Reader(data, size, file).Read();
}

}  // namespace minitron::engine
