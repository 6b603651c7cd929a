// vLLM's engine protocol, vllm.grpc.engine.VllmEngine: token ids out.
#include <random>
#include <string>

#include "clients/bench/driver.h"
#include "clients/bench/grpc_channels.h"
#include "clients/cpp/error.h"
#include "compat/vllm_engine.grpc.pb.h"

namespace minitron::bench {
namespace {

namespace engine = ::vllm::grpc::engine;

// Owns itself: deleted when gRPC is done with it.
class EngineCall final : public grpc::ClientReadReactor<engine::GenerateResponse> {
 public:
  EngineCall(engine::GenerateRequest request, uint32_t input_tokens, Driver::Done done)
      : request_(std::move(request)), done_(std::move(done)) {
    clock_.record().prompt_tokens = input_tokens;
  }

  void Start(GrpcChannels<engine::VllmEngine>* channels, uint64_t index) {
    channels->Prepare(&context_);
    clock_.Start();
    channels->stub(index)->async()->Generate(&context_, &request_, this);
    StartRead(&response_);
    StartCall();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    if (response_.has_chunk()) {
      OnPiece(response_.chunk().token_ids_size(), response_.chunk().prompt_tokens());
    } else if (response_.has_complete()) {
      // The whole sequence once more; what no chunk had is new.
      const auto seen = static_cast<int>(clock_.record().output_tokens);
      OnPiece(response_.complete().output_ids_size() - seen, response_.complete().prompt_tokens());
      finish_reason_ = response_.complete().finish_reason();
    }
    StartRead(&response_);
  }

  void OnDone(const grpc::Status& status) override {
    std::string error = status.ok() ? "" : client::CodeName(status.error_code());
    std::string message = status.error_message();
    if (status.ok() && finish_reason_ == "abort") {
      error = "ABORTED";  // some servers end an aborted request without a status
      message = "the server aborted the request";
    }
    CallRecord record = clock_.Finish(std::move(error), std::move(message));
    // The context goes before the run is told: the driver and its channels may go right after.
    const Driver::Done done = std::move(done_);
    delete this;
    done(std::move(record));
  }

 private:
  void OnPiece(int tokens, uint32_t prompt_tokens) {
    if (prompt_tokens > 0) clock_.record().prompt_tokens = prompt_tokens;
    if (tokens > 0) clock_.OnTokens(static_cast<uint32_t>(tokens));
  }

  grpc::ClientContext context_;
  engine::GenerateRequest request_;
  engine::GenerateResponse response_;
  TokenClock clock_;
  Driver::Done done_;
  std::string finish_reason_;
};

class VllmDriver final : public Driver {
 public:
  explicit VllmDriver(const DriverOptions& options)
      : channels_(options), run_name_("bench-" + std::to_string(std::random_device()()) + "-") {}

  void Start(const Prompt& prompt, uint64_t index, Done done) override {
    const DriverOptions& options = channels_.options();
    engine::GenerateRequest request;
    request.set_request_id(run_name_ + std::to_string(index));
    request.set_stream(true);
    if (prompt.ids.empty()) {
      request.set_text(prompt.text);
    } else {
      request.mutable_tokenized()->mutable_input_ids()->Add(prompt.ids.begin(), prompt.ids.end());
    }
    engine::SamplingParams& params = *request.mutable_sampling_params();
    params.set_temperature(static_cast<float>(options.temperature));
    params.set_seed(static_cast<int32_t>((options.seed + index) & INT32_MAX));
    params.set_max_tokens(prompt.output_tokens);
    params.set_ignore_eos(options.ignore_eos);
    params.set_n(1);
    auto* const call = new EngineCall(std::move(request), prompt.input_tokens, std::move(done));
    call->Start(&channels_, index);
  }

  bool takes_ids() const override { return true; }

 private:
  GrpcChannels<engine::VllmEngine> channels_;
  const std::string run_name_;  // requests are named: servers take a name twice for an error, an empty one too
};

}  // namespace

std::unique_ptr<Driver> MakeVllmDriver(const DriverOptions& options) { return std::make_unique<VllmDriver>(options); }

std::optional<client::Error> AskVllmModel(const DriverOptions& options, ModelAnswer* answer) {
  GrpcChannels<engine::VllmEngine> channels(options);
  grpc::ClientContext context;
  channels.Prepare(&context);
  if (options.timeout_s <= 0) context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  engine::GetModelInfoResponse response;
  const grpc::Status status = channels.stub(0)->GetModelInfo(&context, {}, &response);
  if (!status.ok()) return client::DecodeError(status);
  answer->name = response.served_model_name().empty() ? response.model_path() : response.served_model_name();
  answer->vocab_size = response.vocab_size();
  return std::nullopt;
}

}  // namespace minitron::bench
