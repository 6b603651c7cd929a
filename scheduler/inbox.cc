#include "scheduler/inbox.h"

#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "engine/base/check.h"

namespace minitron::scheduler {
namespace {

absl::Status Unavailable(const std::string& message, const char* reason) {
  absl::Status status = absl::UnavailableError(message);
  status.SetPayload(kReasonTypeUrl, absl::Cord(reason));
  return status;
}

}  // namespace

absl::Status Inbox::Add(Request request) {
  const int num_sequences = request.num_sequences;
  int depth = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (failed_) return absl::InternalError("the engine has failed");
    if (draining_) return Unavailable("draining: no new requests", kReasonDraining);
    depth = num_queued_here_ + num_queued_scheduler_;
    if (num_sequences <= max_queued_ - depth) {
      contents_.adds.push_back(std::move(request));
      num_queued_here_ += num_sequences;
      num_live_ += num_sequences;
      work_.notify_one();
      return absl::OkStatus();
    }
  }
  return Unavailable(absl::StrCat("queue full: ", depth, " sequences queued, limit ", max_queued_, ", ", num_sequences,
                                  " more asked for"),
                     kReasonQueueFull);
}

void Inbox::Abort(AbortRequest abort) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (failed_ || closed_) return;  // nobody will take it
  contents_.aborts.push_back(abort);
  work_.notify_one();
}

void Inbox::BeginDrain() {
  const std::lock_guard<std::mutex> lock(mutex_);
  draining_ = true;
}

void Inbox::Close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  draining_ = true;
  closed_ = true;
  work_.notify_all();
}

void Inbox::Fail() {
  const std::lock_guard<std::mutex> lock(mutex_);
  failed_ = true;
  contents_ = {};
  num_queued_here_ = num_queued_scheduler_ = num_live_ = 0;
  idle_.notify_all();
}

bool Inbox::WaitIdle(TimePoint deadline) {
  std::unique_lock<std::mutex> lock(mutex_);
  return idle_.wait_until(lock, deadline, [this] { return num_live_ == 0; });
}

Inbox::Contents Inbox::Take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  num_queued_scheduler_ += std::exchange(num_queued_here_, 0);
  return std::exchange(contents_, {});
}

void Inbox::ReportQueued(int num_queued) {
  const std::lock_guard<std::mutex> lock(mutex_);
  num_queued_scheduler_ = num_queued;
}

void Inbox::ReportFinished(int num_finished) {
  const std::lock_guard<std::mutex> lock(mutex_);
  num_live_ -= num_finished;
  CHECK(num_live_ >= 0);
  if (num_live_ == 0) idle_.notify_all();
}

bool Inbox::WaitForWork() {
  std::unique_lock<std::mutex> lock(mutex_);
  work_.wait(lock, [this] { return closed_ || has_contents(); });
  return !closed_;
}

int Inbox::num_queued() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_queued_here_ + num_queued_scheduler_;
}

int Inbox::num_live() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_live_;
}

bool Inbox::closed() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return closed_;
}

bool Inbox::failed() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return failed_;
}

}  // namespace minitron::scheduler
