// Files of a model folder: opened beneath it, regular files only, mapped read-only.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace minitron::engine {

// A file descriptor that closes itself.
class ScopedFd {
 public:
  explicit ScopedFd(int fd) : fd_(fd) {}
  ScopedFd(ScopedFd&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  ScopedFd& operator=(ScopedFd&&) = delete;
  ~ScopedFd();
  int get() const { return fd_; }

 private:
  int fd_;
};

// A whole file, mapped PROT_READ and MAP_PRIVATE; the base is page aligned. Immutable; thread-safe.
// A file that is cut short while mapped raises SIGBUS on access: model files must not change under a running server.
class MappedFile {
 public:
  // `fd` must be a regular file; `path` is for messages only.
  static absl::StatusOr<std::unique_ptr<MappedFile>> Map(const ScopedFd& fd, const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  // Device, inode, size and times of modification and change, hashed: the same as long as nobody has written to the
  // file or put another in its place.
  uint64_t identity() const { return identity_; }
  const uint8_t* data() const { return data_; }
  int64_t size() const { return size_; }
  const std::string& path() const { return path_; }

 private:
  MappedFile(const uint8_t* data, int64_t size, uint64_t identity, const std::string& path)
      : data_(data), size_(size), identity_(identity), path_(path) {}

  const uint8_t* const data_;  // null when size_ is 0
  const int64_t size_;
  const uint64_t identity_;
  const std::string path_;
};

// Who chose a file name: this program, or the content of a file in the folder.
enum class NameOrigin {
  kWellKnown,  // config.json and the like: may be a symlink out of the folder (Hugging Face caches link to blobs/)
  kFromIndex,  // a plain file name, and every symlink must resolve beneath the folder
};

// An opened model folder. Thread-safe.
class ModelDir {
 public:
  // Error: NOT_FOUND when there is no such folder; INVALID_ARGUMENT when it cannot be read.
  static absl::StatusOr<ModelDir> Open(const std::string& path);

  // Errors: NOT_FOUND; INVALID_ARGUMENT when the name is not allowed or names no regular file, or the limit is passed.
  absl::StatusOr<std::unique_ptr<MappedFile>> Map(const std::string& name, NameOrigin origin) const;
  absl::StatusOr<std::string> ReadText(const std::string& name, int64_t max_bytes) const;

 private:
  ModelDir(ScopedFd fd, const std::string& path) : fd_(std::move(fd)), path_(path) {}
  absl::StatusOr<ScopedFd> OpenRegular(const std::string& name, NameOrigin origin) const;

  ScopedFd fd_;
  std::string path_;
};

// Reads the pages that hold [begin, begin + length) of a mapped file and maps them, so that the first use does not pay
// for it. Never fails: pages that could not be read are read at their first use.
void MapPages(const uint8_t* begin, int64_t length);

// A load of this size takes seconds from a disk: it is worth waiting for, and showing.
inline constexpr int64_t kPrefaultThresholdBytes = 1'000'000'000;

// Reads files of `min_bytes` in all or more into memory and maps their pages, unless they do not fit: a server that
// says it is ready must not spend its first request on page faults. With `show_progress` and stderr a terminal, draws a
// bar. Never fails: pages that could not be read are read at their first use.
void Prefault(const std::vector<std::unique_ptr<MappedFile>>& files, bool show_progress,
              int64_t min_bytes = kPrefaultThresholdBytes);

// "loading weights [#####     ]  50%  8.3 / 16.5 GB". Requires 0 <= done <= total, total > 0.
std::string ProgressLine(int64_t done_bytes, int64_t total_bytes);

}  // namespace minitron::engine
