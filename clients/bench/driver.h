// Driver: sends one request over one protocol and reports what came back. The rest of the program knows no protocol.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "clients/bench/dataset.h"
#include "clients/bench/record.h"
#include "clients/cpp/error.h"
#include "clients/cpp/security.h"

namespace minitron::bench {

struct DriverOptions {
  std::string target;  // HOST:PORT; for openai also http://HOST:PORT
  std::string model;   // empty: the served one
  double temperature = 0;
  bool ignore_eos = true;
  double timeout_s = 0;                                       // of each request; 0: none
  int connections = 1;                                        // gRPC only: requests take turns
  std::vector<std::pair<std::string, std::string>> metadata;  // headers of each request
  std::optional<client::TlsOptions> tls = std::nullopt;       // unset: plaintext, but for openai what the target says
  uint64_t seed = 0;                                          // request i samples with seed + i
};

class Driver {
 public:
  // Called exactly once, on any thread, when the call has ended.
  using Done = std::function<void(CallRecord)>;

  virtual ~Driver() = default;  // requires that every call has ended
  // Starts a request and returns at once. One thread at a time; `prompt` is copied.
  virtual void Start(const Prompt& prompt, uint64_t index, Done done) = 0;
  // Whether prompts may be token ids.
  virtual bool takes_ids() const = 0;
};

// minitron.v1.GenerationService/GenerateStream.
std::unique_ptr<Driver> MakeNativeDriver(const DriverOptions& options);
// inference.GRPCInferenceService/ModelStreamInfer, with the tensors of Triton's vLLM back end. Requires a model name.
std::unique_ptr<Driver> MakeOpenInferenceDriver(const DriverOptions& options);
// vllm.grpc.engine.VllmEngine/Generate. The protocol names no model.
std::unique_ptr<Driver> MakeVllmDriver(const DriverOptions& options);
// POST /v1/completions with server-sent events. Requires a model name.
std::unique_ptr<Driver> MakeOpenAiDriver(const DriverOptions& options);

struct ModelAnswer {
  std::string name;
  uint32_t vocab_size = 0;  // 0: the server does not say
};
// GetModelInfo of the same service; waits at most 10 s unless the options say otherwise.
std::optional<client::Error> AskVllmModel(const DriverOptions& options, ModelAnswer* answer);

}  // namespace minitron::bench
