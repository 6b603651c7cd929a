// minitron-server: the composition root. Reads top to bottom in start-up order; ends in reverse.

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/log.h"
#include "engine/model_config.h"
#include "engine/model_runner.h"
#include "server/grpc_server.h"
#include "server/lifecycle.h"
#include "server/metrics.h"
#include "server/self_test.h"
#include "server/server_options.h"
#include "server/serving.h"
#include "server/tokenizer.h"
#include "server/vllm_metrics.h"

namespace minitron::server {
namespace {

using scheduler::Clock;

int Fail(ExitCode code, const absl::Status& status) {
  std::fprintf(stderr, "minitron-server: %s\n", std::string(status.message()).c_str());
  return code;
}

double SecondsSince(scheduler::TimePoint start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

engine::EngineOptions MakeEngineOptions(const ServerOptions& options) {
  engine::EngineOptions result;
  result.model_dir = options.model;
  result.backend = options.backend_kind();
  result.num_threads = options.threads;
  result.quantization = options.quantization();
  result.cache_dir = options.cache_dir;
  result.kv_cache_type = options.kv_cache_type();
  result.activation_type = options.activation_type();
  result.block_size = options.block_size;
  result.kv_cache_bytes = static_cast<int64_t>(options.kv_cache_mib) << 20;
  result.max_num_sequences = options.max_num_sequences;
  result.max_num_tokens = options.max_step_tokens;
  result.max_context_tokens = options.max_context_tokens;
  result.show_progress = true;
  return result;
}

std::string ModelName(const ServerOptions& options) {
  if (!options.served_model_name.empty()) return options.served_model_name;
  std::filesystem::path path(options.model);
  if (path.filename().empty()) path = path.parent_path();  // a trailing slash
  return path.filename().string();
}

void LogModel(const std::string& name, const engine::ModelRunner& runner, double seconds) {
  const engine::ModelInfo& info = runner.model_info();
  base::LogInfo(absl::StrFormat(
      "model name=%s architecture=%s backend=%s dtype=%s parameters=%d weights_mib=%.1f "
      "vocab=%d context=%d load_s=%.2f",
      name, info.architecture, info.backend, info.weight_type, info.num_parameters,
      static_cast<double>(info.weight_bytes) / (1 << 20), info.vocab_size, info.max_context_tokens, seconds));
  const int64_t tokens = static_cast<int64_t>(runner.num_kv_blocks()) * runner.block_size();
  base::LogInfo(absl::StrFormat("kv_cache blocks=%d block_size=%d tokens=%d mib=%.1f full_contexts=%.1f",
                                runner.num_kv_blocks(), runner.block_size(), tokens,
                                static_cast<double>(tokens * info.kv_bytes_per_token) / (1 << 20),
                                static_cast<double>(tokens) / info.max_context_tokens));
}

absl::Status CannotWrite(const std::string& path) {
  return absl::InvalidArgumentError(absl::StrCat("--port-file=", path, ": cannot be written"));
}

// Where the port file is written before it gets its name.
std::string TemporaryName(const std::string& path) { return absl::StrCat(path, ".", getpid()); }

// Asked before a model is loaded for minutes.
absl::Status CheckPortFile(const std::string& path) {
  if (path.empty()) return absl::OkStatus();
  const std::string temporary = TemporaryName(path);
  std::FILE* file = std::fopen(temporary.c_str(), "w");
  if (file == nullptr || std::fclose(file) != 0 || std::remove(temporary.c_str()) != 0) return CannotWrite(path);
  return std::filesystem::is_directory(path) ? CannotWrite(path) : absl::OkStatus();
}

// Other processes see the file complete or not at all.
absl::Status WritePortFile(const std::string& path, const std::vector<std::pair<std::string, int>>& ports) {
  if (path.empty()) return absl::OkStatus();
  const std::string temporary = TemporaryName(path);
  std::FILE* file = std::fopen(temporary.c_str(), "w");
  bool ok = file != nullptr;
  for (const auto& [name, port] : ports) ok = ok && std::fprintf(file, "%s=%d\n", name.c_str(), port) > 0;
  if (file != nullptr) ok = std::fclose(file) == 0 && ok;
  ok = ok && std::rename(temporary.c_str(), path.c_str()) == 0;
  return ok ? absl::OkStatus() : CannotWrite(path);
}

// What a full step may take, from one of a few tokens: more rows cost at most proportionally more.
scheduler::Duration LongestStep(const SelfTestResult& tested, const ServerOptions& options) {
  return tested.longest_step * options.max_step_tokens / std::max(tested.num_tokens, 1);
}

std::vector<std::string> Environment() {
  std::vector<std::string> variables;
  for (char** variable = environ; *variable != nullptr; ++variable) variables.emplace_back(*variable);
  return variables;
}

// Before a model is loaded for minutes. The metrics port is opened at once.
absl::Status CheckPortsAreFree(const ServerOptions& options) {
  const std::tuple<const char*, std::string, int> ports[] = {{"--port", options.host, options.port},
                                                             {"--health-port", options.host, options.health_port},
                                                             {"--http-port", options.http_host, options.http_port}};
  for (const auto& [flag, host, port] : ports) {
    if (port < 0) continue;  // none
    if (const absl::Status status = CheckPortIsFree(host, port); !status.ok()) {
      return absl::UnavailableError(absl::StrCat(flag, "=", port, ": ", std::string(status.message())));
    }
  }
  return absl::OkStatus();
}

int Run(const ServerOptions& options) {
  const auto start = Clock::now();
  Lifecycle lifecycle;
  if (const absl::Status status = CheckPortFile(options.port_file); !status.ok()) return Fail(kExitUsage, status);
  if (const absl::Status status = CheckPortsAreFree(options); !status.ok()) return Fail(kExitPort, status);
  auto security = OpenSecurity(options);
  if (!security.ok()) return Fail(kExitUsage, security.status());
  auto started = MetricsServer::Start(options.host, options.metrics_port);
  if (!started.ok()) return Fail(kExitPort, started.status());
  // Never deleted: its HTTP library takes up to 2 s to notice that it shall stop. It answers to the end of the process.
  MetricsServer* const metrics_server = started->release();

  // The model. The tokenizer's pin is asked before weights are read for minutes, and again of the bytes that are
  // parsed.
  if (!options.tokenizer_sha256.empty()) {
    auto pinned = ReadTokenizerFile(options.model, options.tokenizer_sha256);
    if (!pinned.ok()) return Fail(kExitModel, pinned.status());
  }
  auto runner = engine::CreateModelRunner(MakeEngineOptions(options));
  if (!runner.ok()) return Fail(kExitModel, runner.status());
  auto tokenizer = Tokenizer::Load(options.model, (*runner)->model_info().vocab_size, options.tokenizer_sha256);
  if (!tokenizer.ok()) return Fail(kExitModel, tokenizer.status());
  auto defaults = engine::LoadGenerationDefaults(options.model);
  if (!defaults.ok()) return Fail(kExitModel, defaults.status());
  LoadedModel model = {ModelName(options), runner->get(), tokenizer->get(), *defaults};
  if (options.self_test) {
    auto tested = RunSelfTest(**runner, Clock::now);
    if (!tested.ok()) return Fail(kExitModel, tested.status());
    model.longest_step = LongestStep(*tested, options);
  }
  base::LogEvent(base::LogLevel::kInfo, "options", DescribeOptions(options));
  LogModel(model.name, **runner, SecondsSince(start));

  // The threads and the listener.
  auto serving = Serving::Start(options, model, &lifecycle, *std::move(security));
  if (!serving.ok()) return Fail(kExitPort, serving.status());
  (*serving)->metrics().SetModelLoadSeconds(SecondsSince(start));
  metrics_server->Publish((*serving)->metrics());
  const auto vllm_metrics = std::make_shared<VllmMetrics>((*serving)->metrics().registry());
  if (options.metrics_compat == "vllm") metrics_server->Publish(vllm_metrics);
  const int metrics_port = metrics_server->port();
  const absl::Status announced = WritePortFile(options.port_file, {{"grpc", (*serving)->port()},
                                                                   {"metrics", metrics_port},
                                                                   {"health", (*serving)->health_port()},
                                                                   {"http", (*serving)->http_port()}});
  if (!announced.ok()) lifecycle.RequestDrain();
  std::string optional_ports;
  if (const int port = (*serving)->health_port(); port > 0) {
    absl::StrAppendFormat(&optional_ports, " health=%s:%d", options.host, port);
  }
  if (const int port = (*serving)->http_port(); port > 0) {
    absl::StrAppendFormat(&optional_ports, " http=%s:%d", options.http_host, port);
  }
  base::LogInfo(absl::StrFormat("ready grpc=%s:%d metrics=%s:%d%s in %.2f s", options.host, (*serving)->port(),
                                options.host, metrics_port, optional_ports, SecondsSince(start)));

  const ExitCode code = (*serving)->ServeUntilEnd();
  return announced.ok() ? code : Fail(kExitUsage, announced);
}

int Main(int argc, char** argv) {
  BlockSignals();
  absl::StatusOr<ServerOptions> options =
      ParseServerOptions(std::vector<std::string>(argv + 1, argv + argc), Environment());
  if (!options.ok()) return Fail(kExitUsage, options.status());
  if (options->show_help) {
    std::fputs(ServerOptionsHelp().c_str(), stdout);
    return kExitOk;
  }
  if (options->show_version) {
    std::printf("minitron-server %s\n", MINITRON_VERSION);
    return kExitOk;
  }
  if (options->model.empty()) options->model = FindDefaultModel("/proc/self/exe");
  if (options->model.empty()) {
    return Fail(kExitModel,
                absl::NotFoundError("no --model given and the one that ships with the server is not there"));
  }
  base::SetLogFormat(options->log_format == "json" ? base::LogFormat::kJson : base::LogFormat::kText);
  RouteLibraryLogs();
  return Run(*options);
}

}  // namespace
}  // namespace minitron::server

int main(int argc, char** argv) { return minitron::server::Main(argc, argv); }
