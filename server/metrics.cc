#include "server/metrics.h"

#include <algorithm>
#include <exception>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "server/grpc_status.h"
#include "server/process_metrics.h"

namespace minitron::server {
namespace {

using scheduler::Duration;

// Bounds in seconds. TTFT and latency follow vLLM's, so that dashboards compare; the token bounds start at 1 ms,
// because a step of a small model, or of an 8B model on a fast GPU, takes a few milliseconds.
const std::vector<double> kTtftBounds = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,
                                         .75,  1,    2.5, 5,   7.5, 10,  20,  40, 80,  160};
const std::vector<double> kTokenBounds = {.001, .002, .003, .004, .005, .0075, .01, .015, .02, .025, .03,
                                          .04,  .05,  .075, .1,   .15,  .2,    .3,  .5,   1,   2.5,  5};
const std::vector<double> kLatencyBounds = {.05, .1, .2, .3, .5, .8, 1,  1.5, 2,   2.5, 5,
                                            10,  15, 20, 30, 40, 50, 60, 120, 240, 480, 960};
const std::vector<double> kQueueBounds = {.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120};
const std::vector<double> kStepBounds = {.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1};
const std::vector<double> kBatchBounds = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512};
const std::vector<double> kStepTokenBounds = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};

constexpr const char* kOutcomeNames[kNumCallOutcomes] = {"stop", "length", "cancelled", "deadline", "error"};
constexpr const char* kPhaseNames[] = {"prefill", "decode", "mixed"};
constexpr const char* kRejections[] = {"queue_full", "tokens_full", "bytes_full", "deadline", "draining",
                                       "invalid",    "duplicate",   "quota",      "auth",     "error"};
constexpr const char* kMethods[] = {
    // minitron.v1
    "GenerateStream", "Generate", "Score", "Tokenize", "Detokenize", "ListModels", "GetModel", "GetLoad", "Drain",
    "CancelRequests", "GetServerInfo",
    // inference.GRPCInferenceService
    "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer", "ModelStreamInfer",
    "ModelConfig", "ModelStatistics",
    // vllm.Inference, vllm.Control and vllm.grpc.engine.VllmEngine, besides names they share with the native API
    "GetModelInfo", "Abort", "HealthCheck", "GetLoads", "GetTokenizer"};
constexpr const char* kHttpPaths[] = {"/",
                                      "/v1/models",
                                      "/v1/completions",
                                      "/v1/chat/completions",
                                      "/tokenize",
                                      "/detokenize",
                                      "/tokenizer_info",
                                      "/load",
                                      "/healthz",
                                      "/readyz",
                                      "other"};
// What these paths answer; 499 is a client that went away, and stands for any other code.
constexpr int kHttpCodes[] = {200, 400, 401, 403, 404, 405, 409, 413, 429, 499, 500, 501, 503, 504};
constexpr int kNumCodes = static_cast<int>(grpc::StatusCode::UNAUTHENTICATED) + 1;

// 1, 2, 5, 10, ... up to the first bound that is at least `limit`.
std::vector<double> TokenCountBounds(int limit) {
  std::vector<double> bounds;
  for (double decade = 1;; decade *= 10) {
    for (const double step : {1.0, 2.0, 5.0}) {
      bounds.push_back(decade * step);
      if (bounds.back() >= limit) return bounds;
    }
  }
}

