// The names under which vLLM exports what Metrics exports, for dashboards, autoscalers and endpoint pickers that know
// those: a second view of the same series, taken when they are scraped.
#pragma once

#include <prometheus/collectable.h>
#include <prometheus/registry.h>

#include <memory>
#include <vector>

namespace minitron::server {

class VllmMetrics : public prometheus::Collectable {
 public:
  explicit VllmMetrics(std::shared_ptr<prometheus::Registry> registry) : registry_(std::move(registry)) {}
  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  std::shared_ptr<prometheus::Registry> registry_;
};

}  // namespace minitron::server
