// Structured logs on stderr, one line each. Text: `I 2026-01-31T12:00:00.123Z event key=value`. JSON: one object with
// time, level, event and the fields. Never log prompts, outputs, token ids or secrets. Thread-safe: one write per line.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace minitron::base {

enum class LogLevel { kInfo, kWarning, kError };
enum class LogFormat { kText, kJson };
using LogFields = std::vector<std::pair<std::string, std::string>>;

// The format of all lines from now on. The stream is the process's own, so its format is too: main calls this once,
// before it starts a thread.
void SetLogFormat(LogFormat format);

// Writes one line. Control characters and invalid UTF-8 are escaped, and a line is cut at 4 KiB. Beyond 500 lines a
// second, information and warnings are dropped and counted; the next line that passes is preceded by their number.
void LogEvent(LogLevel level, const std::string& event, const LogFields& fields = {});

// As LogEvent, for a message that is its own event.
void Log(LogLevel level, const std::string& message);

inline void LogInfo(const std::string& message) { Log(LogLevel::kInfo, message); }
inline void LogWarning(const std::string& message) { Log(LogLevel::kWarning, message); }
inline void LogError(const std::string& message) { Log(LogLevel::kError, message); }

// The line LogEvent writes, with its line feed. `time` as in Timestamp.
std::string FormatLogLine(LogFormat format, LogLevel level, const std::string& time, const std::string& event,
                          const LogFields& fields);

// Now, as "2026-01-31T12:00:00.123Z".
std::string Timestamp();

// `text` as a JSON string with its quotes: ASCII control characters escaped, each invalid UTF-8 byte as U+FFFD.
std::string JsonQuote(const std::string& text);

}  // namespace minitron::base
