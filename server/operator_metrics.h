// OperatorMetrics: the series an operator needs beside those of requests: reloads, refusals at the door, tenants,
// connections, the engine's heartbeat. Same registry and labels as Metrics. Thread-safe.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/registry.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>

namespace minitron::server {

class OperatorMetrics {
 public:
  // `labels` go on every series.
  OperatorMetrics(const std::shared_ptr<prometheus::Registry>& registry,
                  const std::map<std::string, std::string>& labels);

  // `what` is auth or tls. A failed reload keeps the old version in force.
  void CountReload(const std::string& what, bool ok);
  // Whether the files on disk are unusable now, so that the server runs on what it read before.
  void SetReloadFailing(const std::string& what, bool failing);
  void SetCertificateExpiry(double unix_seconds);

  // `reason` is missing, unknown or role.
  void CountAuthFailure(const std::string& reason);

  // The first kMaxTenants names get a label of their own, the rest share "other".
  static constexpr size_t kMaxTenants = 64;
  void CountTenantRequest(const std::string& tenant, double num_tokens);
  void CountTenantRefusal(const std::string& tenant);

  void SetConnections(int open);
  // `reason` is address_limit, total_limit, descriptors or accept.
  void CountRefusedConnection(const std::string& reason);

  void SetHeartbeat(double age_seconds, double limit_seconds);
  void SetAlive(bool alive);
  void SetMemoryUsage(double ratio);
  void CountAuditDrop();

 private:
  using Counters = prometheus::Family<prometheus::Counter>;
  struct Tenant {
    prometheus::Counter *requests, *tokens, *refusals;
  };

  Counters& AddCounters(const std::string& name, const std::string& help);
  prometheus::Gauge& AddGauge(const std::string& name, const std::string& help);
  Tenant& TenantOf(const std::string& name);

  std::shared_ptr<prometheus::Registry> registry_;
  std::map<std::string, std::string> labels_;
  std::map<std::string, prometheus::Counter*> reloads_ok_, reloads_failed_, auth_failures_, refused_connections_;
  std::map<std::string, prometheus::Gauge*> reload_failing_;
  prometheus::Gauge *certificate_expiry_, *connections_, *heartbeat_age_, *heartbeat_limit_, *alive_, *memory_usage_;
  prometheus::Counter* audit_drops_;
  Counters *tenant_requests_, *tenant_tokens_, *tenant_refusals_;
  std::mutex mutex_;  // guards tenants_
  std::map<std::string, Tenant> tenants_;
};

}  // namespace minitron::server
