#include "server/stop_checker.h"

#include <algorithm>
#include <utility>

#include "engine/base/check.h"

namespace minitron::server {

StopChecker::StopChecker(std::vector<std::string> stop_strings, bool include_stop) : include_stop_(include_stop) {
  for (std::string& text : stop_strings) {
    CHECK(!text.empty());
    std::vector<uint32_t> border(text.size(), 0);
    uint32_t length = 0;
    for (size_t i = 1; i < text.size(); ++i) {
      while (length > 0 && text[i] != text[length]) length = border[length - 1];
      if (text[i] == text[length]) ++length;
      border[i] = length;
    }
    stops_.push_back({std::move(text), std::move(border)});
  }
}

bool StopChecker::Step(Stop& stop, char byte) {
  uint32_t& matched = stop.matched;
  while (matched > 0 && stop.text[matched] != byte) matched = stop.border[matched - 1];
  if (stop.text[matched] == byte) ++matched;
  if (matched < stop.text.size()) return false;
  matched = stop.border[matched - 1];  // goes on only when the match is ignored
  return true;
}

StopChecker::Result StopChecker::Append(const std::string& text, bool enabled) {
  Result result;
  result.text = std::move(held_);
  held_.clear();
  for (const char byte : text) {
    result.text.push_back(byte);
    const Stop* longest = nullptr;
    for (Stop& stop : stops_) {
      if (!Step(stop, byte) || !enabled) continue;
      if (longest == nullptr || stop.text.size() > longest->text.size()) longest = &stop;
    }
    if (longest == nullptr) continue;
    // The whole match is still here: it was held back up to this byte.
    CHECK(result.text.size() >= longest->text.size());
    if (!include_stop_) result.text.resize(result.text.size() - longest->text.size());
    result.stop = longest->text;
    return result;
  }
  size_t num_held = 0;
  for (const Stop& stop : stops_) num_held = std::max<size_t>(num_held, stop.matched);
  held_ = result.text.substr(result.text.size() - num_held);
  result.text.resize(result.text.size() - num_held);
  return result;
}

std::string StopChecker::Finish() { return std::exchange(held_, {}); }

}  // namespace minitron::server
