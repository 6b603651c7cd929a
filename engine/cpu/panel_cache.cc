#include "engine/cpu/panel_cache.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/hash.h"
#include "engine/cpu/panel_format.h"

namespace minitron::engine::cpu {
namespace {

constexpr int64_t kHeaderBytes = 4096;
constexpr int64_t kChunkBytes = int64_t{8} << 20;
constexpr int64_t kPageBytes = 4096;
constexpr int64_t kSampleBytes = 4096;
// Raise it when a panel's layout or the rounding of pack.cc changes: files of before are then made anew.
constexpr uint64_t kLayoutVersion = 1;
constexpr char kMagic[8] = {'M', 'T', 'P', 'A', 'N', 'E', 'L', 'S'};

// The first bytes of a file. Compared with memcmp, so there is no padding.
struct HeaderFields {
  char magic[8];
  uint64_t layout_version;
  uint64_t plan_hash;
  uint64_t image_bytes;
  uint64_t table_hash;    // of the checksum table
  uint64_t content_hash;  // of all bytes of all source matrices
  uint64_t identity;      // of the source files; last, so that it can be renewed on its own
};
static_assert(sizeof(HeaderFields) == 56);

absl::Status Failure(const std::string& path, const char* what) {
  return absl::UnavailableError(absl::StrCat(path, ": ", what, ": ", std::strerror(errno)));
}

// What is to be packed to what: shapes, types, order, and of each matrix its first, middle and last bytes.
uint64_t PlanHash(const PackPlan& plan) {
  uint64_t hash = kLayoutVersion;
  for (const PackedMatrix& matrix : plan.matrices) {
    const int64_t shape[] = {matrix.source.rows, matrix.source.cols, static_cast<int64_t>(matrix.source.dtype),
                             static_cast<int64_t>(matrix.dtype), matrix.offset};
    hash = HashBytes(shape, sizeof(shape), hash);
    const int64_t bytes = matrix.source.bytes();
    const int64_t sample = std::min(kSampleBytes, bytes);
    for (const int64_t at : {int64_t{0}, (bytes - sample) / 2, bytes - sample}) {
      hash = HashBytes(static_cast<const uint8_t*>(matrix.source.data) + at, sample, hash);
    }
  }
  return hash;
}

// The checksums of the image's chunks. Reading it all is also what brings the file into memory.
std::vector<uint64_t> ChunkHashes(const uint8_t* image, int64_t image_bytes, ThreadPool& pool) {
  std::vector<uint64_t> hashes(CeilDiv(image_bytes, kChunkBytes));
  pool.ParallelFor(static_cast<int64_t>(hashes.size()), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunkBytes;
      const int64_t bytes = std::min(kChunkBytes, image_bytes - first);
      madvise(const_cast<uint8_t*>(image) + first, bytes, MADV_POPULATE_READ);  // many pages per fault; a hint
      hashes[chunk] = HashBytes(image + first, bytes, static_cast<uint64_t>(chunk));
    }
  });
  return hashes;
}

uint64_t TableHash(const std::vector<uint64_t>& table) {
  return HashBytes(table.data(), static_cast<int64_t>(table.size() * sizeof(uint64_t)), 1);
}

// A file without a name: nothing is left behind whatever happens before it gets one. -1 with errno on failure.
int OpenUnnamed(int dir_fd) { return openat(dir_fd, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0644); }

// Gives an unnamed file its name, replacing a file of that name in one step.
absl::Status Publish(int dir_fd, int fd, const std::string& name, const std::string& path) {
  const std::string source = absl::StrCat("/proc/self/fd/", fd);
  const std::string temporary = absl::StrCat(".", name, ".", getpid());
  unlinkat(dir_fd, temporary.c_str(), 0);
  if (linkat(AT_FDCWD, source.c_str(), dir_fd, temporary.c_str(), AT_SYMLINK_FOLLOW) != 0) return Failure(path, "link");
  if (renameat(dir_fd, temporary.c_str(), dir_fd, name.c_str()) == 0) return absl::OkStatus();
  absl::Status failure = Failure(path, "rename");
  unlinkat(dir_fd, temporary.c_str(), 0);
  return failure;
}

}  // namespace