double Seconds(Duration duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace

// A histogram that takes all observations of a step under one lock.
class Metrics::HistogramCell {
 public:
  HistogramCell(prometheus::Histogram* histogram, std::vector<double> bounds)
      : histogram_(histogram), bounds_(std::move(bounds)), increments_(bounds_.size() + 1) {}

  void Observe(const std::vector<double>& values) {
    if (values.empty()) return;
    std::fill(increments_.begin(), increments_.end(), 0.0);
    double sum = 0;
    for (const double value : values) {
      increments_[std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin()] += 1;
      sum += value;
    }
    histogram_->ObserveMultiple(increments_, sum);
  }
  void Observe(double value) { histogram_->Observe(value); }

 private:
  prometheus::Histogram* histogram_;  // owned by the registry
  std::vector<double> bounds_;
  std::vector<double> increments_;  // scratch; the output thread's
};

struct Metrics::Phase {
  prometheus::Counter* steps;
  std::unique_ptr<HistogramCell> duration;
};

void StepObservations::Clear() {
  for (std::vector<double>* values :
       {&time_to_first_token, &inter_token_latency, &time_per_output_token, &e2e_latency, &queue_time, &prefill_time,
        &decode_time, &inference_time, &prompt_tokens, &generation_tokens}) {
    values->clear();
  }
  num_prompt_tokens = num_generated_tokens = 0;
  std::fill(std::begin(outcomes), std::end(outcomes), 0);
  std::fill(std::begin(outcome_seconds), std::end(outcome_seconds), 0.0);
}

prometheus::Gauge& Metrics::AddGauge(const std::string& name, const std::string& help) {
  return prometheus::BuildGauge().Name(name).Help(help).Labels(labels_).Register(*registry_).Add({});
}

prometheus::Counter& Metrics::AddCounter(const std::string& name, const std::string& help) {
  return prometheus::BuildCounter().Name(name).Help(help).Labels(labels_).Register(*registry_).Add({});
}

std::unique_ptr<Metrics::HistogramCell> Metrics::AddHistogram(const std::string& name, const std::string& help,
                                                              const std::vector<double>& bounds) {
  auto& family = prometheus::BuildHistogram().Name(name).Help(help).Labels(labels_).Register(*registry_);
  return std::make_unique<HistogramCell>(&family.Add({}, bounds), bounds);
}

Metrics::Metrics(const MetricsOptions& options)
    : process_(std::make_shared<ProcessMetrics>()), labels_{{"model_name", options.model_name}} {
  AddCounts();
  AddLatencies(options.model.max_context_tokens);
  AddPhases();
  AddInfo(options);
  AddRpcs();
  AddHttp();
}

Metrics::~Metrics() = default;

void Metrics::AddCounts() {
  running_ = &AddGauge("minitron_requests_running", "Sequences in the running batch.");
  waiting_ = &AddGauge("minitron_requests_waiting", "Sequences waiting to be scheduled.");
  kv_usage_ = &AddGauge("minitron_kv_cache_usage_ratio", "Used fraction of the KV-cache blocks, 0 to 1.");
  kv_blocks_ = &AddGauge("minitron_kv_cache_blocks", "KV-cache blocks there are.");
  kv_blocks_used_ = &AddGauge("minitron_kv_cache_blocks_used", "KV-cache blocks in use.");
  kv_block_size_ = &AddGauge("minitron_kv_cache_block_size_tokens", "Tokens per KV-cache block.");
  prompt_tokens_ = &AddCounter("minitron_prompt_tokens_total", "Tokens of prompts whose computation ended.");
  generation_tokens_ = &AddCounter("minitron_generation_tokens_total", "Tokens generated.");
  prefix_queries_ = &AddCounter("minitron_prefix_cache_queries_tokens_total", "Tokens looked up in the prefix cache.");
  prefix_hits_ =
      &AddCounter("minitron_prefix_cache_hits_tokens_total", "Of the tokens looked up, those found and not computed.");
  preemptions_ = &AddCounter("minitron_preemptions_total", "Sequences that lost their KV blocks to others.");
  write_stalls_ =
      &AddCounter("minitron_stream_write_stalls_total", "Streams cut off because the client stopped reading.");
  outbox_wait_seconds_ =
      &AddCounter("minitron_engine_outbox_wait_seconds_total", "Time the engine waited for the output thread.");
  auto& errors = prometheus::BuildCounter()
                     .Name("minitron_engine_errors_total")
                     .Help("Failures of the engine.")
                     .Labels(labels_)
                     .Register(*registry_);
  engine_errors_ = &errors.Add({{"kind", "runner"}});
  auto& finished = prometheus::BuildCounter()
                       .Name("minitron_requests_finished_total")
                       .Help("Admitted requests that ended, by how.")
                       .Labels(labels_)
                       .Register(*registry_);
  for (int i = 0; i < kNumCallOutcomes; ++i) finished_[i] = &finished.Add({{"finish_reason", kOutcomeNames[i]}});
  auto& rejected = prometheus::BuildCounter()
                       .Name("minitron_admission_rejections_total")
                       .Help("Requests refused before they ran, by why.")
                       .Labels(labels_)
                       .Register(*registry_);
  for (const char* name : kRejections) rejections_[name] = &rejected.Add({{"reason", name}});
}

void Metrics::AddLatencies(int max_context_tokens) {
  ttft_ = AddHistogram("minitron_time_to_first_token_seconds", "Arrival of the call to its first token.", kTtftBounds);
  itl_ = AddHistogram("minitron_inter_token_latency_seconds", "Time between tokens of a sequence.", kTokenBounds);
  tpot_ = AddHistogram("minitron_request_time_per_output_token_seconds",
                       "Mean time between tokens, per finished sequence.", kTokenBounds);
  e2e_ = AddHistogram("minitron_e2e_request_latency_seconds", "Arrival of the call to its end.", kLatencyBounds);
  inference_ =
      AddHistogram("minitron_request_inference_time_seconds", "First scheduled to last token.", kLatencyBounds);
  decode_ = AddHistogram("minitron_request_decode_time_seconds", "First to last token.", kLatencyBounds);
  queue_ = AddHistogram("minitron_request_queue_time_seconds", "Arrival to first scheduled.", kQueueBounds);
  prefill_ = AddHistogram("minitron_request_prefill_time_seconds", "First scheduled to first token.", kQueueBounds);
  const std::vector<double> counts = TokenCountBounds(max_context_tokens);
  request_prompt_tokens_ =
      AddHistogram("minitron_request_prompt_tokens", "Prompt tokens per finished request.", counts);
  request_generation_tokens_ =
      AddHistogram("minitron_request_generation_tokens", "Generated tokens per finished sequence.", counts);
  batch_size_ = AddHistogram("minitron_engine_step_batch_size", "Sequences per engine step.", kBatchBounds);
  step_tokens_ = AddHistogram("minitron_engine_step_tokens", "Token rows per engine step.", kStepTokenBounds);
}

void Metrics::AddPhases() {
  auto& steps = prometheus::BuildCounter()
                    .Name("minitron_engine_steps_total")
                    .Help("Engine steps, by what they computed.")
                    .Labels(labels_)
                    .Register(*registry_);
  auto& durations = prometheus::BuildHistogram()
                        .Name("minitron_engine_step_duration_seconds")
                        .Help("Duration of an engine step.")
                        .Labels(labels_)
                        .Register(*registry_);
  for (const char* name : kPhaseNames) {
    auto& histogram = durations.Add({{"phase", name}}, kStepBounds);
    phases_.push_back({&steps.Add({{"phase", name}}), std::make_unique<HistogramCell>(&histogram, kStepBounds)});
  }
}

void Metrics::AddInfo(const MetricsOptions& options) {
  ready_ = &AddGauge("minitron_ready", "1 while the server accepts requests.");
  model_load_seconds_ = &AddGauge("minitron_model_load_duration_seconds", "How long loading the model took.");
  kv_blocks_->Set(options.kv_blocks);
  kv_block_size_->Set(options.kv_block_size);
  prometheus::BuildGauge()
      .Name("minitron_build_info")
      .Help("Version of the server; always 1.")
      .Register(*registry_)
      .Add({{"version", MINITRON_VERSION}, {"grpc", grpc::Version()}})
      .Set(1);
  prometheus::BuildGauge()
      .Name("minitron_model_info")
      .Help("The served model; always 1.")
      .Labels(labels_)
      .Register(*registry_)
      .Add({{"architecture", options.model.architecture},
            {"backend", options.model.backend},
            {"dtype", options.model.weight_type},
            {"max_model_len", absl::StrCat(options.model.max_context_tokens)}})
      .Set(1);
}

void Metrics::AddRpcs() {
  streams_active_ = &AddGauge("minitron_grpc_streams_active", "Open generation and scoring calls.");
  auto& family = prometheus::BuildCounter()
                     .Name("minitron_grpc_requests_total")
                     .Help("Finished calls, by method and status code.")
                     .Labels(labels_)
                     .Register(*registry_);
  for (const char* method : kMethods) {
    for (int code = 0; code < kNumCodes; ++code) {
      const char* name = CodeName(static_cast<grpc::StatusCode>(code));
      rpcs_[method].push_back(&family.Add({{"method", method}, {"code", name}}));
    }
  }
}

void Metrics::AddHttp() {
  auto& family = prometheus::BuildCounter()
                     .Name("minitron_http_requests_total")
                     .Help("Answered HTTP requests, by path and code.")
                     .Labels(labels_)
                     .Register(*registry_);
  for (const char* path : kHttpPaths) {
    for (const int code : kHttpCodes) {
      http_[path][code] = &family.Add({{"path", path}, {"code", absl::StrCat(code)}});
    }
  }
}

void Metrics::CountHttp(const std::string& path, int code) {
  const auto found = http_.find(path);
  CHECK(found != http_.end());
  const auto counter = found->second.find(code);
  (counter != found->second.end() ? counter->second : found->second.at(499))->Increment();
}

void Metrics::RecordStep(const scheduler::StepStats& stats, const StepObservations& observations) {
  SetLoad(stats.num_running, stats.num_waiting);
  kv_blocks_used_->Set(stats.num_blocks_used);
  kv_usage_->Set(stats.num_blocks > 0 ? static_cast<double>(stats.num_blocks_used) / stats.num_blocks : 0);
  preemptions_->Increment(stats.num_preemptions);
  if (stats.num_batch_tokens > 0) {
    const size_t phase = stats.num_prompt_tokens == stats.num_batch_tokens ? 0 : stats.num_prompt_tokens == 0 ? 1 : 2;
    phases_[phase].steps->Increment();
    phases_[phase].duration->Observe(Seconds(stats.step_duration));
    batch_size_->Observe(stats.num_batch_sequences);
    step_tokens_->Observe(stats.num_batch_tokens);
  }
  prompt_tokens_->Increment(static_cast<double>(observations.num_prompt_tokens));
  generation_tokens_->Increment(static_cast<double>(observations.num_generated_tokens));
  prefix_queries_->Increment(static_cast<double>(stats.num_prefix_query_tokens));
  prefix_hits_->Increment(static_cast<double>(stats.num_prefix_hit_tokens));
  ttft_->Observe(observations.time_to_first_token);
  itl_->Observe(observations.inter_token_latency);
  tpot_->Observe(observations.time_per_output_token);
  e2e_->Observe(observations.e2e_latency);
  queue_->Observe(observations.queue_time);
  prefill_->Observe(observations.prefill_time);
  decode_->Observe(observations.decode_time);
  inference_->Observe(observations.inference_time);
  request_prompt_tokens_->Observe(observations.prompt_tokens);
  request_generation_tokens_->Observe(observations.generation_tokens);
  for (int i = 0; i < kNumCallOutcomes; ++i) finished_[i]->Increment(observations.outcomes[i]);
  AddToTotals(stats, observations);
}

void Metrics::AddToTotals(const scheduler::StepStats& stats, const StepObservations& observations) {
  const auto add = [](const std::vector<double>& values, Tally& total) {
    total.count += values.size();
    for (const double value : values) total.seconds += value;
  };
  std::lock_guard<std::mutex> lock(totals_mutex_);
  add(observations.queue_time, totals_.queue);
  add(observations.inference_time, totals_.inference);
  if (stats.num_batch_tokens > 0) ++totals_.steps;
  for (int i = 0; i < kNumCallOutcomes; ++i) {
    if (observations.outcomes[i] == 0) continue;
    const auto outcome = static_cast<CallOutcome>(i);
    const bool is_answer = outcome == CallOutcome::kStop || outcome == CallOutcome::kLength;
    Tally& total = is_answer ? totals_.answered : totals_.failed;
    total.count += static_cast<uint64_t>(observations.outcomes[i]);
    total.seconds += observations.outcome_seconds[i];
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    totals_.last_end_unix_ms =
        static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::milliseconds>(now).count());
  }
}

