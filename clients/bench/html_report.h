// The report as one HTML page: tables, throughput-latency curves and CDFs as inline SVG. It loads nothing.
#pragma once

#include <string>
#include <vector>

#include "clients/bench/json_report.h"
#include "clients/bench/summary.h"

namespace minitron::bench {

struct ReportedRun {
  RunResult run;
  Summary summary;
};

std::string HtmlReport(const ReportContext& context, const std::vector<ReportedRun>& runs);

// &, <, > and both quotes as entities.
std::string EscapeHtml(const std::string& text);

}  // namespace minitron::bench
