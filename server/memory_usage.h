// Memory that the kernel cannot take back, against the limit of the control group. Mapped model files are not in it.
#pragma once

#include <string>

namespace minitron::server {

// Anonymous and shared memory over the limit, 0 to 1; 0 when there is no limit or it cannot be read. Knows version 2
// and version 1 of control groups. `root` is where they are mounted.
double ReadMemoryUsage(const std::string& root = "/sys/fs/cgroup");

}  // namespace minitron::server
