#include "server/vllm_metrics.h"

#include <string>

namespace minitron::server {
namespace {

struct Alias {
  const char* ours;
  const char* theirs;
};

// Source: vllm-project/vllm:vllm/v1/metrics/loggers.py. Equal meaning and unit; what has no equal is left out.
constexpr Alias kAliases[] = {
    {"minitron_requests_running", "vllm:num_requests_running"},
    {"minitron_requests_waiting", "vllm:num_requests_waiting"},
    {"minitron_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc"},
    {"minitron_prompt_tokens_total", "vllm:prompt_tokens_total"},
    {"minitron_generation_tokens_total", "vllm:generation_tokens_total"},
    {"minitron_preemptions_total", "vllm:num_preemptions_total"},
    {"minitron_prefix_cache_queries_tokens_total", "vllm:prefix_cache_queries_total"},
    {"minitron_prefix_cache_hits_tokens_total", "vllm:prefix_cache_hits_total"},
    {"minitron_requests_finished_total", "vllm:request_success_total"},
    {"minitron_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"},
    {"minitron_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"},
    {"minitron_request_time_per_output_token_seconds", "vllm:request_time_per_output_token_seconds"},
    {"minitron_e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds"},
    {"minitron_request_queue_time_seconds", "vllm:request_queue_time_seconds"},
    {"minitron_request_prefill_time_seconds", "vllm:request_prefill_time_seconds"},
    {"minitron_request_decode_time_seconds", "vllm:request_decode_time_seconds"},
    {"minitron_request_inference_time_seconds", "vllm:request_inference_time_seconds"},
    {"minitron_request_prompt_tokens", "vllm:request_prompt_tokens"},
    {"minitron_request_generation_tokens", "vllm:request_generation_tokens"},
};

// Their label "engine" numbers the engines of a process; we have one. Their finish reasons count what succeeded.
bool AdaptLabels(prometheus::ClientMetric& metric) {
  for (auto& label : metric.label) {
    if (label.name != "finish_reason") continue;
    label.name = "finished_reason";
    if (label.value != "stop" && label.value != "length") return false;
  }
  metric.label.push_back({"engine", "0"});
  return true;
}

const prometheus::ClientMetric* FirstOf(const std::vector<prometheus::MetricFamily>& families,
                                        const std::string& name) {
  for (const auto& family : families) {
    if (family.name == name && !family.metric.empty()) return &family.metric.front();
  }
  return nullptr;
}

// Block size and count travel as labels of a constant.
void AddCacheInfo(const std::vector<prometheus::MetricFamily>& families,
                  std::vector<prometheus::MetricFamily>& result) {
  const prometheus::ClientMetric* size = FirstOf(families, "minitron_kv_cache_block_size_tokens");
  const prometheus::ClientMetric* count = FirstOf(families, "minitron_kv_cache_blocks");
  if (size == nullptr || count == nullptr) return;
  prometheus::ClientMetric info;
  info.gauge.value = 1;
  info.label = size->label;
  info.label.push_back({"engine", "0"});
  info.label.push_back({"block_size", std::to_string(static_cast<int64_t>(size->gauge.value))});
  info.label.push_back({"num_gpu_blocks", std::to_string(static_cast<int64_t>(count->gauge.value))});
  result.push_back({"vllm:cache_config_info", "KV cache layout.", prometheus::MetricType::Gauge, {info}});
}

}  // namespace

std::vector<prometheus::MetricFamily> VllmMetrics::Collect() const {
  const std::vector<prometheus::MetricFamily> families = registry_->Collect();
  std::vector<prometheus::MetricFamily> result;
  for (const prometheus::MetricFamily& family : families) {
    for (const Alias& alias : kAliases) {
      if (family.name != alias.ours) continue;
      prometheus::MetricFamily renamed{alias.theirs, family.help, family.type, {}};
      for (prometheus::ClientMetric metric : family.metric) {
        if (AdaptLabels(metric)) renamed.metric.push_back(std::move(metric));
      }
      result.push_back(std::move(renamed));
    }
  }
  AddCacheInfo(families, result);
  return result;
}

}  // namespace minitron::server
