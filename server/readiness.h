// Readiness: the server is ready while nothing speaks against it. Thread-safe.
#pragma once

#include <functional>
#include <mutex>
#include <set>

namespace minitron::server {

class Readiness {
 public:
  enum class Objection { kStarting, kDraining, kEngineFailed, kHung, kMemory };

  // `apply` hears of every change, one at a time, in order.
  explicit Readiness(std::function<void(bool ready)> apply) : apply_(std::move(apply)) {}

  void Set(Objection objection, bool holds) {
    std::lock_guard<std::mutex> lock(mutex_);
    const bool was_ready = objections_.empty();
    if (holds) {
      objections_.insert(objection);
    } else {
      objections_.erase(objection);
    }
    if (objections_.empty() != was_ready) apply_(!was_ready);
  }

 private:
  const std::function<void(bool)> apply_;
  std::mutex mutex_;
  std::set<Objection> objections_ = {Objection::kStarting};
};

}  // namespace minitron::server
