#include "server/operator_metrics.h"

#include "engine/base/check.h"

namespace minitron::server {
namespace {

prometheus::Counter& Known(const std::map<std::string, prometheus::Counter*>& counters, const std::string& name) {
  const auto found = counters.find(name);
  CHECK(found != counters.end());
  return *found->second;
}

}  // namespace

OperatorMetrics::OperatorMetrics(const std::shared_ptr<prometheus::Registry>& registry,
                                 const std::map<std::string, std::string>& labels)
    : registry_(registry), labels_(labels) {
  auto& reloads = AddCounters("minitron_config_reloads_total", "New versions of a watched file, by outcome.");
  auto& failing = prometheus::BuildGauge()
                      .Name("minitron_config_reload_failing")
                      .Help("1 while the file on disk is unusable and the version before it is in force.")
                      .Labels(labels_)
                      .Register(*registry_);
  for (const char* what : {"auth", "tls"}) {
    reloads_ok_[what] = &reloads.Add({{"what", what}, {"result", "ok"}});
    reloads_failed_[what] = &reloads.Add({{"what", what}, {"result", "failed"}});
    reload_failing_[what] = &failing.Add({{"what", what}});
  }
  certificate_expiry_ = &AddGauge("minitron_tls_certificate_not_after_timestamp_seconds",
                                  "End of validity of the server's certificate, Unix time; 0 without TLS.");
  auto& failures = AddCounters("minitron_auth_failures_total", "Calls refused for who called, by why.");
  for (const char* reason : {"missing", "unknown", "role"})
    auth_failures_[reason] = &failures.Add({{"reason", reason}});
  tenant_requests_ = &AddCounters("minitron_tenant_requests_total", "Admitted requests that ended, by tenant.");
  tenant_tokens_ = &AddCounters("minitron_tenant_tokens_total", "Prompt and completion tokens used, by tenant.");
  tenant_refusals_ = &AddCounters("minitron_tenant_refusals_total", "Requests over a tenant's limits, by tenant.");
  TenantOf("other");
  connections_ = &AddGauge("minitron_connections_open", "Client connections that are open.");
  auto& refused = AddCounters("minitron_connections_refused_total", "Connections closed at once, by why.");
  for (const char* reason : {"address_limit", "total_limit", "descriptors", "accept"}) {
    refused_connections_[reason] = &refused.Add({{"reason", reason}});
  }
  heartbeat_age_ = &AddGauge("minitron_engine_heartbeat_age_seconds",
                             "Time since the engine, having work, last finished a step; 0 while it has none.");
  heartbeat_limit_ = &AddGauge("minitron_engine_heartbeat_limit_seconds", "Age at which the engine counts as hung.");
  alive_ = &AddGauge("minitron_alive", "1 while the engine is not hung and has not failed.");
  memory_usage_ = &AddGauge("minitron_memory_usage_ratio",
                            "Memory that cannot be reclaimed, as a fraction of the limit; 0 without a limit.");
  audit_drops_ =
      &AddCounters("minitron_audit_lines_dropped_total", "Audit lines beyond the rate or the queue.").Add({});
}

OperatorMetrics::Counters& OperatorMetrics::AddCounters(const std::string& name, const std::string& help) {
  return prometheus::BuildCounter().Name(name).Help(help).Labels(labels_).Register(*registry_);
}

prometheus::Gauge& OperatorMetrics::AddGauge(const std::string& name, const std::string& help) {
  return prometheus::BuildGauge().Name(name).Help(help).Labels(labels_).Register(*registry_).Add({});
}

void OperatorMetrics::CountReload(const std::string& what, bool ok) {
  Known(ok ? reloads_ok_ : reloads_failed_, what).Increment();
}

void OperatorMetrics::SetReloadFailing(const std::string& what, bool failing) {
  const auto found = reload_failing_.find(what);
  CHECK(found != reload_failing_.end());
  found->second->Set(failing ? 1 : 0);
}

void OperatorMetrics::CountAuthFailure(const std::string& reason) { Known(auth_failures_, reason).Increment(); }

OperatorMetrics::Tenant& OperatorMetrics::TenantOf(const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = tenants_.find(name);
  if (found != tenants_.end()) return found->second;
  const std::string label = tenants_.size() <= kMaxTenants ? name : "other";
  const auto other = tenants_.find(label);
  if (other != tenants_.end()) return other->second;
  const std::map<std::string, std::string> labels = {{"tenant", label}};
  return tenants_[label] = {&tenant_requests_->Add(labels), &tenant_tokens_->Add(labels),
                            &tenant_refusals_->Add(labels)};
}

void OperatorMetrics::CountTenantRequest(const std::string& tenant, double num_tokens) {
  const Tenant& counters = TenantOf(tenant);
  counters.requests->Increment();
  counters.tokens->Increment(num_tokens);
}

void OperatorMetrics::CountTenantRefusal(const std::string& tenant) { TenantOf(tenant).refusals->Increment(); }
void OperatorMetrics::SetCertificateExpiry(double unix_seconds) { certificate_expiry_->Set(unix_seconds); }
void OperatorMetrics::SetConnections(int open) { connections_->Set(open); }
void OperatorMetrics::CountRefusedConnection(const std::string& reason) {
  Known(refused_connections_, reason).Increment();
}
void OperatorMetrics::SetHeartbeat(double age_seconds, double limit_seconds) {
  heartbeat_age_->Set(age_seconds);
  heartbeat_limit_->Set(limit_seconds);
}
void OperatorMetrics::SetAlive(bool alive) { alive_->Set(alive ? 1 : 0); }
void OperatorMetrics::SetMemoryUsage(double ratio) { memory_usage_->Set(ratio); }
void OperatorMetrics::CountAuditDrop() { audit_drops_->Increment(); }

}  // namespace minitron::server
