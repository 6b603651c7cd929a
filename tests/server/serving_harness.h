// A whole server on port 0 but for the model: real listener, calls, engine thread and output thread over
// FakeModelRunner, wired by Serving as in the program.
#pragma once

#include <grpc/health/v1/health.grpc.pb.h>
#include <minitron/v1/admin.grpc.pb.h>
#include <minitron/v1/generation.grpc.pb.h>

#include <functional>
#include <future>
#include <memory>
#include <string>

#include "server/serving.h"
#include "tests/testing/fake_model_runner.h"

namespace minitron::server {

struct ServingSetup {
  ServingSetup();  // 127.0.0.1, free port, vocabulary and end token of the shipped tokenizer

  ServerOptions server;
  testing::FakeModelRunnerOptions runner;
};

class ServingHarness {
 public:
  explicit ServingHarness(const ServingSetup& setup = {});
  ~ServingHarness();  // drains

  // A channel of its own, with a small flow-control window that does not grow.
  std::shared_ptr<grpc::Channel> Connect() const;
  v1::GetLoadResponse Load() const;
  // Asks for the load until it is as wanted.
  void WaitForLoad(const std::function<bool(const v1::GetLoadResponse&)>& wanted) const;
  void WaitUntilQueued(uint32_t count) const;
  // Until no call is live and no block of the KV cache is used.
  void WaitUntilIdle() const;
  std::string MetricsText() const;
  // Asks for the metrics until they have this line.
  void WaitForMetric(const std::string& line) const;
  // Waits for the end of the server.
  ExitCode WaitForExit() { return exit_.get(); }

  std::unique_ptr<Tokenizer> tokenizer;
  testing::FakeModelRunner runner;
  Lifecycle lifecycle;
  std::unique_ptr<Serving> serving;
  std::unique_ptr<v1::GenerationService::Stub> generation;
  std::unique_ptr<v1::AdminService::Stub> admin;
  std::unique_ptr<grpc::health::v1::Health::Stub> health;

 private:
  std::shared_future<ExitCode> exit_;
};

}  // namespace minitron::server
