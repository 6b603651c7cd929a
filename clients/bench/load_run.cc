#include "clients/bench/load_run.h"

#include <sys/resource.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>

namespace minitron::bench {
namespace {

using std::chrono::milliseconds;

double ProcessCpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// The state of one run; the sending thread and the driver's threads share it.
class Run {
 public:
  Run(const std::vector<Prompt>& prompts, const LoadOptions& options, Driver* driver)
      : prompts_(prompts), options_(options), driver_(driver), begin_(Clock::now()), next_report_(begin_) {
    progress_.total = prompts.size();
  }

  RunResult Go() {
    const double cpu_before = ProcessCpuSeconds();
    std::unique_lock<std::mutex> lock(mutex_);
    for (size_t i = 0; i < prompts_.size() && WaitForTurn(i, &lock); ++i) Send(i, &lock);
    while (open_ > 0) Wait(Clock::now() + milliseconds(200), &lock);
    result_.interrupted = Stopped() && progress_.sent < prompts_.size();
    result_.client_cpu_s = ProcessCpuSeconds() - cpu_before;
    result_.duration_s = Seconds(last_end_ - begin_);
    Report(&lock);
    return std::move(result_);
  }

 private:
  bool Stopped() const { return options_.stop != nullptr && options_.stop->load(); }

  // Until request i is due and there is room. False: stop.
  bool WaitForTurn(size_t i, std::unique_lock<std::mutex>* lock) {
    const Clock::time_point due =
        options_.offsets.empty()
            ? begin_
            : begin_ + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(options_.offsets[i]));
    while (!Stopped()) {
      const Clock::time_point now = Clock::now();
      const bool room = options_.max_concurrency == 0 || open_ < options_.max_concurrency;
      if (room && now >= due) {
        if (!options_.offsets.empty()) result_.late_s = std::max(result_.late_s, Seconds(now - due));
        return true;
      }
      const Clock::time_point latest = now + milliseconds(200);
      Wait(room ? std::min(due, latest) : latest, lock);
    }
    return false;
  }

  void Send(size_t i, std::unique_lock<std::mutex>* lock) {
    ++open_;
    ++progress_.sent;
    result_.peak_concurrency = std::max(result_.peak_concurrency, open_);
    const double start_s = Seconds(Clock::now() - begin_);
    lock->unlock();
    driver_->Start(prompts_[i], i, [this, start_s](CallRecord record) {
      record.start_s = start_s;
      const std::lock_guard<std::mutex> guard(mutex_);
      last_end_ = Clock::now();
      ++progress_.ended;
      progress_.failed += !record.ok();
      progress_.output_tokens += record.output_tokens;
      result_.records.push_back(std::move(record));
      --open_;
      changed_.notify_all();  // under the lock: the run may be gone right after it
    });
    lock->lock();
  }

  void Wait(Clock::time_point until, std::unique_lock<std::mutex>* lock) {
    changed_.wait_until(*lock, until);
    if (Clock::now() >= next_report_) Report(lock);
  }

  void Report(std::unique_lock<std::mutex>* lock) {
    next_report_ = Clock::now() + milliseconds(1000);
    if (!options_.on_progress) return;
    progress_.elapsed_s = Seconds(Clock::now() - begin_);
    const Progress progress = progress_;
    lock->unlock();
    options_.on_progress(progress);
    lock->lock();
  }

  const std::vector<Prompt>& prompts_;
  const LoadOptions& options_;
  Driver* driver_;  // the caller's
  const Clock::time_point begin_;
  Clock::time_point next_report_;

  std::mutex mutex_;
  std::condition_variable changed_;
  // All below are guarded by mutex_.
  Progress progress_;
  size_t open_ = 0;
  Clock::time_point last_end_ = begin_;
  RunResult result_;
};

}  // namespace

RunResult RunLoad(const std::vector<Prompt>& prompts, const LoadOptions& options, Driver* driver) {
  return Run(prompts, options, driver).Go();
}

}  // namespace minitron::bench