Metrics::Totals Metrics::totals() const {
  std::lock_guard<std::mutex> lock(totals_mutex_);
  return totals_;
}

void Metrics::SetLoad(int num_running, int num_waiting) {
  running_->Set(num_running);
  waiting_->Set(num_waiting);
}

void Metrics::CountRpc(const std::string& method, grpc::StatusCode code) {
  const auto found = rpcs_.find(method);
  CHECK(found != rpcs_.end());
  const int index = static_cast<int>(code);
  found->second[index >= 0 && index < kNumCodes ? index : static_cast<int>(grpc::StatusCode::UNKNOWN)]->Increment();
}

void Metrics::CountRejection(const std::string& reason) {
  const auto found = rejections_.find(reason);
  CHECK(found != rejections_.end());
  found->second->Increment();
}

void Metrics::StreamOpened() { streams_active_->Increment(); }
void Metrics::StreamClosed() { streams_active_->Decrement(); }
void Metrics::CountWriteStall() { write_stalls_->Increment(); }
void Metrics::CountEngineError() { engine_errors_->Increment(); }
void Metrics::AddOutboxWait(Duration waited) { outbox_wait_seconds_->Increment(Seconds(waited)); }
void Metrics::SetReady(bool ready) { ready_->Set(ready ? 1 : 0); }
void Metrics::SetModelLoadSeconds(double seconds) { model_load_seconds_->Set(seconds); }

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Start(const std::string& host, int port) {
  const std::string address = absl::StrCat(host, ":", port);
  // civetweb throws; this is the one place where an exception of a library becomes a status.
  try {
    auto exposer = std::make_unique<prometheus::Exposer>(address, /*num_threads=*/2);
    const std::vector<int> ports = exposer->GetListeningPorts();
    if (ports.empty()) return absl::UnavailableError(absl::StrCat("cannot listen on metrics address ", address));
    return std::unique_ptr<MetricsServer>(new MetricsServer(std::move(exposer), ports.front()));
  } catch (const std::exception&) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on metrics address ", address, ": taken or not permitted"));
  }
}

MetricsServer::MetricsServer(std::unique_ptr<prometheus::Exposer> exposer, int port)
    : exposer_(std::move(exposer)), port_(port) {}

void MetricsServer::Publish(const Metrics& metrics) {
  exposer_->RegisterCollectable(metrics.registry());
  exposer_->RegisterCollectable(metrics.process());
}

void MetricsServer::Publish(const std::shared_ptr<prometheus::Collectable>& collectable) {
  exposer_->RegisterCollectable(collectable);
}

}  // namespace minitron::server
