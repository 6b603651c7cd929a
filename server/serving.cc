#include "server/serving.h"

#include "absl/strings/str_format.h"
#include "engine/base/log.h"
#include "engine/base/status_macros.h"

namespace minitron::server {
namespace {

using scheduler::Clock;
using scheduler::Duration;

// How long the last messages may be on their way to clients that read, and how long calls that will be cancelled or
// were failed get to take their status.
constexpr std::chrono::milliseconds kDrainedGrace{5000};
constexpr std::chrono::milliseconds kFailedGrace{1000};
constexpr std::chrono::milliseconds kTimedOutGrace{100};

Duration ToDuration(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

OutputProcessorOptions MakeOutputOptions(const ServerOptions& options) {
  OutputProcessorOptions result;
  result.write_stall_timeout = ToDuration(options.write_stall_timeout_s);
  return result;
}

scheduler::EngineCoreOptions MakeCoreOptions(const ServerOptions& options) {
  scheduler::EngineCoreOptions result;
  result.scheduler.max_prefill_chunk = options.max_prefill_chunk;
  result.max_queued_requests = options.max_queued_requests;
  return result;
}

ServedModel MakeServedModel(const ServerOptions& options, const LoadedModel& model) {
  return {model.name,      model.runner->model_info(), model.defaults,
          options.add_bos, options.default_max_tokens, options.max_queued_requests,
          model.tokenizer};
}

EngineLimits MakeLimits(const ServerOptions& options, const engine::ModelRunner& runner) {
  return {runner.block_size(), runner.num_kv_blocks(), runner.max_num_sequences(), runner.max_num_tokens(),
          options.max_queued_requests};
}

GrpcServerOptions MakeGrpcOptions(const ServerOptions& options) {
  GrpcServerOptions result;
  result.host = options.host;
  result.port = options.port;
  result.max_receive_bytes = options.max_receive_mib << 20;
  result.reflection = options.reflection;
  return result;
}

}  // namespace

Serving::Serving(const ServerOptions& options, const LoadedModel& model, Lifecycle* lifecycle)
    : options_(options),
      lifecycle_(lifecycle),
      metrics_({model.name, model.runner->model_info(), model.runner->num_kv_blocks(), model.runner->block_size()}),
      output_(MakeOutputOptions(options), model.tokenizer, &metrics_, Clock::now),
      core_(MakeCoreOptions(options), model.runner, &output_, Clock::now) {
  context_.model = MakeServedModel(options, model);
  context_.limits = MakeLimits(options, *model.runner);
  context_.max_request_timeout = ToDuration(options.max_request_timeout_s);
  Connect();
}

// The engine, the output thread and the calls, introduced to each other.
void Serving::Connect() {
  output_.SetAbort(
      [this](scheduler::RequestId id, int index) { index < 0 ? core_.Abort(id) : core_.AbortSequence(id, index); });
  output_.SetOnEngineFailure([this] { OnEngineFailure(); });
  context_.metrics = &metrics_;
  context_.output = &output_;
  context_.submit = [this](scheduler::Request request) { return core_.Submit(std::move(request)); };
  context_.abort = [this](scheduler::RequestId id) { core_.Abort(id); };
  context_.queue_depth = [this] { return core_.queue_depth(); };
  context_.now = Clock::now;
  context_.begin_drain = [this] { lifecycle_->RequestDrain(); };
  context_.ready_since = Clock::now();
}

absl::StatusOr<std::unique_ptr<Serving>> Serving::Start(const ServerOptions& options, const LoadedModel& model,
                                                        Lifecycle* lifecycle) {
  std::unique_ptr<Serving> serving(new Serving(options, model, lifecycle));
  ASSIGN_OR_RETURN(serving->grpc_server_, GrpcServer::Start(MakeGrpcOptions(options), &serving->context_));
  serving->output_.Start();
  serving->core_.Start();
  serving->grpc_server_->SetReady(true);
  serving->metrics_.SetReady(true);
  return serving;
}

Serving::~Serving() {
  if (grpc_server_ != nullptr) Stop(std::chrono::milliseconds(0));
}

void Serving::OnEngineFailure() {
  grpc_server_->SetReady(false);
  grpc_server_->SetAlive(false);
  metrics_.SetReady(false);
  lifecycle_->ReportEngineFailure();
}

ExitCode Serving::ServeUntilEnd() {
  lifecycle_->WaitForEnd();
  Drain();
  return lifecycle_->engine_failed() ? kExitEngine : kExitOk;
}

void Serving::Drain() {
  const auto start = Clock::now();
  grpc_server_->SetReady(false);
  metrics_.SetReady(false);
  lifecycle_->Delay(std::chrono::duration<double>(options_.drain_delay_s));
  context_.draining.store(true);
  core_.BeginDrain();
  const bool idle = core_.WaitIdle(Clock::now() + ToDuration(options_.drain_timeout_s));
  Stop(!idle ? kTimedOutGrace : lifecycle_->engine_failed() ? kFailedGrace : kDrainedGrace);
  base::LogInfo(absl::StrFormat("drained complete=%s seconds=%.2f", idle ? "true" : "false",
                                std::chrono::duration<double>(Clock::now() - start).count()));
}

// The listener first: calls use the threads, and the output thread tells the listener of a failure.
void Serving::Stop(std::chrono::milliseconds grace) {
  grpc_server_->Shutdown(grace);
  core_.Stop();
  output_.Stop();
}

}  // namespace minitron::server
