// The Open Inference Protocol with Triton's stream, one stream per request.
#include <cstring>

#include "absl/strings/str_cat.h"
#include "clients/bench/driver.h"
#include "clients/bench/grpc_channels.h"
#include "clients/cpp/error.h"
#include "compat/open_inference.grpc.pb.h"

namespace minitron::bench {
namespace {

using inference::GRPCInferenceService;
using inference::ModelInferRequest;
using inference::ModelInferResponse;

void AddText(const std::string& name, const std::string& text, ModelInferRequest* request) {
  auto* const tensor = request->add_inputs();
  tensor->set_name(name);
  tensor->set_datatype("BYTES");
  tensor->add_shape(1);
  tensor->mutable_contents()->add_bytes_contents(text);
}

void AddFlag(const std::string& name, ModelInferRequest* request) {
  auto* const tensor = request->add_inputs();
  tensor->set_name(name);
  tensor->set_datatype("BOOL");
  tensor->add_shape(1);
  tensor->mutable_contents()->add_bool_contents(true);
}

// The first number of a UINT32 tensor, raw or not; `absent` when it is not there.
uint32_t ReadUint32(const ModelInferResponse& response, const std::string& name, uint32_t absent) {
  for (int i = 0; i < response.outputs_size(); ++i) {
    if (response.outputs(i).name() != name) continue;
    uint32_t value = 0;
    if (i < response.raw_output_contents_size()) {
      const std::string& raw = response.raw_output_contents(i);
      if (raw.size() < sizeof(value)) return absent;
      std::memcpy(&value, raw.data(), sizeof(value));
      return value;
    }
    const auto& values = response.outputs(i).contents().uint_contents();
    return values.empty() ? absent : values[0];
  }
  return absent;
}

// Owns itself: deleted when gRPC is done with it.
class InferCall final : public grpc::ClientBidiReactor<ModelInferRequest, inference::ModelStreamInferResponse> {
 public:
  InferCall(ModelInferRequest request, uint32_t input_tokens, Driver::Done done)
      : request_(std::move(request)), done_(std::move(done)) {
    clock_.record().prompt_tokens = input_tokens;
  }

  void Start(GrpcChannels<GRPCInferenceService>* channels, uint64_t index) {
    channels->Prepare(&context_);
    context_.AddMetadata("triton_grpc_error", "true");  // an error is the status of the stream
    clock_.Start();
    channels->stub(index)->async()->ModelStreamInfer(&context_, this);
    StartWriteLast(&request_, grpc::WriteOptions());
    StartRead(&response_);
    StartCall();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    if (!response_.error_message().empty()) {
      // A server that does not know the header.
      error_ = "ERROR_MESSAGE";
      message_ = response_.error_message();
    }
    const ModelInferResponse& answer = response_.infer_response();
    clock_.record().prompt_tokens = ReadUint32(answer, "num_input_tokens", clock_.record().prompt_tokens);
    const uint32_t tokens = ReadUint32(answer, "num_output_tokens", 0);
    if (tokens > 0) clock_.OnTokens(tokens);
    StartRead(&response_);
  }

  void OnDone(const grpc::Status& status) override {
    if (!status.ok()) {
      error_ = client::CodeName(status.error_code());
      message_ = status.error_message();
    }
    CallRecord record = clock_.Finish(error_, message_);
    // The context goes before the run is told: the driver and its channels may go right after.
    const Driver::Done done = std::move(done_);
    delete this;
    done(std::move(record));
  }

 private:
  grpc::ClientContext context_;
  ModelInferRequest request_;
  inference::ModelStreamInferResponse response_;
  TokenClock clock_;
  Driver::Done done_;
  std::string error_;
  std::string message_;
};

class OpenInferenceDriver final : public Driver {
 public:
  explicit OpenInferenceDriver(const DriverOptions& options) : channels_(options) {}

  void Start(const Prompt& prompt, uint64_t index, Done done) override {
    const DriverOptions& options = channels_.options();
    ModelInferRequest request;
    request.set_model_name(options.model);
    request.set_id(absl::StrCat(index));
    AddText("text_input", prompt.text, &request);
    AddText("sampling_parameters",
            absl::StrCat("{\"max_tokens\":", prompt.output_tokens, ",\"temperature\":", options.temperature,
                         ",\"ignore_eos\":", options.ignore_eos ? "true" : "false", ",\"seed\":", options.seed + index,
                         "}"),
            &request);
    for (const char* const name :
         {"stream", "exclude_input_in_output", "return_num_input_tokens", "return_num_output_tokens"}) {
      AddFlag(name, &request);
    }
    auto* const call = new InferCall(std::move(request), prompt.input_tokens, std::move(done));
    call->Start(&channels_, index);
  }

  bool takes_ids() const override { return false; }

 private:
  GrpcChannels<GRPCInferenceService> channels_;
};

}  // namespace

std::unique_ptr<Driver> MakeOpenInferenceDriver(const DriverOptions& options) {
  return std::make_unique<OpenInferenceDriver>(options);
}

}  // namespace minitron::bench
