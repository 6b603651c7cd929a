// One-line structured logs on stderr: `I 2026-01-31T12:00:00.123Z message key=value`.
// Never log prompts, outputs or token ids. Thread-safe: one write call per line.
#pragma once

#include <string>

namespace minitron::base {

enum class LogLevel { kInfo, kWarning, kError };

// Writes one line; control characters in `message` are escaped, and it is cut at 4 KiB.
void Log(LogLevel level, const std::string& message);

inline void LogInfo(const std::string& message) { Log(LogLevel::kInfo, message); }
inline void LogWarning(const std::string& message) { Log(LogLevel::kWarning, message); }
inline void LogError(const std::string& message) { Log(LogLevel::kError, message); }

}  // namespace minitron::base
