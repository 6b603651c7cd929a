#include "server/audit_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"

namespace minitron::server {
namespace {

std::string Line(const std::string& event, const base::LogFields& fields) {
  return base::FormatLogLine(base::LogFormat::kJson, base::LogLevel::kInfo, base::Timestamp(), event, fields);
}

}  // namespace

absl::StatusOr<std::unique_ptr<AuditLog>> AuditLog::Open(const AuditLogOptions& options) {
  const int fd = open(options.path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0640);
  if (fd < 0) return absl::InvalidArgumentError(absl::StrCat("--audit-log=", options.path, ": cannot be written"));
  return std::unique_ptr<AuditLog>(new AuditLog(options, fd));
}

AuditLog::AuditLog(const AuditLogOptions& options, int fd) : options_(options), fd_(fd), thread_([this] { Run(); }) {}

AuditLog::~AuditLog() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
  close(fd_);
}

void AuditLog::Write(const std::string& event, const base::LogFields& fields) {
  std::string line = Line(event, fields);
  const int64_t second =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (second != std::exchange(second_, second)) num_in_second_ = 0;
    if (++num_in_second_ > options_.max_lines_per_second || queue_.size() >= options_.max_queued_lines) {
      ++num_dropped_;
    } else {
      if (num_dropped_ > 0) queue_.push_back(Line("lines dropped", {{"count", absl::StrCat(num_dropped_)}}));
      num_dropped_ = 0;
      queue_.push_back(std::move(line));
      line.clear();
    }
  }
  if (!line.empty()) return on_drop_();
  changed_.notify_all();
}

void AuditLog::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    std::deque<std::string> lines;
    lines.swap(queue_);
    lock.unlock();
    for (const std::string& line : lines) {
      // One write per line: O_APPEND keeps lines of several processes apart. A full disk is the disk's alert to raise.
      [[maybe_unused]] const ssize_t written = write(fd_, line.data(), line.size());
    }
    lock.lock();
  }
}

}  // namespace minitron::server
