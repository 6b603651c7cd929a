#include "tests/integration/server_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "engine/base/check.h"

namespace minitron::integration {

ServerProcess::ServerProcess(const std::vector<std::string>& extra) {
  char folder[] = "/tmp/minitron_test_XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  port_file_ = std::string(folder) + "/ports";
  error_file_ = std::string(folder) + "/stderr";
  std::vector<std::string> arguments = {MINITRON_SERVER_BINARY, "--host=127.0.0.1", "--port=0",
                                        "--metrics-port=0",     "--threads=1",      "--port-file=" + port_file_};
  arguments.insert(arguments.end(), extra.begin(), extra.end());
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  pid_ = fork();
  CHECK(pid_ >= 0);
  if (pid_ == 0) {
    const int fd = open(error_file_.c_str(), O_CREAT | O_WRONLY, 0600);
    dup2(fd, STDERR_FILENO);
    execv(argv[0], argv.data());
    _exit(127);
  }
}

ServerProcess::~ServerProcess() {
  if (pid_ > 0) {
    Signal(SIGKILL);
    Wait();
  }
}

bool ServerProcess::WaitUntilReady() {
  while (true) {
    std::ifstream file(port_file_);
    std::string line;
    while (std::getline(file, line)) {
      if (line.rfind("grpc=", 0) == 0) grpc_port = std::atoi(line.c_str() + 5);
      if (line.rfind("metrics=", 0) == 0) metrics_port = std::atoi(line.c_str() + 8);
    }
    if (grpc_port > 0 && metrics_port > 0) return true;
    siginfo_t info{};
    if (waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid != 0)
      return false;
    poll(nullptr, 0, 5);
  }
}

void ServerProcess::Signal(int number) { kill(pid_, number); }

int ServerProcess::Wait() {
  if (pid_ <= 0) return exit_code_;
  int status = 0;
  waitpid(pid_, &status, 0);
  pid_ = -1;
  exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  return exit_code_;
}

std::string ServerProcess::StandardError() const {
  std::ostringstream text;
  text << std::ifstream(error_file_).rdbuf();
  return text.str();
}

}  // namespace minitron::integration
