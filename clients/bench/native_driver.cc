// The native protocol.
#include "clients/bench/driver.h"
#include "clients/bench/grpc_channels.h"
#include "clients/cpp/error.h"
#include "minitron/v1/generation.grpc.pb.h"

namespace minitron::bench {
namespace {

// Owns itself: deleted when gRPC is done with it.
class NativeCall final : public grpc::ClientReadReactor<v1::GenerateStreamResponse> {
 public:
  NativeCall(v1::GenerateStreamRequest request, uint32_t input_tokens, Driver::Done done)
      : request_(std::move(request)), done_(std::move(done)) {
    clock_.record().prompt_tokens = input_tokens;
  }

  void Start(GrpcChannels<v1::GenerationService>* channels, uint64_t index) {
    channels->Prepare(&context_);
    clock_.Start();
    channels->stub(index)->async()->GenerateStream(&context_, &request_, this);
    StartRead(&event_);
    StartCall();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    if (event_.has_started()) clock_.record().prompt_tokens = event_.started().prompt_token_count();
    if (event_.delta().token_ids_size() > 0) clock_.OnTokens(static_cast<uint32_t>(event_.delta().token_ids_size()));
    StartRead(&event_);
  }

  void OnDone(const grpc::Status& status) override {
    CallRecord record = clock_.Finish(status.ok() ? "" : client::CodeName(status.error_code()), status.error_message());
    // The context goes before the run is told: the driver and its channels may go right after.
    const Driver::Done done = std::move(done_);
    delete this;
    done(std::move(record));
  }

 private:
  grpc::ClientContext context_;
  v1::GenerateStreamRequest request_;
  v1::GenerateStreamResponse event_;
  TokenClock clock_;
  Driver::Done done_;
};

class NativeDriver final : public Driver {
 public:
  explicit NativeDriver(const DriverOptions& options) : channels_(options) {}

  void Start(const Prompt& prompt, uint64_t index, Done done) override {
    v1::GenerateStreamRequest request;
    v1::GenerationTask& task = *request.mutable_task();
    task.set_model(channels_.options().model);
    if (prompt.ids.empty()) {
      task.set_text(prompt.text);
    } else {
      task.mutable_token_ids()->mutable_ids()->Add(prompt.ids.begin(), prompt.ids.end());
    }
    task.mutable_sampling()->set_temperature(static_cast<float>(channels_.options().temperature));
    task.mutable_sampling()->set_seed(channels_.options().seed + index);
    task.mutable_stopping()->set_max_tokens(prompt.output_tokens);
    task.mutable_stopping()->set_ignore_eos(channels_.options().ignore_eos);
    auto* const call = new NativeCall(std::move(request), prompt.input_tokens, std::move(done));
    call->Start(&channels_, index);
  }

  bool takes_ids() const override { return true; }

 private:
  GrpcChannels<v1::GenerationService> channels_;
};

}  // namespace

std::unique_ptr<Driver> MakeNativeDriver(const DriverOptions& options) {
  return std::make_unique<NativeDriver>(options);
}

}  // namespace minitron::bench
