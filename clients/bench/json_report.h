// A run as one line of JSON, with the keys of vLLM's serving benchmark, so that its plot and compare scripts read it.
#pragma once

#include <string>

#include "clients/bench/summary.h"

namespace minitron::bench {

// What all runs of one command have in common.
struct ReportContext {
  std::string date;      // "20261124-101500", UTC
  std::string protocol;  // native, oip, vllm, openai
  std::string target;
  std::string model;
  std::string dataset;
  uint64_t seed = 0;
  Targets targets;
  bool detailed = false;  // JSON: also every request's times
};

// Ends with a newline. Holds no prompt and no output.
std::string JsonLine(const ReportContext& context, const RunResult& run, const Summary& summary);

// The same as a table for a terminal.
std::string TextReport(const ReportContext& context, const RunResult& run, const Summary& summary);

}  // namespace minitron::bench
