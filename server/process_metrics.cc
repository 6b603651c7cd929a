#include "server/process_metrics.h"

#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

namespace minitron::server {
namespace {

prometheus::MetricFamily Family(const char* name, const char* help, prometheus::MetricType type, double value) {
  prometheus::MetricFamily family{name, help, type, {}};
  prometheus::ClientMetric metric;
  if (type == prometheus::MetricType::Counter) {
    metric.counter.value = value;
  } else {
    metric.gauge.value = value;
  }
  family.metric.push_back(metric);
  return family;
}

// Fields of /proc/self/stat after the command name, which may hold spaces; [0] is field 3 of proc(5), the state.
std::vector<std::string> StatFields() {
  std::ifstream file("/proc/self/stat");
  std::string text;
  std::getline(file, text);
  const size_t end_of_name = text.rfind(')');
  if (end_of_name == std::string::npos) return {};
  std::istringstream rest(text.substr(end_of_name + 1));
  std::vector<std::string> fields;
  for (std::string field; rest >> field;) fields.push_back(field);
  return fields;
}

double BootTimeSeconds() {
  std::ifstream file("/proc/stat");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("btime ", 0) == 0) return std::strtod(line.c_str() + 6, nullptr);
  }
  return 0;
}

int CountOpenFds() {
  DIR* directory = opendir("/proc/self/fd");
  if (directory == nullptr) return 0;
  int count = 0;
  while (const dirent* entry = readdir(directory)) count += entry->d_name[0] != '.';
  closedir(directory);
  return count - 1;  // without the one that is reading
}

double MaxFds() {
  rlimit limit{};
  return getrlimit(RLIMIT_NOFILE, &limit) == 0 ? static_cast<double>(limit.rlim_cur) : 0;
}

}  // namespace

std::vector<prometheus::MetricFamily> ProcessMetrics::Collect() const {
  constexpr auto kCounter = prometheus::MetricType::Counter;
  constexpr auto kGauge = prometheus::MetricType::Gauge;
  const std::vector<std::string> stat = StatFields();
  // Numbers of proc(5) minus 3: utime 14, stime 15, num_threads 20, starttime 22, vsize 23, rss 24.
  const auto field = [&](size_t number) {
    return number - 3 < stat.size() ? std::strtod(stat[number - 3].c_str(), nullptr) : 0.0;
  };
  const double ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
  const double page = static_cast<double>(sysconf(_SC_PAGESIZE));
  return {
      Family("process_cpu_seconds_total", "User and system CPU time.", kCounter, (field(14) + field(15)) / ticks),
      Family("process_resident_memory_bytes", "Resident memory.", kGauge, field(24) * page),
      Family("process_virtual_memory_bytes", "Virtual memory.", kGauge, field(23)),
      Family("process_open_fds", "Open file descriptors.", kGauge, CountOpenFds()),
      Family("process_max_fds", "Limit of open file descriptors.", kGauge, MaxFds()),
      Family("process_start_time_seconds", "Start of the process, Unix time.", kGauge,
             BootTimeSeconds() + field(22) / ticks),
      Family("process_threads", "Threads.", kGauge, field(20)),
  };
}

}  // namespace minitron::server
