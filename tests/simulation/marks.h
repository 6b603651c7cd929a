// What a run of the simulator reports: rare states it reached, and claims that did not hold.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"

namespace minitron::simulation {

// Rare states; each must occur over many seeds, or the simulator proves nothing about it.
class Marks {
 public:
  Marks();

  // CHECKs that the name is one of the list in marks.cc: a misspelt mark would never be missed.
  void Hit(const std::string& name);

  const std::map<std::string, int64_t>& counts() const { return counts_; }

 private:
  std::map<std::string, int64_t> counts_;
};

// Claims about the scheduler that turned out false. No test framework: the same library serves the tests, the planted
// bugs and the enumeration.
class Violations {
 public:
  // Where the numbers of a claim help to find the cause, they follow it in the report.
  template <typename... Numbers>
  void Expect(bool holds, const char* claim, const Numbers&... numbers) {
    if (holds) return;
    std::string text = claim;
    (absl::StrAppend(&text, " ", numbers), ...);
    list_.push_back(std::move(text));
  }

  bool empty() const { return list_.empty(); }
  const std::vector<std::string>& list() const { return list_; }

 private:
  std::vector<std::string> list_;
};

}  // namespace minitron::simulation
