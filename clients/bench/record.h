// CallRecord: what was seen of one request. TokenClock: fills it while the answer arrives.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace minitron::bench {

using Clock = std::chrono::steady_clock;

inline double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

struct CallRecord {
  double start_s = 0;          // sent this long after the run began
  double first_token_s = 0;    // from sending to the first message with tokens
  double total_s = 0;          // from sending to the end of the call
  std::vector<double> gaps_s;  // between successive messages with tokens
  uint32_t prompt_tokens = 0;  // as the server counts; the dataset's count where it does not say
  uint32_t output_tokens = 0;  // as the server counts
  std::string error;           // name of the status; empty: success
  std::string message;         // of the error

  bool ok() const { return error.empty(); }
  // Time per output token after the first; 0 when there is only one.
  double TimePerToken() const { return output_tokens > 1 ? (total_s - first_token_s) / (output_tokens - 1) : 0; }
};

// Not synchronized: the events of one call come one after the other.
class TokenClock {
 public:
  void Start() { begin_ = last_ = Clock::now(); }

  // A message with `tokens` new tokens; 0 when it carries text and the protocol does not count.
  void OnTokens(uint32_t tokens) {
    const Clock::time_point now = Clock::now();
    if (has_first_) {
      record_.gaps_s.push_back(Seconds(now - last_));
    } else {
      record_.first_token_s = Seconds(now - begin_);
      has_first_ = true;
    }
    last_ = now;
    record_.output_tokens += tokens;
  }

  // The call ended; `error` is empty after success. A success without any token is an error.
  CallRecord Finish(std::string error, std::string message) {
    record_.total_s = Seconds(Clock::now() - begin_);
    record_.error = std::move(error);
    record_.message = std::move(message);
    if (record_.ok() && !has_first_) {
      record_.error = "EMPTY";
      record_.message = "the call succeeded without a token";
    }
    return std::move(record_);
  }

  CallRecord& record() { return record_; }

 private:
  CallRecord record_;
  Clock::time_point begin_;
  Clock::time_point last_;
  bool has_first_ = false;
};

}  // namespace minitron::bench
