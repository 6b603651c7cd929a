// The real minitron-server as a child process, with the model that ships in the tree, on free ports.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

namespace minitron::integration {

class ServerProcess {
 public:
  // Starts the binary with free ports, the shipped model and `extra` flags.
  explicit ServerProcess(const std::vector<std::string>& extra);
  ~ServerProcess();  // kills it if it still runs

  // Waits for the port file. False when the process ended first.
  bool WaitUntilReady();
  void Signal(int number);
  // Waits for the end. The exit code, or -number when a signal killed it.
  int Wait();
  std::string StandardError() const;  // after Wait

  int grpc_port = 0;
  int metrics_port = 0;

 private:
  std::string port_file_;
  std::string error_file_;
  pid_t pid_ = -1;
  int exit_code_ = 0;
};

}  // namespace minitron::integration
