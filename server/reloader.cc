#include "server/reloader.h"

#include "engine/base/log.h"

namespace minitron::server {

void Reloader::Look() {
  const absl::StatusOr<bool> changed = reload_();
  if (!changed.ok()) {
    const std::string problem(changed.status().message());
    if (problem != problem_) {
      problem_ = problem;
      reported_ = false;
      return;
    }
    if (reported_) return;
    reported_ = true;
    base::LogEvent(base::LogLevel::kError, "reload failed, the old version stays",
                   {{"what", what_}, {"problem", problem}});
    metrics_->CountReload(what_, false);
    metrics_->SetReloadFailing(what_, true);
    return;
  }
  problem_.clear();
  reported_ = false;
  metrics_->SetReloadFailing(what_, false);
  if (!*changed) return;
  base::LogEvent(base::LogLevel::kInfo, "reloaded", {{"what", what_}});
  metrics_->CountReload(what_, true);
  on_new_();
}

}  // namespace minitron::server
