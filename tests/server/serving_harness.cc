#include "tests/server/serving_harness.h"

#include <prometheus/text_serializer.h>

#include "engine/base/check.h"

namespace minitron::server {
namespace {

std::unique_ptr<Tokenizer> LoadShippedTokenizer() {
  // First of all: threads inherit the blocked signals.
  BlockSignals();
  auto loaded = Tokenizer::Load(std::string(MINITRON_SOURCE_DIR) + "/deploy/models/minitron-tiny", 2048);
  CHECK(loaded.ok());
  return *std::move(loaded);
}

}  // namespace

ServingSetup::ServingSetup() {
  server.host = "127.0.0.1";
  server.port = 0;
  server.served_model_name = "fake";
  runner.vocab_size = 2048;
  runner.eos_token_ids = {3};
}

ServingHarness::ServingHarness(const ServingSetup& setup) : tokenizer(LoadShippedTokenizer()), runner(setup.runner) {
  const LoadedModel model = {setup.server.served_model_name, &runner, tokenizer.get(), {}};
  auto started = Serving::Start(setup.server, model, &lifecycle);
  CHECK(started.ok());
  serving = *std::move(started);
  const auto channel = Connect();
  generation = v1::GenerationService::NewStub(channel);
  admin = v1::AdminService::NewStub(channel);
  health = grpc::health::v1::Health::NewStub(channel);
  exit_ = std::async(std::launch::async, [this] { return serving->ServeUntilEnd(); }).share();
}

ServingHarness::~ServingHarness() {
  runner.Release();
  lifecycle.RequestDrain();
  exit_.wait();
}

std::shared_ptr<grpc::Channel> ServingHarness::Connect() const {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(serving->port()), grpc::InsecureChannelCredentials(),
                                   arguments);
}

v1::GetLoadResponse ServingHarness::Load() const {
  grpc::ClientContext context;
  v1::GetLoadResponse response;
  CHECK(admin->GetLoad(&context, {}, &response).ok());
  return response;
}

void ServingHarness::WaitForLoad(const std::function<bool(const v1::GetLoadResponse&)>& wanted) const {
  while (!wanted(Load())) {
  }
}

void ServingHarness::WaitUntilQueued(uint32_t count) const {
  WaitForLoad([count](const v1::GetLoadResponse& load) { return load.waiting_sequences() == count; });
}

void ServingHarness::WaitUntilIdle() const {
  WaitForLoad([](const v1::GetLoadResponse& load) {
    return load.active_calls() == 0 && load.kv_blocks_used() == 0 && load.running_sequences() == 0;
  });
}

std::string ServingHarness::MetricsText() const {
  return prometheus::TextSerializer().Serialize(serving->metrics().registry()->Collect());
}

void ServingHarness::WaitForMetric(const std::string& line) const {
  while (MetricsText().find(line + "\n") == std::string::npos) {
  }
}

}  // namespace minitron::server
