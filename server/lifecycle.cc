#include "server/lifecycle.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "engine/base/log.h"

namespace minitron::server {
namespace {

// Ends the signal thread; nobody else sends it.
constexpr int kStopSignal = SIGUSR2;

sigset_t WaitedSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  sigaddset(&set, kStopSignal);
  return set;
}

}  // namespace

void BlockSignals() {
  const sigset_t set = WaitedSignals();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  signal(SIGPIPE, SIG_IGN);
}

Lifecycle::Lifecycle() : signals_([this] { WaitForSignals(); }) {}

Lifecycle::~Lifecycle() {
  pthread_kill(signals_.native_handle(), kStopSignal);
  signals_.join();
}

void Lifecycle::WaitForSignals() {
  const sigset_t set = WaitedSignals();
  bool signalled = false;
  while (true) {
    int number = 0;
    if (sigwait(&set, &number) != 0 || number == kStopSignal) return;
    base::LogInfo(absl::StrCat("signal number=", number, signalled ? " action=exit" : " action=drain"));
    if (signalled) _exit(128 + number);
    signalled = true;
    RequestDrain();
  }
}

void Lifecycle::RequestDrain() {
  std::lock_guard<std::mutex> lock(mutex_);
  drain_ = true;
  changed_.notify_all();
}

void Lifecycle::ReportEngineFailure() {
  std::lock_guard<std::mutex> lock(mutex_);
  engine_failed_ = true;
  changed_.notify_all();
}

void Lifecycle::WaitForEnd() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return drain_ || engine_failed_; });
}

void Lifecycle::Delay(std::chrono::duration<double> delay) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, delay, [this] { return engine_failed_; });
}

bool Lifecycle::engine_failed() {
  std::lock_guard<std::mutex> lock(mutex_);
  return engine_failed_;
}

}  // namespace minitron::server
