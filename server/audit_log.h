// AuditLog: who did what, one JSON object per line: time, method, status, tenant, token id, request id, peer, counts,
// duration; refused callers and reloads too. Never prompts, outputs, token ids or secrets. Append-only.
//
// Write never blocks: a bounded queue and a thread of its own. Lines beyond the rate or the queue are dropped and
// counted, in the metrics and in the log itself.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "engine/base/log.h"

namespace minitron::server {

struct AuditLogOptions {
  std::string path;  // appended to; created with mode 0640
  int max_lines_per_second = 2000;
  size_t max_queued_lines = 4096;
};

class AuditLog {
 public:
  // Error: INVALID_ARGUMENT naming the path when it cannot be opened.
  static absl::StatusOr<std::unique_ptr<AuditLog>> Open(const AuditLogOptions& options);
  ~AuditLog();  // writes what is queued

  // Called for every line that is dropped. Call before the first Write.
  void SetOnDrop(std::function<void()> on_drop) { on_drop_ = std::move(on_drop); }

  // Any thread.
  void Write(const std::string& event, const base::LogFields& fields);

 private:
  AuditLog(const AuditLogOptions& options, int fd);
  void Run();

  const AuditLogOptions options_;
  const int fd_;
  std::function<void()> on_drop_ = [] {};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::string> queue_;
  int64_t second_ = 0;  // the one that num_in_second_ counts
  int num_in_second_ = 0;
  int64_t num_dropped_ = 0;  // not yet told in the log
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace minitron::server
