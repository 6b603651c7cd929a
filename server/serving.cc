#include "server/serving.h"

#include <unistd.h>

#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/log.h"
#include "engine/base/status_macros.h"
#include "server/grpc_status.h"
#include "server/memory_usage.h"

namespace minitron::server {
namespace {

using scheduler::Clock;
using scheduler::Duration;

// How long the last messages may be on their way to clients that read, and how long calls that were failed get to take
// their status.
constexpr std::chrono::milliseconds kDrainedGrace{5000};
constexpr std::chrono::milliseconds kFailedGrace{1000};

Duration ToDuration(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

double ToSeconds(Duration duration) { return std::chrono::duration<double>(duration).count(); }

OutputProcessorOptions MakeOutputOptions(const ServerOptions& options) {
  OutputProcessorOptions result;
  result.write_stall_timeout = ToDuration(options.write_stall_timeout_s);
  return result;
}

// The options' words were checked when they were parsed; the last one is the default.
scheduler::PrefixSharing ToSharing(const std::string& word) {
  if (word == "off") return scheduler::PrefixSharing::kRequest;
  return word == "shared" ? scheduler::PrefixSharing::kAll : scheduler::PrefixSharing::kTenant;
}

scheduler::Overlap ToOverlap(const std::string& word) {
  if (word == "off") return scheduler::Overlap::kOff;
  return word == "on" ? scheduler::Overlap::kOn : scheduler::Overlap::kAuto;
}

uint64_t RandomWord() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

scheduler::EngineCoreOptions MakeCoreOptions(const ServerOptions& options) {
  scheduler::EngineCoreOptions result;
  result.scheduler.max_prefill_chunk = options.max_prefill_chunk;
  result.scheduler.prefix_sharing = ToSharing(options.prefix_cache);
  result.scheduler.prefix_hash_key = {RandomWord(), RandomWord()};
  result.scheduler.admission_mode =
      options.admission_mode == "reserve" ? scheduler::AdmissionMode::kReserve : scheduler::AdmissionMode::kOptimistic;
  result.overlap = ToOverlap(options.overlap);
  result.scheduler.itl_target = ToDuration(options.itl_target_ms / 1000);
  result.scheduler.fairness.wait_bound = ToDuration(options.priority_wait_bound_s);
  result.queue.max_sequences = options.max_queued_requests;
  result.queue.max_prompt_tokens = options.max_queued_tokens;
  result.queue.max_bytes = int64_t{options.max_queued_mib} << 20;
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

// How often the watchdog and the reloader look. A revoked token works until the look after its file changed.
constexpr std::chrono::milliseconds kWatchPeriod{250};
// Between health falling and the end of a hung process, for those who probe it and for the log.
constexpr std::chrono::seconds kHangGrace{1};
// Ready again only this far below the mark, so that readiness does not flutter.
constexpr double kMemoryHysteresis = 0.05;

GrpcServerOptions MakeGrpcOptions(const ServerOptions& options, TlsStore* tls) {
  GrpcServerOptions result;
  result.host = options.host;
  result.port = options.port;
  result.max_receive_bytes = options.max_receive_mib << 20;
  result.reflection = options.reflection;
  result.channelz = options.channelz;
  result.tls = tls;
  if (options.health_port >= 0) result.health_port = options.health_port;
  result.handshake_timeout = std::chrono::milliseconds(static_cast<int64_t>(options.handshake_timeout_s * 1000));
  result.listener = {options.max_connections, options.max_connections_per_address};
  result.open_inference = options.open_inference;
  result.vllm_grpc = options.vllm_grpc;
  return result;
}

compat::HttpOptions MakeHttpOptions(const ServerOptions& options) {
  compat::HttpOptions result;
  result.host = options.http_host;
  result.port = options.http_port;
  result.num_threads = options.http_threads;
  result.max_body_bytes = int64_t{options.max_receive_mib} << 20;
  result.timeout_ms = static_cast<int>(options.write_stall_timeout_s * 1000);
  return result;
}

compat::ChatTemplate ChatTemplateOf(const ServerOptions& options) {
  return options.chat_template == "nemotron-mini" ? compat::ChatTemplate::kNemotronMini : compat::ChatTemplate::kNone;
}

}  // namespace

absl::StatusOr<Security> OpenSecurity(const ServerOptions& options) {
  Security security;
  if (!options.auth_file.empty()) {
    ASSIGN_OR_RETURN(security.auth, AuthStore::Open(options.auth_file));
  }
  if (!options.tls_cert.empty()) {
    ASSIGN_OR_RETURN(security.tls, TlsStore::Open({options.tls_cert, options.tls_key, options.tls_client_ca}));
  }
  if (!options.audit_log.empty()) {
    AuditLogOptions audit;
    audit.path = options.audit_log;
    ASSIGN_OR_RETURN(security.audit, AuditLog::Open(audit));
  }
  return security;
}

Serving::Serving(const ServerOptions& options, const LoadedModel& model, Lifecycle* lifecycle, Security security)
    : options_(options),
      lifecycle_(lifecycle),
      metrics_({model.name, model.runner->model_info(), model.runner->num_kv_blocks(), model.runner->block_size()}),
      operator_metrics_(metrics_.registry(), metrics_.labels()),
      security_(std::move(security)),
      constraints_(model.tokenizer, model.runner->model_info().eos_token_ids),
      tenants_([this](const std::string& tenant) { return security_.auth->table()->LimitsOf(tenant); }, Clock::now,
               [this](const std::string& tenant, int64_t num_tokens) {
                 operator_metrics_.CountTenantRequest(tenant, static_cast<double>(num_tokens));
               }),
      output_(MakeOutputOptions(options), model.tokenizer, &metrics_, Clock::now),
      core_(MakeCoreOptions(options), model.runner, &output_, Clock::now),
      readiness_([this](bool ready) {
        grpc_server_->SetReady(ready);
        metrics_.SetReady(ready);
      }),
      on_hang_([] { _exit(kExitHang); }),
      hang_detector_(ToDuration(options.hang_timeout_s), model.longest_step) {
  context_.model = MakeServedModel(options, model);
  context_.model.constraints = &constraints_;
  context_.limits = MakeLimits(options, *model.runner);
  if (options.vllm_grpc) context_.tokenizer_bundle = compat::ReadTokenizerBundle(options.model);
  context_.max_request_timeout = ToDuration(options.max_request_timeout_s);
  Connect();
}

// The engine, the output thread and the calls, introduced to each other.
void Serving::Connect() {
  output_.SetAbort(
      [this](scheduler::RequestId id, int index) { index < 0 ? core_.Abort(id) : core_.AbortSequence(id, index); });
  output_.SetOnEngineFailure([this] { OnEngineFailure(); });
  context_.metrics = &metrics_;
  context_.operator_metrics = &operator_metrics_;
  context_.auth = security_.auth.get();
  context_.tenants = &tenants_;
  context_.audit = security_.audit.get();
  if (security_.audit != nullptr) security_.audit->SetOnDrop([this] { operator_metrics_.CountAuditDrop(); });
  context_.output = &output_;
  context_.submit = [this](scheduler::Request request) { return core_.Submit(std::move(request)); };
  context_.check_admission = [this](const scheduler::Arrival& arrival) { return core_.CheckAdmission(arrival); };
  context_.abort = [this](scheduler::RequestId id) { core_.Abort(id); };
  context_.queue_depth = [this] { return core_.queue_depth(); };
  context_.now = Clock::now;
  context_.begin_drain = [this] { lifecycle_->RequestDrain(); };
  context_.ready_since = Clock::now();
}

absl::StatusOr<std::unique_ptr<Serving>> Serving::Start(const ServerOptions& options, const LoadedModel& model,
                                                        Lifecycle* lifecycle, Security security) {
  std::unique_ptr<Serving> serving(new Serving(options, model, lifecycle, std::move(security)));
  ASSIGN_OR_RETURN(serving->grpc_server_,
                   GrpcServer::Start(MakeGrpcOptions(options, serving->security_.tls.get()), &serving->context_));
  if (options.http_port >= 0) {
    ASSIGN_OR_RETURN(serving->http_,
                     compat::OpenAiHttp::Start(MakeHttpOptions(options), ChatTemplateOf(options), &serving->context_));
  }
  serving->output_.Start();
  serving->core_.Start();
  serving->StartWatching();
  serving->readiness_.Set(Readiness::Objection::kStarting, false);
  return serving;
}

Serving::~Serving() {
  if (grpc_server_ != nullptr) Stop(std::chrono::milliseconds(0));
}

void Serving::StartWatching() {
  operator_metrics_.SetAlive(true);
  if (security_.auth != nullptr) {
    reloaders_.emplace_back(
        "auth", [this] { return security_.auth->Reload(); }, [] {}, &operator_metrics_);
  }
  if (security_.tls != nullptr) {
    const auto tell_expiry = [this] {
      const auto not_after = security_.tls->current().material->not_after.time_since_epoch();
      operator_metrics_.SetCertificateExpiry(std::chrono::duration<double>(not_after).count());
    };
    tell_expiry();
    reloaders_.emplace_back(
        "tls", [this] { return security_.tls->Reload(); }, tell_expiry, &operator_metrics_);
  }
  watchdog_ = std::make_unique<PeriodicThread>(kWatchPeriod, [this] { Watch(Clock::now()); });
  if (reloaders_.empty()) return;
  reload_thread_ = std::make_unique<PeriodicThread>(kWatchPeriod, [this] {
    for (Reloader& reloader : reloaders_) reloader.Look();
  });
}

void Serving::Watch(scheduler::TimePoint now) {
  WatchMemory();
  // A call is live from before its request reaches the engine until the output thread has ended it: also an engine that
  // never wakes up, and an output thread that hangs, stop the steps of a call that is waiting.
  const bool hung = hang_detector_.Look({core_.num_steps(), output_.num_live() > 0}, now);
  operator_metrics_.SetHeartbeat(std::chrono::duration<double>(hang_detector_.age()).count(),
                                 std::chrono::duration<double>(hang_detector_.limit()).count());
  if (!hung && !hung_since_.has_value()) return;
  if (!hung_since_.has_value()) {
    hung_since_ = now;
    base::LogEvent(base::LogLevel::kError, "engine hung",
                   {{"seconds_without_a_step", absl::StrCat(ToSeconds(hang_detector_.age()))},
                    {"limit", absl::StrCat(ToSeconds(hang_detector_.limit()))}});
    readiness_.Set(Readiness::Objection::kHung, true);
    grpc_server_->SetAlive(false);
    operator_metrics_.SetAlive(false);
    // The output thread tells the clients, if it is not what hangs.
    output_.EndLiveCalls(ReasonError(absl::StatusCode::kUnavailable, reason::kEngineFailure,
                                     "the engine hangs; this server will restart"));
  }
  if (now - *hung_since_ >= kHangGrace) on_hang_();
}

void Serving::WatchMemory() {
  const double usage = ReadMemoryUsage();
  operator_metrics_.SetMemoryUsage(usage);
  const bool over = usage > options_.memory_mark - (over_memory_mark_ ? kMemoryHysteresis : 0);
  if (over == over_memory_mark_) return;
  over_memory_mark_ = over;
  base::LogEvent(base::LogLevel::kWarning, over ? "memory above the mark" : "memory below the mark",
                 {{"usage", absl::StrCat(usage)}, {"mark", absl::StrCat(options_.memory_mark)}});
  readiness_.Set(Readiness::Objection::kMemory, over);
}

void Serving::OnEngineFailure() {
  readiness_.Set(Readiness::Objection::kEngineFailed, true);
  grpc_server_->SetAlive(false);
  operator_metrics_.SetAlive(false);
  lifecycle_->ReportEngineFailure();
}

ExitCode Serving::ServeUntilEnd() {
  lifecycle_->WaitForEnd();
  Drain();
  return lifecycle_->engine_failed() ? kExitEngine : kExitOk;
}

void Serving::Drain() {
  const auto start = Clock::now();
  readiness_.Set(Readiness::Objection::kDraining, true);
  lifecycle_->Delay(std::chrono::duration<double>(options_.drain_delay_s));
  context_.draining.store(true);
  core_.BeginDrain();
  const bool idle = core_.WaitIdle(Clock::now() + ToDuration(options_.drain_timeout_s));
  if (!idle) {
    output_.EndLiveCalls(ReasonError(absl::StatusCode::kUnavailable, reason::kDraining,
                                     "the server shuts down and could not wait for this request any longer"));
  }
  Stop(!idle || lifecycle_->engine_failed() ? kFailedGrace : kDrainedGrace);
  base::LogInfo(absl::StrFormat("drained complete=%s seconds=%.2f", idle ? "true" : "false",
                                std::chrono::duration<double>(Clock::now() - start).count()));
}

// The listener first: calls use the threads, and the output thread tells the listener of a failure.
void Serving::Stop(std::chrono::milliseconds grace) {
  grpc_server_->Shutdown(grace);
  http_.reset();
  reload_thread_.reset();
  // The watchdog last: what is waited for here may hang too.
  core_.Stop();
  output_.Stop();
  watchdog_.reset();
}

}  // namespace minitron::server
