#include "engine/checkpoint/mapped_file.h"

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/hash.h"

namespace minitron::engine {
namespace {

constexpr int64_t kSmallestPage = 4096;
constexpr int64_t kPrefaultChunkBytes = int64_t{64} << 20;
constexpr size_t kMaxNameBytes = 255;  // NAME_MAX
// O_NONBLOCK: opening a FIFO without a writer must not hang. It means nothing to a regular file.
constexpr int kOpenFlags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;

absl::Status OpenError(const std::string& path, int error) {
  const std::string message = absl::StrCat(path, ": ", std::strerror(error));
  if (error == ENOENT || error == ENOTDIR) return absl::NotFoundError(message);
  if (error == EXDEV || error == ELOOP) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, ": a symlink that leads out of the model folder (copy the files, or download them without a cache)"));
  }
  return absl::InvalidArgumentError(message);
}

// Opens `name` so that no path component, symlinks included, leaves the folder. -1 with errno on failure.
int OpenBeneath(int dir_fd, const std::string& name) {
  open_how how{};
  how.flags = kOpenFlags;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS;
  const int fd = static_cast<int>(syscall(SYS_openat2, dir_fd, name.c_str(), &how, sizeof(how)));
  // Kernels before 5.6 and older container filters lack openat2. The name is one component, so refusing any symlink
  // is the same promise, stricter.
  if (fd < 0 && (errno == ENOSYS || errno == EPERM)) return openat(dir_fd, name.c_str(), kOpenFlags | O_NOFOLLOW);
  return fd;
}

bool IsPlainName(const std::string& name) {
  return !name.empty() && name.size() <= kMaxNameBytes && name != "." && name != ".." &&
         name.find('/') == std::string::npos && name.find('\0') == std::string::npos;
}

}  // namespace

ScopedFd::~ScopedFd() {
  if (fd_ >= 0) close(fd_);
}

absl::StatusOr<std::unique_ptr<MappedFile>> MappedFile::Map(const ScopedFd& fd, const std::string& path) {
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) return OpenError(path, errno);
  const int64_t size = info.st_size;
  const int64_t stamp[] = {static_cast<int64_t>(info.st_dev),
                           static_cast<int64_t>(info.st_ino),
                           size,
                           info.st_mtim.tv_sec,
                           info.st_mtim.tv_nsec,
                           info.st_ctim.tv_sec,
                           info.st_ctim.tv_nsec};
  const uint64_t identity = HashBytes(stamp, sizeof(stamp), 0);
  if (size == 0) return std::unique_ptr<MappedFile>(new MappedFile(nullptr, 0, identity, path));
  void* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (data == MAP_FAILED) return absl::InvalidArgumentError(absl::StrCat(path, ": mmap: ", std::strerror(errno)));
  return std::unique_ptr<MappedFile>(new MappedFile(static_cast<const uint8_t*>(data), size, identity, path));
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), size_);
}

absl::StatusOr<ModelDir> ModelDir::Open(const std::string& path) {
  if (path.empty() || path.find('\0') != std::string::npos) {
    return absl::InvalidArgumentError("model folder: empty name, or a NUL byte in it");
  }
  ScopedFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECTORY));
  if (fd.get() < 0) return OpenError(path, errno);
  return ModelDir(std::move(fd), path);
}

absl::StatusOr<ScopedFd> ModelDir::OpenRegular(const std::string& name, NameOrigin origin) const {
  const std::string path = absl::StrCat(path_, "/", name);
  if (!IsPlainName(name)) {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": \"", name, "\" is not a plain file name"));
  }
  ScopedFd fd(origin == NameOrigin::kFromIndex ? OpenBeneath(fd_.get(), name)
                                               : openat(fd_.get(), name.c_str(), kOpenFlags));
  if (fd.get() < 0) return OpenError(path, errno);
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) return OpenError(path, errno);
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  return fd;
}

absl::StatusOr<std::unique_ptr<MappedFile>> ModelDir::Map(const std::string& name, NameOrigin origin) const {
  ASSIGN_OR_RETURN(const ScopedFd fd, OpenRegular(name, origin));
  return MappedFile::Map(fd, absl::StrCat(path_, "/", name));
}

absl::StatusOr<std::string> ModelDir::ReadText(const std::string& name, int64_t max_bytes) const {
  ASSIGN_OR_RETURN(const ScopedFd fd, OpenRegular(name, NameOrigin::kWellKnown));
  const std::string path = absl::StrCat(path_, "/", name);
  std::string text;
  char buffer[16384];
  while (true) {
    const ssize_t count = read(fd.get(), buffer, sizeof(buffer));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return OpenError(path, errno);
    if (count == 0) return text;
    text.append(buffer, count);
    if (static_cast<int64_t>(text.size()) > max_bytes) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": over ", max_bytes, " bytes"));
    }
  }
}

std::string ProgressLine(int64_t done_bytes, int64_t total_bytes) {
  CHECK(total_bytes > 0 && done_bytes >= 0 && done_bytes <= total_bytes);
  constexpr int kWidth = 30;
  const double share = static_cast<double>(done_bytes) / static_cast<double>(total_bytes);
  const int filled = static_cast<int>(share * kWidth);
  char line[128];
  std::snprintf(line, sizeof(line), "loading weights [%s%s] %3d%%  %.1f / %.1f GB", std::string(filled, '#').c_str(),
                std::string(kWidth - filled, ' ').c_str(), static_cast<int>(share * 100.0),
                static_cast<double>(done_bytes) * 1e-9, static_cast<double>(total_bytes) * 1e-9);
  return line;
}

void MapPages(const uint8_t* begin, int64_t length) {
  const auto past_page = static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin) % sysconf(_SC_PAGESIZE));
  begin -= past_page;
  length += past_page;
  if (madvise(const_cast<uint8_t*>(begin), length, MADV_POPULATE_READ) == 0 || errno != EINVAL) return;
  // A kernel before 5.14: touch them one by one.
  const volatile uint8_t* bytes = begin;
  for (int64_t i = 0; i < length; i += kSmallestPage) static_cast<void>(bytes[i]);
}

void Prefault(const std::vector<std::unique_ptr<MappedFile>>& files, bool show_progress, int64_t min_bytes) {
  int64_t total = 0;
  for (const auto& file : files) total += file->size();
  const int64_t memory = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
  // Files that do not fit would push their own beginning out again.
  if (total < min_bytes || total > memory - memory / 10) return;
  const bool draw = show_progress && isatty(STDERR_FILENO) != 0;
  int64_t done = 0;
  for (const auto& file : files) {
    for (int64_t begin = 0; begin < file->size(); begin += kPrefaultChunkBytes) {
      const int64_t length = std::min(kPrefaultChunkBytes, file->size() - begin);
      MapPages(file->data() + begin, length);
      done += length;
      if (draw) std::fprintf(stderr, "\r%s", ProgressLine(done, total).c_str());
    }
  }
  if (draw) std::fprintf(stderr, "\n");
}

}  // namespace minitron::engine
