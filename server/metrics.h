// Metrics: every name, help text and bucket of /metrics. Series exist from the start, at 0.
// Thread-safe. RecordStep is called once per engine step with everything the step produced.
#pragma once

#include <grpcpp/grpcpp.h>
#include <prometheus/counter.h>
#include <prometheus/exposer.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_runner.h"
#include "scheduler/step_output.h"

namespace minitron::server {

// How a call ended, for requests_finished_total.
enum class CallOutcome { kStop, kLength, kCancelled, kDeadline, kError };
inline constexpr int kNumCallOutcomes = 5;

// What one step, or one request that ended in it, adds. Durations in seconds.
struct StepObservations {
  std::vector<double> time_to_first_token;
  std::vector<double> inter_token_latency;
  std::vector<double> time_per_output_token;
  std::vector<double> e2e_latency;
  std::vector<double> queue_time;
  std::vector<double> prefill_time;
  std::vector<double> decode_time;
  std::vector<double> inference_time;
  std::vector<double> prompt_tokens;
  std::vector<double> generation_tokens;
  int64_t num_prompt_tokens = 0;
  int64_t num_generated_tokens = 0;
  int outcomes[kNumCallOutcomes] = {};
  double outcome_seconds[kNumCallOutcomes] = {};  // arrival to end, of the calls in `outcomes`

  void Clear();
};

struct MetricsOptions {
  std::string model_name;
  engine::ModelInfo model;
  int kv_blocks = 0;
  int kv_block_size = 0;
};

class Metrics {
 public:
  explicit Metrics(const MetricsOptions& options);
  ~Metrics();

  const std::shared_ptr<prometheus::Registry>& registry() const { return registry_; }
  // What every series is labelled with.
  const std::map<std::string, std::string>& labels() const { return labels_; }
  // The process_* series; register it beside the registry.
  const std::shared_ptr<prometheus::Collectable>& process() const { return process_; }

  struct Tally {
    uint64_t count = 0;
    double seconds = 0;
  };
  // Sums since the start, over all protocols; the same observations as the series.
  struct Totals {
    Tally answered;   // calls that ended with stop or length
    Tally failed;     // all other admitted calls
    Tally queue;      // sequences, arrival to first scheduled
    Tally inference;  // sequences, first scheduled to last token
    uint64_t steps = 0;
    uint64_t last_end_unix_ms = 0;  // when the last call ended; 0: none has
  };
  Totals totals() const;

  void RecordStep(const scheduler::StepStats& stats, const StepObservations& observations);
  void SetLoad(int num_running, int num_waiting);

  // `method` is one of ours ("GenerateStream").
  void CountRpc(const std::string& method, grpc::StatusCode code);
  // `path` is one of ours ("/v1/completions"); `code` is an HTTP code, 0 when the client went away before there was
  // one.
  void CountHttp(const std::string& path, int code);
  void StreamOpened();
  void StreamClosed();
  // `reason` is one of queue_full, tokens_full, bytes_full, deadline, draining, invalid, duplicate, quota, auth, error.
  void CountRejection(const std::string& reason);
  void CountWriteStall();
  void CountEngineError();
  void AddOutboxWait(scheduler::Duration waited);
  void SetReady(bool ready);
  void SetModelLoadSeconds(double seconds);

 private:
  class HistogramCell;
  struct Phase;

  prometheus::Gauge& AddGauge(const std::string& name, const std::string& help);
  prometheus::Counter& AddCounter(const std::string& name, const std::string& help);
  std::unique_ptr<HistogramCell> AddHistogram(const std::string& name, const std::string& help,
                                              const std::vector<double>& bounds);
  void AddCounts();
  void AddLatencies(int max_context_tokens);
  void AddPhases();
  void AddInfo(const MetricsOptions& options);
  void AddRpcs();
  void AddHttp();
  void AddToTotals(const scheduler::StepStats& stats, const StepObservations& observations);

  std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
  std::shared_ptr<prometheus::Collectable> process_;
  std::map<std::string, std::string> labels_;  // model_name

  mutable std::mutex totals_mutex_;
  Totals totals_;

  prometheus::Gauge *running_, *waiting_, *kv_usage_, *kv_blocks_, *kv_blocks_used_, *kv_block_size_;
  prometheus::Gauge *ready_, *model_load_seconds_, *streams_active_;
  prometheus::Counter *prompt_tokens_, *generation_tokens_, *prefix_queries_, *prefix_hits_, *preemptions_;
  prometheus::Counter *write_stalls_, *engine_errors_, *outbox_wait_seconds_;
  prometheus::Counter* finished_[kNumCallOutcomes];
  std::map<std::string, prometheus::Counter*> rejections_;
  std::map<std::string, std::vector<prometheus::Counter*>> rpcs_;    // by method, then by code
  std::map<std::string, std::map<int, prometheus::Counter*>> http_;  // by path, then by code
  std::vector<Phase> phases_;                                        // prefill, decode, mixed
  std::unique_ptr<HistogramCell> ttft_, itl_, tpot_, e2e_, queue_, prefill_, decode_, inference_;
  std::unique_ptr<HistogramCell> request_prompt_tokens_, request_generation_tokens_, batch_size_, step_tokens_;
};

// The HTTP port of /metrics. Port 0 picks a free one.
class MetricsServer {
 public:
  // Error: UNAVAILABLE when the port cannot be bound (names host and port).
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Start(const std::string& host, int port);
  void Publish(const Metrics& metrics);
  void Publish(const std::shared_ptr<prometheus::Collectable>& collectable);  // keeps no reference
  int port() const { return port_; }

 private:
  MetricsServer(std::unique_ptr<prometheus::Exposer> exposer, int port);
  std::unique_ptr<prometheus::Exposer> exposer_;
  int port_;
};

}  // namespace minitron::server
