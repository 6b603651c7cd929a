// The real minitron-server as a child process, with the model that ships in the tree, on free ports.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

namespace minitron::integration {

class ServerProcess {
 public:
  // Starts `binary` with free ports, the shipped model and `extra` flags.
  explicit ServerProcess(const std::vector<std::string>& extra, const std::string& binary = MINITRON_SERVER_BINARY);
  ~ServerProcess();  // kills it if it still runs

  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;

  // Reads the child's log until it says that it is ready, then the port file. False when the process ended first.
  bool WaitUntilReady();
  // Reads the child's log until `text` was in it. False when the process ended first.
  bool WaitForLog(const std::string& text);
  void Signal(int number);
  // Waits for the end. The exit code, or -number when a signal killed it.
  int Wait();
  const std::string& StandardError() const { return standard_error_; }  // what was read so far; all of it after Wait

  int grpc_port = 0;
  int metrics_port = 0;

 private:
  bool ReadMore();  // false at the end

  std::string folder_;
  std::string standard_error_;
  int error_fd_ = -1;
  pid_t pid_ = -1;
  int exit_code_ = 0;
};

}  // namespace minitron::integration
