// Reloader: looks at the watched files again and again, and tells the log and the metrics what became of them.
#pragma once

#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "server/operator_metrics.h"

namespace minitron::server {

class Reloader {
 public:
  // `what` is auth or tls. `reload` returns whether a new version came into force, or why the one on disk cannot.
  // `on_new` is called after a new version.
  Reloader(std::string what, std::function<absl::StatusOr<bool>()> reload, std::function<void()> on_new,
           OperatorMetrics* metrics)
      : what_(std::move(what)), reload_(std::move(reload)), on_new_(std::move(on_new)), metrics_(metrics) {}

  // One look. A failure counts when the next look finds it too: a certificate and its key are two files, and are not
  // replaced in one instant.
  void Look();

 private:
  const std::string what_;
  const std::function<absl::StatusOr<bool>()> reload_;
  const std::function<void()> on_new_;
  OperatorMetrics* metrics_;  // owned by Serving
  std::string problem_;       // of the last look
  bool reported_ = false;     // problem_ is in the log
};

}  // namespace minitron::server
