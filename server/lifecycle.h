// Lifecycle: signals and other reasons to end, as events the main thread can wait for.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace minitron::server {

// Blocks SIGTERM and SIGINT in the calling thread and all its children, and ignores SIGPIPE. Call first in main.
void BlockSignals();

// Requires BlockSignals before any thread was started. RequestDrain and ReportEngineFailure may be called from any
// thread.
class Lifecycle {
 public:
  Lifecycle();   // starts the signal thread: the first signal drains, a second one ends the process at once
  ~Lifecycle();  // ends it

  void RequestDrain();
  void ReportEngineFailure();

  // Waits for a drain request or a failure of the engine.
  void WaitForEnd();
  // Waits for `delay`, or less when the engine fails.
  void Delay(std::chrono::duration<double> delay);
  bool engine_failed();

 private:
  void WaitForSignals();

  std::mutex mutex_;
  std::condition_variable changed_;
  bool drain_ = false;
  bool engine_failed_ = false;
  std::thread signals_;
};

}  // namespace minitron::server
