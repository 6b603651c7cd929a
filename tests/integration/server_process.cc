#include "tests/integration/server_process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "engine/base/check.h"

namespace minitron::integration {

ServerProcess::ServerProcess(const std::vector<std::string>& extra, const std::string& binary) {
  std::string folder = (std::filesystem::temp_directory_path() / "minitron_test_XXXXXX").string();
  CHECK(mkdtemp(folder.data()) != nullptr);
  folder_ = folder;
  std::vector<std::string> arguments = {
      binary, "--host=127.0.0.1", "--port=0", "--metrics-port=0", "--threads=1", "--port-file=" + folder_ + "/ports"};
  arguments.insert(arguments.end(), extra.begin(), extra.end());
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  int ends[2];
  CHECK(pipe2(ends, O_CLOEXEC) == 0);
  pid_ = fork();
  CHECK(pid_ >= 0);
  if (pid_ == 0) {
    dup2(ends[1], STDERR_FILENO);
    execv(argv[0], argv.data());
    _exit(127);
  }
  close(ends[1]);
  error_fd_ = ends[0];
}

ServerProcess::~ServerProcess() {
  if (pid_ > 0) {
    Signal(SIGKILL);
    Wait();
  }
  close(error_fd_);
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

bool ServerProcess::ReadMore() {
  char buffer[4096];
  ssize_t count = 0;
  do {
    count = read(error_fd_, buffer, sizeof(buffer));
  } while (count < 0 && errno == EINTR);
  if (count <= 0) return false;
  standard_error_.append(buffer, static_cast<size_t>(count));
  return true;
}

bool ServerProcess::WaitForLog(const std::string& text) {
  while (standard_error_.find(text) == std::string::npos) {
    if (!ReadMore()) return false;
  }
  return true;
}

bool ServerProcess::WaitUntilReady() {
  if (!WaitForLog("ready grpc=")) return false;
  std::ifstream file(folder_ + "/ports");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind("grpc=", 0) == 0) grpc_port = std::atoi(line.c_str() + 5);
    if (line.rfind("metrics=", 0) == 0) metrics_port = std::atoi(line.c_str() + 8);
  }
  return grpc_port > 0 && metrics_port > 0;
}

void ServerProcess::Signal(int number) { kill(pid_, number); }

int ServerProcess::Wait() {
  if (pid_ <= 0) return exit_code_;
  while (ReadMore()) {  // to the end, or a full pipe would hold the child up
  }
  int status = 0;
  CHECK(waitpid(pid_, &status, 0) == pid_);
  pid_ = -1;
  exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  return exit_code_;
}

}  // namespace minitron::integration
