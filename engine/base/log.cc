#include "engine/base/log.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <ctime>

namespace minitron::base {
namespace {

constexpr size_t kMaxMessageBytes = 4096;

// "2026-01-31T12:00:00.123Z"
std::string Timestamp() {
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  const auto millis = std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count() % 1000;
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  char text[32];
  const size_t length = std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", &utc);
  std::snprintf(text + length, sizeof(text) - length, ".%03dZ", static_cast<int>(millis));
  return text;
}

char LevelLetter(LogLevel level) {
  switch (level) {
    case LogLevel::kInfo:
      return 'I';
    case LogLevel::kWarning:
      return 'W';
    case LogLevel::kError:
      return 'E';
  }
  return '?';
}

void AppendEscaped(char c, std::string& line) {
  const auto byte = static_cast<unsigned char>(c);
  if (byte >= 0x20 && byte != 0x7F) {
    line.push_back(c);
    return;
  }
  char escaped[8];
  std::snprintf(escaped, sizeof(escaped), "\\x%02x", byte);
  line += escaped;
}

}  // namespace

void Log(LogLevel level, const std::string& message) {
  std::string line(1, LevelLetter(level));
  line += ' ';
  line += Timestamp();
  line += ' ';
  for (size_t i = 0; i < message.size() && i < kMaxMessageBytes; ++i) AppendEscaped(message[i], line);
  line += '\n';
  // A failed write to stderr has nowhere to be reported.
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line.data(), line.size());
}

}  // namespace minitron::base
