// The standard process_* series, read from /proc at scrape time. prometheus-cpp has none of its own.
#pragma once

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

#include <vector>

namespace minitron::server {

// Thread-safe: holds nothing.
class ProcessMetrics : public prometheus::Collectable {
 public:
  std::vector<prometheus::MetricFamily> Collect() const override;
};

}  // namespace minitron::server
