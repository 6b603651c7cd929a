// Serving: a loaded model behind a listener. Owns what a request passes through (metrics, the engine thread, the output
// thread, the services) and their wiring, which the program and the tests share.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/model_config.h"
#include "engine/model_runner.h"
#include "scheduler/engine_core.h"
#include "server/grpc_server.h"
#include "server/lifecycle.h"
#include "server/metrics.h"
#include "server/output_processor.h"
#include "server/server_context.h"
#include "server/server_options.h"
#include "server/tokenizer.h"

namespace minitron::server {

// Of the process; also in README.md. 128 + signal number: a second signal.
enum ExitCode { kExitOk = 0, kExitUsage = 2, kExitModel = 3, kExitPort = 4, kExitEngine = 5 };

struct LoadedModel {
  std::string name;
  engine::ModelRunner* runner = nullptr;  // owned by main
  const Tokenizer* tokenizer = nullptr;   // likewise
  engine::GenerationDefaults defaults;
};

class Serving {
 public:
  // Starts the threads and the listener; ready on return. Runner, tokenizer and `lifecycle` must outlive this object.
  // Error: UNAVAILABLE when the port cannot be bound (names host and port).
  static absl::StatusOr<std::unique_ptr<Serving>> Start(const ServerOptions& options, const LoadedModel& model,
                                                        Lifecycle* lifecycle);
  ~Serving();  // cancels what still runs

  // Waits until `lifecycle` ends the server, then drains: not ready, new requests refused, running ones finish; what is
  // left after the drain timeout is cancelled. Returns kExitOk, or kExitEngine when the engine failed. Call once.
  ExitCode ServeUntilEnd();

  int port() const { return grpc_server_->port(); }
  Metrics& metrics() { return metrics_; }

 private:
  Serving(const ServerOptions& options, const LoadedModel& model, Lifecycle* lifecycle);

  void Connect();
  void OnEngineFailure();
  void Drain();
  void Stop(std::chrono::milliseconds grace);

  const ServerOptions options_;
  Lifecycle* const lifecycle_;  // owned by main
  Metrics metrics_;
  OutputProcessor output_;
  scheduler::EngineCore core_;
  ServerContext context_;
  std::unique_ptr<GrpcServer> grpc_server_;  // null only while Start fails
};

}  // namespace minitron::server
