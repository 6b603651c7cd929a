// PanelCache: packed weights in a file, so that the second start maps them instead of packing again.
//
// A cache file is keyed by what it was made from: its name carries the format and a hash of every matrix's shape, type
// and a sample of its bytes; its header the identity of the source files (device, inode, size, times) and a hash of all
// bytes of all matrices. Files with another identity but the same bytes (a copy, a touched file) are recognised by
// reading them once.
//
// A cache file is never trusted: its header must be byte for byte the one this program would write, and every chunk
// must have its checksum, or it is made anew. What it may hold beyond that is numbers: panels have no sizes, offsets or
// indices in them, so no content of theirs can lead outside of the image.
//
//   [0, 4096)                  header: magic, layout version, format, sizes, hashes, checksum of the checksum table
//   [4096, image_offset)       one checksum per chunk of the image
//   [image_offset, file end)   the image
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/checkpoint/checkpoint.h"
#include "engine/checkpoint/mapped_file.h"
#include "engine/cpu/pack_plan.h"
#include "engine/cpu/thread_pool.h"

namespace minitron::engine::cpu {

// A packed image in memory mapped from a cache file; read-only.
class CachedImage {
 public:
  CachedImage(uint8_t* mapping, int64_t mapping_bytes, int64_t image_offset)
      : mapping_(mapping), mapping_bytes_(mapping_bytes), image_offset_(image_offset) {}
  CachedImage(const CachedImage&) = delete;
  CachedImage& operator=(const CachedImage&) = delete;
  ~CachedImage();

  const uint8_t* data() const { return mapping_ + image_offset_; }

 private:
  uint8_t* const mapping_;
  const int64_t mapping_bytes_;
  const int64_t image_offset_;
};

// The cache file of one plan in one folder. Load-time only; one thread, which lends its pool.
class PanelCache {
 public:
  // `checkpoint` must outlive the cache. Error: INVALID_ARGUMENT when `dir` is no folder.
  static absl::StatusOr<PanelCache> Open(const std::string& dir, const PackPlan& plan, const Checkpoint& checkpoint,
                                         ThreadPool& pool);

  const std::string& path() const { return path_; }

  // Maps the file and reads all of it once. Errors: NOT_FOUND (there is none), DATA_LOSS (damaged, or made from other
  // weights: says what differs).
  absl::StatusOr<std::unique_ptr<CachedImage>> Find();

  // Packs into a new file, which appears under its name when it is whole. Errors: the folder cannot be written or has
  // no room (what failed, and errno); nothing is left behind.
  absl::StatusOr<std::unique_ptr<CachedImage>> Build(bool show_progress);

 private:
  PanelCache(ScopedFd dir, const std::string& dir_path, const PackPlan& plan, const Checkpoint& checkpoint,
             ThreadPool& pool);

  std::string Header(uint64_t content, uint64_t table_hash) const;
  uint64_t ContentHash();
  absl::Status CheckHeader(const ScopedFd& fd, const uint8_t* mapping);

  ScopedFd dir_;
  const PackPlan& plan_;
  const Checkpoint& checkpoint_;
  ThreadPool& pool_;
  std::string name_;
  std::string path_;
  int64_t num_chunks_ = 0;
  int64_t image_offset_ = 0;
  int64_t file_bytes_ = 0;
};

}  // namespace minitron::engine::cpu
