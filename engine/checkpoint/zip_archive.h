// Directory of a zip file whose entries are stored without compression, with or without zip64: what torch.save writes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace minitron::engine {

// One stored file: its bytes are [offset, offset + num_bytes) of the archive, in bounds and overlapping no other's.
struct ZipEntry {
  std::string name;
  int64_t offset = 0;
  int64_t num_bytes = 0;
};

// Reads the central directory of an archive of `size` bytes at `data`; entries sorted by name, names all different.
// CRCs are not verified: that would read the whole file. Error: INVALID_ARGUMENT (`file`, entry, value): no zip,
// compressed or encrypted entries, more than one disk, bytes outside the archive, entries that overlap.
absl::StatusOr<std::vector<ZipEntry>> ReadStoredZip(const uint8_t* data, int64_t size, const std::string& file);

}  // namespace minitron::engine