CachedImage::~CachedImage() { munmap(mapping_, mapping_bytes_); }

absl::StatusOr<PanelCache> PanelCache::Open(const std::string& dir, const PackPlan& plan, const Checkpoint& checkpoint,
                                            ThreadPool& pool) {
  ScopedFd fd(open(dir.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECTORY));
  if (fd.get() < 0) {
    return absl::InvalidArgumentError(absl::StrCat("cache folder '", dir, "': ", std::strerror(errno)));
  }
  return PanelCache(std::move(fd), dir, plan, checkpoint, pool);
}

PanelCache::PanelCache(ScopedFd dir, const std::string& dir_path, const PackPlan& plan, const Checkpoint& checkpoint,
                       ThreadPool& pool)
    : dir_(std::move(dir)), plan_(plan), checkpoint_(checkpoint), pool_(pool) {
  const char* format = plan.matrices.empty() ? "none" : DTypeName(plan.matrices.front().dtype);
  name_ = absl::StrFormat("minitron-%s-%016x.panels", format, PlanHash(plan));
  path_ = absl::StrCat(dir_path, "/", name_);
  num_chunks_ = CeilDiv(plan.num_bytes, kChunkBytes);
  image_offset_ = CeilDiv(kHeaderBytes + num_chunks_ * static_cast<int64_t>(sizeof(uint64_t)), kPageBytes) * kPageBytes;
  file_bytes_ = image_offset_ + plan.num_bytes;
}

std::string PanelCache::Header(uint64_t content, uint64_t table_hash) const {
  HeaderFields fields{{},         kLayoutVersion, PlanHash(plan_),       static_cast<uint64_t>(plan_.num_bytes),
                      table_hash, content,        checkpoint_.identity()};
  std::memcpy(fields.magic, kMagic, sizeof(kMagic));
  std::string header(kHeaderBytes, '\0');
  std::memcpy(header.data(), &fields, sizeof(fields));
  return header;
}

uint64_t PanelCache::ContentHash() {
  uint64_t hash = 0;
  for (const PackedMatrix& matrix : plan_.matrices) {
    const auto* bytes = static_cast<const uint8_t*>(matrix.source.data);
    for (const uint64_t chunk : ChunkHashes(bytes, matrix.source.bytes(), pool_)) {
      hash = HashBytes(&chunk, sizeof(chunk), hash);
    }
    checkpoint_.DoneWith(bytes, matrix.source.bytes());
  }
  return hash;
}

