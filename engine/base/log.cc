#include "engine/base/log.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <ctime>

namespace minitron::base {
namespace {

constexpr size_t kMaxLineBytes = 4096;
constexpr int64_t kMaxLinesPerSecond = 500;

std::atomic<LogFormat> log_format{LogFormat::kText};
std::atomic<int64_t> window_second{0};  // the second that lines_in_window counts
std::atomic<int64_t> lines_in_window{0};
std::atomic<int64_t> lines_dropped{0};

const char* LevelName(LogFormat format, LogLevel level) {
  const bool json = format == LogFormat::kJson;
  switch (level) {
    case LogLevel::kInfo:
      return json ? "info" : "I";
    case LogLevel::kWarning:
      return json ? "warning" : "W";
    case LogLevel::kError:
      return json ? "error" : "E";
  }
  return "?";
}

void AppendEscaped(const std::string& text, std::string& line) {
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte != 0x7F) {
      line.push_back(c);
      continue;
    }
    char escaped[8];
    std::snprintf(escaped, sizeof(escaped), "\\x%02x", byte);
    line += escaped;
  }
}

// Bytes of the valid UTF-8 character at `text[i]`; 0 when there is none.
size_t CharacterBytes(const std::string& text, size_t i) {
  const auto byte = [&](size_t k) { return static_cast<unsigned char>(text[k]); };
  const unsigned char first = byte(i);
  if (first < 0x80) return 1;
  const size_t length = first >= 0xF0 && first <= 0xF4 ? 4 : first >= 0xE0 ? 3 : first >= 0xC2 ? 2 : 0;
  if (length == 0 || first > 0xF4 || i + length > text.size()) return 0;
  for (size_t k = 1; k < length; ++k) {
    if ((byte(i + k) & 0xC0) != 0x80) return 0;
  }
  const unsigned char second = byte(i + 1);
  // Overlong forms, surrogates and what lies beyond U+10FFFF.
  if ((first == 0xE0 && second < 0xA0) || (first == 0xED && second > 0x9F)) return 0;
  if ((first == 0xF0 && second < 0x90) || (first == 0xF4 && second > 0x8F)) return 0;
  return length;
}

void WriteLine(const std::string& line) {
  // A failed write to stderr has nowhere to be reported.
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line.data(), line.size());
}

// Whether a line may be written now. Races between threads cost a few lines more or less than the limit.
bool TakeLine(LogLevel level) {
  const int64_t second =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
  if (window_second.exchange(second) != second) lines_in_window.store(0);
  if (lines_in_window.fetch_add(1) < kMaxLinesPerSecond || level == LogLevel::kError) return true;
  lines_dropped.fetch_add(1);
  return false;
}

}  // namespace

void SetLogFormat(LogFormat format) { log_format.store(format); }

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

std::string JsonQuote(const std::string& text) {
  std::string quoted = "\"";
  for (size_t i = 0; i < text.size();) {
    const size_t length = CharacterBytes(text, i);
    const auto byte = static_cast<unsigned char>(text[i]);
    if (length == 0) {
      quoted += "\\ufffd";
    } else if (byte == '"' || byte == '\\') {
      quoted += {'\\', text[i]};
    } else if (byte < 0x20 || byte == 0x7F) {
      char escaped[8];
      std::snprintf(escaped, sizeof(escaped), "\\u%04x", byte);
      quoted += escaped;
    } else {
      quoted.append(text, i, length);
    }
    i += length == 0 ? 1 : length;
  }
  quoted += '"';
  return quoted;
}

std::string FormatLogLine(LogFormat format, LogLevel level, const std::string& time, const std::string& event,
                          const LogFields& fields) {
  std::string line;
  if (format == LogFormat::kText) {
    line = std::string(LevelName(format, level)) + " " + time + " ";
    AppendEscaped(event, line);
    for (const auto& [key, value] : fields) {
      line += " ";
      AppendEscaped(key, line);
      line += "=";
      AppendEscaped(value, line);
    }
    if (line.size() > kMaxLineBytes) line.resize(kMaxLineBytes);
    return line + "\n";
  }
  line = R"({"time":)" + JsonQuote(time) + R"(,"level":")" + LevelName(format, level) + R"(","event":)" +
         JsonQuote(event.substr(0, kMaxLineBytes / 2));
  for (const auto& [key, value] : fields) {
    const std::string field = "," + JsonQuote(key) + ":" + JsonQuote(value);
    // A cut line would not be JSON any more: leave whole fields out, and say so.
    if (line.size() + field.size() > kMaxLineBytes) {
      line += R"(,"cut":"true")";
      break;
    }
    line += field;
  }
  return line + "}\n";
}

void LogEvent(LogLevel level, const std::string& event, const LogFields& fields) {
  if (!TakeLine(level)) return;
  const LogFormat format = log_format.load();
  const std::string time = Timestamp();
  if (const int64_t dropped = lines_dropped.exchange(0); dropped > 0) {
    WriteLine(
        FormatLogLine(format, LogLevel::kWarning, time, "log lines dropped", {{"count", std::to_string(dropped)}}));
  }
  WriteLine(FormatLogLine(format, level, time, event, fields));
}

void Log(LogLevel level, const std::string& message) { LogEvent(level, message); }

}  // namespace minitron::base
