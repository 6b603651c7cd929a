#include "server/memory_usage.h"

#include <fstream>
#include <initializer_list>

namespace minitron::server {
namespace {

// The first word of a file as a number; 0 when there is none ("max").
double ReadNumber(const std::string& path) {
  std::ifstream file(path);
  double value = 0;
  return file >> value ? value : 0;
}

// The sum of the named counters of a memory.stat file.
double SumOf(const std::string& path, std::initializer_list<const char*> names) {
  std::ifstream file(path);
  std::string name;
  double value = 0;
  double sum = 0;
  while (file >> name >> value) {
    for (const char* wanted : names) sum += name == wanted ? value : 0;
  }
  return sum;
}

// Version 1 says "no limit" with a number near 2^63.
constexpr double kNoLimit = 1e18;

double Ratio(double used, double limit) { return limit > 0 && limit < kNoLimit ? used / limit : 0; }

}  // namespace

double ReadMemoryUsage(const std::string& root) {
  if (const double limit = ReadNumber(root + "/memory.max"); limit > 0) {
    return Ratio(SumOf(root + "/memory.stat", {"anon", "shmem"}), limit);
  }
  return Ratio(SumOf(root + "/memory/memory.stat", {"total_rss", "total_shmem"}),
               ReadNumber(root + "/memory/memory.limit_in_bytes"));
}

}  // namespace minitron::server