// Everything but the chunks themselves.
absl::Status PanelCache::CheckHeader(const ScopedFd& fd, const uint8_t* mapping) {
  HeaderFields fields;
  std::memcpy(&fields, mapping, sizeof(fields));
  // The header this program would write, given the two hashes that cannot be known beforehand.
  std::string expected = Header(fields.content_hash, fields.table_hash);
  const bool same_files = fields.identity == checkpoint_.identity();
  constexpr size_t kIdentityAt = offsetof(HeaderFields, identity);
  const size_t after = sizeof(HeaderFields);
  if (std::memcmp(mapping, expected.data(), kIdentityAt) != 0 ||
      std::memcmp(mapping + after, expected.data() + after, kHeaderBytes - after) != 0) {
    return absl::DataLossError(absl::StrCat(path_, ": header differs"));
  }
  if (same_files) return absl::OkStatus();
  if (ContentHash() != fields.content_hash)
    return absl::DataLossError(absl::StrCat(path_, ": made from other weights"));
  // Remember the files, so that they need not be read again. Not worth failing for.
  const uint64_t identity = checkpoint_.identity();
  const ScopedFd writable(openat(dir_.get(), name_.c_str(), O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  struct stat opened {};
  struct stat mapped {};
  if (writable.get() >= 0 && fstat(writable.get(), &opened) == 0 && fstat(fd.get(), &mapped) == 0 &&
      opened.st_ino == mapped.st_ino && opened.st_dev == mapped.st_dev) {
    static_cast<void>(!pwrite(writable.get(), &identity, sizeof(identity), kIdentityAt));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<CachedImage>> PanelCache::Find() {
  const ScopedFd fd(openat(dir_.get(), name_.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY));
  if (fd.get() < 0 && errno == ENOENT) return absl::NotFoundError(absl::StrCat(path_, ": not there"));
  if (fd.get() < 0) return absl::DataLossError(absl::StrCat(path_, ": ", std::strerror(errno)));
  struct stat info {};
  if (fstat(fd.get(), &info) != 0 || !S_ISREG(info.st_mode)) {
    return absl::DataLossError(absl::StrCat(path_, ": not a regular file"));
  }
  if (info.st_size != file_bytes_) {
    return absl::DataLossError(absl::StrCat(path_, ": ", info.st_size, " bytes, ", file_bytes_, " expected"));
  }
  void* mapping = mmap(nullptr, file_bytes_, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (mapping == MAP_FAILED) return absl::DataLossError(absl::StrCat(path_, ": mmap: ", std::strerror(errno)));
  auto image = std::make_unique<CachedImage>(static_cast<uint8_t*>(mapping), file_bytes_, image_offset_);
  const auto* bytes = static_cast<const uint8_t*>(mapping);
  std::vector<uint64_t> table(num_chunks_);
  std::memcpy(table.data(), bytes + kHeaderBytes, table.size() * sizeof(uint64_t));
  HeaderFields fields;
  std::memcpy(&fields, bytes, sizeof(fields));
  if (TableHash(table) != fields.table_hash) return absl::DataLossError(absl::StrCat(path_, ": checksums are damaged"));
  RETURN_IF_ERROR(CheckHeader(fd, bytes));
  const std::vector<uint64_t> found = ChunkHashes(image->data(), plan_.num_bytes, pool_);
  for (size_t chunk = 0; chunk < table.size(); ++chunk) {
    if (found[chunk] != table[chunk]) {
      return absl::DataLossError(absl::StrCat(path_, ": bytes ", image_offset_ + chunk * kChunkBytes, " to ",
                                              image_offset_ + (chunk + 1) * kChunkBytes, " are damaged"));
    }
  }
  return image;
}

absl::StatusOr<std::unique_ptr<CachedImage>> PanelCache::Build(bool show_progress) {
  const ScopedFd fd(OpenUnnamed(dir_.get()));
  if (fd.get() < 0) return Failure(path_, "create");
  // Reserved, not sparse: writing to a mapping when the disk is full would be SIGBUS.
  errno = posix_fallocate(fd.get(), 0, file_bytes_);
  if (errno != 0) return Failure(path_, "reserve space");
  void* mapping = mmap(nullptr, file_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (mapping == MAP_FAILED) return Failure(path_, "mmap");
  auto image = std::make_unique<CachedImage>(static_cast<uint8_t*>(mapping), file_bytes_, image_offset_);
  auto* bytes = static_cast<uint8_t*>(mapping);
  RETURN_IF_ERROR(PackImage(plan_, &checkpoint_, pool_, show_progress, bytes + image_offset_));
  const std::vector<uint64_t> table = ChunkHashes(image->data(), plan_.num_bytes, pool_);
  std::memcpy(bytes + kHeaderBytes, table.data(), table.size() * sizeof(uint64_t));
  const std::string header = Header(ContentHash(), TableHash(table));
  std::copy(header.begin(), header.end(), reinterpret_cast<char*>(bytes));
  mprotect(mapping, file_bytes_, PROT_READ);
  RETURN_IF_ERROR(Publish(dir_.get(), fd.get(), name_, path_));
  return image;
}

}  // namespace minitron::engine::cpu
