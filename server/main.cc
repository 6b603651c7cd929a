// minitron-server: the composition root. Reads top to bottom in start-up order; ends in reverse.

#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/log.h"
#include "engine/model_config.h"
#include "engine/model_runner.h"
#include "scheduler/engine_core.h"
#include "server/grpc_server.h"
#include "server/lifecycle.h"
#include "server/metrics.h"
#include "server/output_processor.h"
#include "server/server_options.h"
#include "server/tokenizer.h"

namespace minitron::server {
namespace {

using scheduler::Clock;
using scheduler::Duration;

// Also in README.md. 128 + signal number: a second signal.
enum ExitCode { kExitOk = 0, kExitUsage = 2, kExitModel = 3, kExitPort = 4, kExitEngine = 5 };

int Fail(ExitCode code, const absl::Status& status) {
  std::fprintf(stderr, "minitron-server: %s\n", std::string(status.message()).c_str());
  return code;
}

Duration ToDuration(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

double SecondsSince(scheduler::TimePoint start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

engine::EngineOptions MakeEngineOptions(const ServerOptions& options) {
  engine::EngineOptions result;
  result.model_dir = options.model;
  result.backend = options.backend_kind();
  result.num_threads = options.threads;
  result.block_size = options.block_size;
  result.kv_cache_bytes = static_cast<int64_t>(options.kv_cache_mib) << 20;
  result.max_num_sequences = options.max_num_sequences;
  result.max_num_tokens = options.max_step_tokens;
  result.max_context_tokens = options.max_context_tokens;
  result.show_progress = true;
  return result;
}

scheduler::EngineCoreOptions MakeCoreOptions(const ServerOptions& options) {
  scheduler::EngineCoreOptions result;
  result.scheduler.max_prefill_chunk = options.max_prefill_chunk;
  result.max_queued_requests = options.max_queued_requests;
  return result;
}

std::string ModelName(const ServerOptions& options) {
  if (!options.served_model_name.empty()) return options.served_model_name;
  std::filesystem::path path(options.model);
  if (path.filename().empty()) path = path.parent_path();  // a trailing slash
  return path.filename().string();
}

void LogModel(const ServedModel& model, const engine::ModelRunner& runner, double seconds) {
  const engine::ModelInfo& info = model.info;
  base::LogInfo(absl::StrFormat(
      "model name=%s architecture=%s backend=%s dtype=%s parameters=%d weights_mib=%.1f "
      "vocab=%d context=%d load_s=%.2f",
      model.name, info.architecture, info.backend, info.weight_type, info.num_parameters,
      static_cast<double>(info.weight_bytes) / (1 << 20), info.vocab_size, info.max_context_tokens, seconds));
  const int64_t tokens = static_cast<int64_t>(runner.num_kv_blocks()) * runner.block_size();
  base::LogInfo(absl::StrFormat("kv_cache blocks=%d block_size=%d tokens=%d mib=%.1f full_contexts=%.1f",
                                runner.num_kv_blocks(), runner.block_size(), tokens,
                                static_cast<double>(tokens * info.kv_bytes_per_token) / (1 << 20),
                                static_cast<double>(tokens) / info.max_context_tokens));
}

// Other processes see the file complete or not at all.
absl::Status WritePortFile(const std::string& path, int grpc_port, int metrics_port) {
  if (path.empty()) return absl::OkStatus();
  const std::string temporary = absl::StrCat(path, ".", getpid());
  std::FILE* file = std::fopen(temporary.c_str(), "w");
  bool ok = file != nullptr && std::fprintf(file, "grpc=%d\nmetrics=%d\n", grpc_port, metrics_port) > 0;
  if (file != nullptr) ok = std::fclose(file) == 0 && ok;
  ok = ok && std::rename(temporary.c_str(), path.c_str()) == 0;
  return ok ? absl::OkStatus() : absl::InvalidArgumentError(absl::StrCat("--port-file=", path, ": cannot be written"));
}

// Not ready, then refuse, then let the running ones finish; what is left after the timeout is cancelled.
void Drain(const ServerOptions& options, Lifecycle& lifecycle, scheduler::EngineCore& core, ServerContext& context,
           GrpcServer& grpc_server) {
  const auto start = Clock::now();
  grpc_server.SetReady(false);
  context.metrics->SetReady(false);
  lifecycle.Delay(std::chrono::duration<double>(options.drain_delay_s));
  context.draining.store(true);
  core.BeginDrain();
  const bool idle = core.WaitIdle(Clock::now() + ToDuration(options.drain_timeout_s));
  // The engine is done; the last messages may still be on their way to clients that read.
  grpc_server.Shutdown(std::chrono::milliseconds(idle && !lifecycle.engine_failed() ? 5000 : 100));
  base::LogInfo(absl::StrFormat("drained complete=%s seconds=%.2f", idle ? "true" : "false", SecondsSince(start)));
}

int Run(const ServerOptions& options) {
  const auto start = Clock::now();
  Lifecycle lifecycle;
  if (const absl::Status status = CheckPortIsFree(options.host, options.port); !status.ok()) {
    return Fail(kExitPort, status);
  }
  auto metrics_server = MetricsServer::Start(options.host, options.metrics_port);
  if (!metrics_server.ok()) return Fail(kExitPort, metrics_server.status());

  // The model.
  auto runner = engine::CreateModelRunner(MakeEngineOptions(options));
  if (!runner.ok()) return Fail(kExitModel, runner.status());
  const engine::ModelInfo& info = (*runner)->model_info();
  auto tokenizer = Tokenizer::Load(options.model, info.vocab_size);
  if (!tokenizer.ok()) return Fail(kExitModel, tokenizer.status());
  auto defaults = engine::LoadGenerationDefaults(options.model);
  if (!defaults.ok()) return Fail(kExitModel, defaults.status());

  // What calls share.
  ServerContext context;
  context.model = {
      ModelName(options), info, *defaults, options.add_bos, options.default_max_tokens, options.max_queued_requests,
      tokenizer->get()};
  context.limits = {(*runner)->block_size(), (*runner)->num_kv_blocks(), (*runner)->max_num_sequences(),
                    (*runner)->max_num_tokens(), options.max_queued_requests};
  context.max_request_timeout = ToDuration(options.max_request_timeout_s);
  LogModel(context.model, **runner, SecondsSince(start));
  Metrics metrics({context.model.name, info, (*runner)->num_kv_blocks(), (*runner)->block_size()});
  metrics.SetModelLoadSeconds(SecondsSince(start));
  (*metrics_server)->Publish(metrics);

  // The two threads: the engine, and the output behind it.
  OutputProcessorOptions output_options;
  output_options.write_stall_timeout = ToDuration(options.write_stall_timeout_s);
  OutputProcessor output(output_options, tokenizer->get(), &metrics, Clock::now);
  scheduler::EngineCore core(MakeCoreOptions(options), runner->get(), &output, Clock::now);
  output.SetAbort(
      [&core](scheduler::RequestId id, int index) { index < 0 ? core.Abort(id) : core.AbortSequence(id, index); });
  context.metrics = &metrics;
  context.output = &output;
  context.submit = [&core](scheduler::Request request) { return core.Submit(std::move(request)); };
  context.abort = [&core](scheduler::RequestId id) { core.Abort(id); };
  context.queue_depth = [&core] { return core.queue_depth(); };
  context.now = Clock::now;
  context.begin_drain = [&lifecycle] { lifecycle.RequestDrain(); };
  context.ready_since = Clock::now();

  // The listener.
  GrpcServerOptions grpc_options;
  grpc_options.host = options.host;
  grpc_options.port = options.port;
  grpc_options.max_receive_bytes = options.max_receive_mib << 20;
  grpc_options.reflection = options.reflection;
  auto grpc_server = GrpcServer::Start(grpc_options, &context);
  if (!grpc_server.ok()) return Fail(kExitPort, grpc_server.status());
  output.SetOnEngineFailure([&] {
    (*grpc_server)->SetReady(false);
    (*grpc_server)->SetAlive(false);
    metrics.SetReady(false);
    lifecycle.ReportEngineFailure();
  });
  output.Start();
  core.Start();
  (*grpc_server)->SetReady(true);
  metrics.SetReady(true);
  if (const absl::Status status = WritePortFile(options.port_file, (*grpc_server)->port(), (*metrics_server)->port());
      !status.ok()) {
    lifecycle.RequestDrain();
    Fail(kExitUsage, status);
  }
  base::LogInfo(absl::StrFormat("ready grpc=%s:%d metrics=%s:%d in %.2f s", options.host, (*grpc_server)->port(),
                                options.host, (*metrics_server)->port(), SecondsSince(start)));

  lifecycle.WaitForEnd();
  Drain(options, lifecycle, core, context, **grpc_server);
  core.Stop();
  output.Stop();
  return lifecycle.engine_failed() ? kExitEngine : kExitOk;
}

int Main(int argc, char** argv) {
  BlockSignals();
  absl::StatusOr<ServerOptions> options = ParseServerOptions(std::vector<std::string>(argv + 1, argv + argc));
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
  return Run(*options);
}

}  // namespace
}  // namespace minitron::server

int main(int argc, char** argv) { return minitron::server::Main(argc, argv); }
