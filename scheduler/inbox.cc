#include "scheduler/inbox.h"

#include <utility>

#include "absl/strings/cord.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"

namespace minitron::scheduler {
namespace {

absl::Status Unavailable(const std::string& message, const char* reason) {
  absl::Status status = absl::UnavailableError(message);
  status.SetPayload(kReasonTypeUrl, absl::Cord(reason));
  return status;
}

}  // namespace

absl::Status Inbox::CheckLocked(const Arrival& arrival) const {
  if (failed_) return absl::InternalError("the engine has failed");
  if (draining_) return Unavailable("draining: no new requests", kReasonDraining);
  return ledger_.Check(arrival);
}

absl::Status Inbox::Check(const Arrival& arrival) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return CheckLocked(arrival);
}

absl::Status Inbox::Add(Request request) {
  const Arrival arrival = ArrivalOf(request);
  const std::lock_guard<std::mutex> lock(mutex_);
  RETURN_IF_ERROR(CheckLocked(arrival));
  ledger_.Enter(request);
  num_live_ += request.num_sequences;
  contents_.adds.push_back(std::move(request));
  work_.notify_one();
  return absl::OkStatus();
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
  num_live_ = 0;
  idle_.notify_all();
}

bool Inbox::WaitIdle(TimePoint deadline) {
  std::unique_lock<std::mutex> lock(mutex_);
  return idle_.wait_until(lock, deadline, [this] { return num_live_ == 0; });
}

Inbox::Contents Inbox::Take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(contents_, {});
}

void Inbox::ReportLeft(const std::vector<std::shared_ptr<Sequence>>& left, TimePoint now) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& sequence : left) {
    ledger_.Leave(sequence->request(), sequence->index(), sequence->ever_scheduled());
  }
  ledger_.Tick(now);
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
  return failed_ ? 0 : static_cast<int>(ledger_.queued().num_sequences);
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
