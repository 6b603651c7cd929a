#include "server/small_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "absl/strings/str_cat.h"

namespace minitron::server {

absl::StatusOr<std::string> ReadSmallFile(const std::string& path, int64_t max_bytes) {
  // O_NONBLOCK: opening a FIFO must not wait for a writer.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
  struct stat info {};
  const bool regular = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
  std::string content;
  char buffer[8192];
  ssize_t count = 0;
  while (regular && static_cast<int64_t>(content.size()) <= max_bytes) {
    count = read(fd, buffer, sizeof(buffer));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;
    content.append(buffer, static_cast<size_t>(count));
  }
  close(fd);
  if (!regular) return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  if (count < 0) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
  if (static_cast<int64_t>(content.size()) > max_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": longer than ", max_bytes, " bytes"));
  }
  return content;
}

}  // namespace minitron::server
