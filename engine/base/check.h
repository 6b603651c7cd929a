// CHECK and DCHECK: aborts on our own bugs, never on input. Kept in release builds. std only.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace minitron::base {

// Prints the failed condition and aborts.
[[noreturn]] inline void CheckFailed(const char* condition, const char* file, int line) {
  std::fprintf(stderr, "CHECK failed: %s at %s:%d\n", condition, file, line);
  std::abort();
}

}  // namespace minitron::base

#define CHECK(condition) \
  (static_cast<bool>(condition) ? static_cast<void>(0) : ::minitron::base::CheckFailed(#condition, __FILE__, __LINE__))

// Checks that cost time in inner loops: on in debug and sanitizer builds only.
#ifdef NDEBUG
#define DCHECK(condition) static_cast<void>(0)
#else
#define DCHECK(condition) CHECK(condition)
#endif
