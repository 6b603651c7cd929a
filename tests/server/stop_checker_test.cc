#include "server/stop_checker.h"

#include <gtest/gtest.h>

#include <random>

namespace minitron::server {
namespace {

struct Outcome {
  std::string text;
  std::optional<std::string> stop;
  bool operator==(const Outcome& other) const { return text == other.text && stop == other.stop; }
};

// The rule of the header, by brute force: the first end (past the disabled bytes), then the longest.
Outcome Naive(const std::vector<std::string>& stops, bool include_stop, const std::string& text, size_t num_disabled) {
  for (size_t end = num_disabled + 1; end <= text.size(); ++end) {
    const std::string* longest = nullptr;
    for (const std::string& stop : stops) {
      if (stop.size() > end || text.compare(end - stop.size(), stop.size(), stop) != 0) continue;
      if (longest == nullptr || stop.size() > longest->size()) longest = &stop;
    }
    if (longest != nullptr) return {text.substr(0, include_stop ? end : end - longest->size()), *longest};
  }
  return {text, std::nullopt};
}

Outcome Stream(StopChecker checker, const std::string& text, size_t num_disabled, std::mt19937& random) {
  Outcome outcome;
  for (size_t at = 0; at < text.size();) {
    size_t length = 1 + random() % 5;
    if (at < num_disabled) length = std::min(length, num_disabled - at);
    StopChecker::Result result = checker.Append(text.substr(at, length), /*enabled=*/at >= num_disabled);
    outcome.text += result.text;
    if (result.stop.has_value()) {
      outcome.stop = result.stop;
      return outcome;
    }
    at += length;
  }
  outcome.text += checker.Finish();
  return outcome;
}

TEST(StopCheckerTest, EveryChunkingGivesTheNaiveResult) {
  std::mt19937 random(11);
  for (int i = 0; i < 30000; ++i) {
    const int letters = 1 + random() % 3;
    const auto word = [&](size_t length) {
      std::string text(length, 'a');
      for (char& c : text) c = static_cast<char>('a' + random() % letters);
      return text;
    };
    std::vector<std::string> stops(random() % 5);
    for (std::string& stop : stops) stop = word(1 + random() % 6);
    const std::string text = word(random() % 30);
    const size_t num_disabled = random() % 3 == 0 ? random() % (text.size() + 1) : 0;
    const bool include_stop = random() % 2 == 0;
    const Outcome want = Naive(stops, include_stop, text, num_disabled);
    for (int chunking = 0; chunking < 3; ++chunking) {
      const Outcome got = Stream(StopChecker(stops, include_stop), text, num_disabled, random);
      ASSERT_TRUE(got == want) << "round " << i << ": \"" << got.text << "\", not \"" << want.text << "\"";
    }
  }
}

TEST(StopCheckerTest, AStopAcrossTokenBordersLeaksNothing) {
  StopChecker checker({"\nUser:"}, false);
  EXPECT_EQ(checker.Append("Hello\n").text, "Hello");
  EXPECT_EQ(checker.Append("Us").text, "");
  const StopChecker::Result result = checker.Append("er: secret");
  EXPECT_EQ(result.text, "");
  EXPECT_EQ(result.stop, "\nUser:");
}

TEST(StopCheckerTest, HeldTextIsReleasedWhenItCannotMatchAnyMore) {
  StopChecker checker({"abcabd"}, false);
  EXPECT_EQ(checker.Append("abcab").text, "");
  EXPECT_EQ(checker.Append("c").text, "abc") << "abc is still a prefix";
  EXPECT_EQ(checker.Append("x").text, "abcx");
  EXPECT_EQ(checker.Append("ab").text, "");
  EXPECT_EQ(checker.Finish(), "ab");
}

TEST(StopCheckerTest, TheMatchThatEndsFirstWins) {
  EXPECT_EQ(StopChecker({"abcd", "bc"}, false).Append("abcd").text, "a");
  EXPECT_EQ(StopChecker({"ab", "abcd"}, false).Append("xabcd").text, "x") << "a stop that is a prefix of another";
  const StopChecker::Result longest = StopChecker({"c", "bc", "abc"}, false).Append("xabc");
  EXPECT_EQ(longest.text, "x");
  EXPECT_EQ(longest.stop, "abc");
}

TEST(StopCheckerTest, IncludedStopEndsTheText) {
  const StopChecker::Result result = StopChecker({"."}, true).Append("One. Two.");
  EXPECT_EQ(result.text, "One.");
  EXPECT_EQ(result.stop, ".");
}

TEST(StopCheckerTest, MatchesBeforeMinTokensAreIgnored) {
  StopChecker checker({"aa"}, false);
  EXPECT_FALSE(checker.Append("aaa", /*enabled=*/false).stop.has_value());
  const StopChecker::Result result = checker.Append("a");
  EXPECT_EQ(result.stop, "aa") << "it ends in enabled text";
  EXPECT_EQ(result.text, "") << "aa of aaa was sent, the held a belongs to the match";
}

TEST(StopCheckerTest, MultiByteTextIsNeverCut) {
  StopChecker checker({"é!"}, false);
  EXPECT_EQ(checker.Append("caf").text, "caf");
  EXPECT_EQ(checker.Append("é").text, "");
  EXPECT_EQ(checker.Append("è").text, "éè") << "é and è share their first byte; only whole characters come out";
}

TEST(StopCheckerTest, NoStopsPassesEverythingThrough) {
  StopChecker checker({}, false);
  EXPECT_EQ(checker.Append("text").text, "text");
  EXPECT_EQ(checker.Finish(), "");
}

TEST(StopCheckerTest, WorstCaseStopsStayLinear) {
  // 16 stops of 256 bytes against text made to fail at their last byte: 4096 comparisons per byte if done naively.
  std::vector<std::string> stops;
  for (int i = 0; i < 16; ++i) stops.push_back(std::string(255, 'a') + static_cast<char>('b' + i));
  StopChecker checker(stops, false);
  size_t num_sent = 0;
  for (int i = 0; i < 1000; ++i) num_sent += checker.Append(std::string(1000, 'a')).text.size();
  EXPECT_EQ(num_sent, 1'000'000u - 255);
  EXPECT_EQ(checker.Finish().size(), 255u);
}

}  // namespace
}  // namespace minitron::server
