// Serving: a loaded model behind a listener. Owns what a request passes through (metrics, the engine thread, the output
// thread, the services) and their wiring, which the program and the tests share.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_config.h"
#include "engine/model_runner.h"
#include "scheduler/engine_core.h"
#include "server/audit_log.h"
#include "server/auth.h"
#include "server/compat/openai_http.h"
#include "server/grpc_server.h"
#include "server/hang_detector.h"
#include "server/lifecycle.h"
#include "server/metrics.h"
#include "server/operator_metrics.h"
#include "server/output_processor.h"
#include "server/periodic_thread.h"
#include "server/readiness.h"
#include "server/reloader.h"
#include "server/server_context.h"
#include "server/server_options.h"
#include "server/tenant_gate.h"
#include "server/tls.h"
#include "server/tokenizer.h"

namespace minitron::server {

// Of the process; also in README.md. 128 + signal number: a second signal.
enum ExitCode { kExitOk = 0, kExitUsage = 2, kExitModel = 3, kExitPort = 4, kExitEngine = 5, kExitHang = 6 };

struct LoadedModel {
  std::string name;
  engine::ModelRunner* runner = nullptr;  // owned by main
  const Tokenizer* tokenizer = nullptr;   // likewise
  engine::GenerationDefaults defaults;
  scheduler::Duration longest_step{};  // an estimate, from the self-test; 0: unknown
};

// Who may call, and who is told; each null unless an option turns it on.
struct Security {
  std::unique_ptr<AuthStore> auth;
  std::unique_ptr<TlsStore> tls;
  std::unique_ptr<AuditLog> audit;
};

// Reads the files that the options name. Errors: NOT_FOUND, INVALID_ARGUMENT, naming the file.
absl::StatusOr<Security> OpenSecurity(const ServerOptions& options);

class Serving {
 public:
  // Starts the threads and the listener; ready on return. Runner, tokenizer and `lifecycle` must outlive this object.
  // Error: UNAVAILABLE when the port cannot be bound (names host and port).
  static absl::StatusOr<std::unique_ptr<Serving>> Start(const ServerOptions& options, const LoadedModel& model,
                                                        Lifecycle* lifecycle, Security security = {});
  ~Serving();  // cancels what still runs

  // Waits until `lifecycle` ends the server, then drains: not ready, new requests refused, running ones finish; what is
  // left after the drain timeout is cancelled. Returns kExitOk, or kExitEngine when the engine failed. Call once.
  ExitCode ServeUntilEnd();

  // What ends the process when the engine hangs, which nothing inside can end; by default _exit(kExitHang). Runs on the
  // watchdog's thread, a second after health fell. Call before anything can hang.
  void SetOnHang(std::function<void()> on_hang) { on_hang_ = std::move(on_hang); }

  // One look of the watchdog, which otherwise looks four times a second: the engine's heartbeat and the memory.
  void Watch(scheduler::TimePoint now);

  int port() const { return grpc_server_->port(); }
  int health_port() const { return grpc_server_->health_port(); }
  int http_port() const { return http_ == nullptr ? 0 : http_->port(); }
  Metrics& metrics() { return metrics_; }

 private:
  Serving(const ServerOptions& options, const LoadedModel& model, Lifecycle* lifecycle, Security security);

  void Connect();
  void StartWatching();
  void WatchMemory();
  void OnEngineFailure();
  void Drain();
  void Stop(std::chrono::milliseconds grace);

  const ServerOptions options_;
  Lifecycle* const lifecycle_;  // owned by main
  Metrics metrics_;
  OperatorMetrics operator_metrics_;
  Security security_;
  const constraint::ConstraintCompiler constraints_;  // before what holds requests
  TenantGate tenants_;                                // before output_, whose calls hold charges
  OutputProcessor output_;
  scheduler::EngineCore core_;
  ServerContext context_;
  std::unique_ptr<GrpcServer> grpc_server_;   // null only while Start fails
  std::unique_ptr<compat::OpenAiHttp> http_;  // null unless an option turns it on
  Readiness readiness_;
  std::function<void()> on_hang_;

  HangDetector hang_detector_;  // the watchdog's, as the next two are
  std::optional<scheduler::TimePoint> hung_since_;
  bool over_memory_mark_ = false;
  std::vector<Reloader> reloaders_;           // the reload thread's
  std::unique_ptr<PeriodicThread> watchdog_;  // waits for nobody: no file, no engine, no client
  std::unique_ptr<PeriodicThread> reload_thread_;
};

}  // namespace minitron::server
