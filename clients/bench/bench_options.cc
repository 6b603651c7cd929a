#include "clients/bench/bench_options.h"

#include <cmath>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "clients/cpp/security.h"

namespace minitron::bench {
namespace {

using client::Arguments;
using client::UsageError;
using Result = std::optional<UsageError>;

Result ReadUint(const Arguments& arguments, const std::string& name, uint64_t low, uint64_t high, uint64_t* value) {
  if (!arguments.Has(name)) return std::nullopt;
  uint64_t read = 0;
  const std::string text = arguments.Get(name);
  if (!client::ParseUint(text, high, &read) || read < low) {
    return UsageError{absl::StrCat("--", name, " \"", text, "\" is not a whole number in [", low, ", ", high, "]")};
  }
  *value = read;
  return std::nullopt;
}

Result ReadUint(const Arguments& arguments, const std::string& name, uint64_t low, uint64_t high, uint32_t* value) {
  uint64_t wide = *value;
  if (auto error = ReadUint(arguments, name, low, high, &wide)) return error;
  *value = static_cast<uint32_t>(wide);
  return std::nullopt;
}

bool InRange(const std::string& text, double low, double high, double* value) {
  double read = 0;
  if (!absl::SimpleAtod(text, &read) || !(read >= low && read <= high)) return false;
  *value = read;
  return true;
}

Result ReadDouble(const Arguments& arguments, const std::string& name, double low, double high, double* value) {
  if (!arguments.Has(name) || InRange(arguments.Get(name), low, high, value)) return std::nullopt;
  return UsageError{
      absl::StrCat("--", name, " \"", arguments.Get(name), "\" is not a number in [", low, ", ", high, "]")};
}

Result ReadOneOf(const Arguments& arguments, const std::string& name, const std::vector<std::string>& choices,
                 std::string* value) {
  if (!arguments.Has(name)) return std::nullopt;
  *value = arguments.Get(name);
  std::string all;
  for (const std::string& choice : choices) {
    if (choice == *value) return std::nullopt;
    absl::StrAppend(&all, all.empty() ? "" : ", ", choice);
  }
  return UsageError{absl::StrCat("--", name, " \"", *value, "\" is none of ", all)};
}

Result ReadPrompts(const Arguments& arguments, BenchOptions* options) {
  constexpr uint64_t kMaxTokens = 1u << 20;
  DatasetOptions& prompts = options->prompts;
  prompts.count = 100;
  uint64_t count = prompts.count;
  if (auto error = ReadOneOf(arguments, "dataset", {"random", "shared-prefix", "sharegpt", "jsonl", "mooncake"},
                             &options->dataset)) {
    return error;
  }
  options->dataset_path = arguments.Get("dataset-path");
  const bool from_file = options->dataset != "random" && options->dataset != "shared-prefix";
  if (from_file && options->dataset_path.empty())
    return UsageError{"--dataset " + options->dataset + " needs --dataset-path"};
  if (!from_file && !options->dataset_path.empty()) {
    return UsageError{"--dataset-path goes with --dataset sharegpt, jsonl or mooncake"};
  }
  if (auto error = ReadUint(arguments, "num-prompts", 1, 10'000'000, &count)) return error;
  prompts.count = count;
  if (auto error = ReadUint(arguments, "seed", 0, UINT64_MAX, &prompts.seed)) return error;
  if (auto error = ReadUint(arguments, "input-len", 1, kMaxTokens, &prompts.input_tokens)) return error;
  if (auto error = ReadUint(arguments, "output-len", 1, kMaxTokens, &prompts.output_tokens)) return error;
  if (auto error = ReadDouble(arguments, "range-ratio", 0, 0.99, &prompts.range_ratio)) return error;
  if (auto error = ReadUint(arguments, "num-prefixes", 1, 1'000'000, &prompts.num_prefixes)) return error;
  if (auto error = ReadUint(arguments, "prefix-len", 1, kMaxTokens, &prompts.prefix_tokens)) return error;
  if (auto error = ReadUint(arguments, "trace-block", 1, kMaxTokens, &prompts.trace_block)) return error;
  if (auto error = ReadUint(arguments, "max-input-len", 1, kMaxTokens, &prompts.max_input_tokens)) return error;
  if (auto error = ReadUint(arguments, "vocab-size", 1, 1u << 24, &prompts.vocab_size)) return error;
  prompts.fixed_output = arguments.Has("output-len");
  return std::nullopt;
}

Result ReadDriver(const Arguments& arguments, BenchOptions* options) {
  DriverOptions& driver = options->driver;
  if (auto error = ReadOneOf(arguments, "protocol", {"native", "oip", "vllm", "openai"}, &options->protocol))
    return error;
  driver.target = arguments.Get("server");
  if (driver.target.empty()) return UsageError{"--server HOST:PORT says what to put under load; there is no default"};
  driver.model = arguments.Get("model");
  driver.seed = options->prompts.seed;
  driver.ignore_eos = !arguments.Has("stop-at-eos");
  uint32_t connections = 1;
  if (auto error = ReadUint(arguments, "connections", 1, 1024, &connections)) return error;
  driver.connections = static_cast<int>(connections);
  if (auto error = ReadDouble(arguments, "temperature", 0, 2, &driver.temperature)) return error;
  if (auto error = ReadDouble(arguments, "timeout", 0.001, 1e6, &driver.timeout_s)) return error;
  return client::ReadMetadata(arguments, &driver.metadata);
}

Result ReadPlans(const Arguments& arguments, BenchOptions* options) {
  uint64_t limit = 0;
  if (auto error = ReadUint(arguments, "max-concurrency", 1, 1'000'000, &limit)) return error;
  if (auto error = ReadDouble(arguments, "burstiness", 0.01, 1000, &options->arrivals.burstiness)) return error;
  if (auto error = ReadDouble(arguments, "ramp-to", 1e-3, 1e6, &options->arrivals.final_rate)) return error;
  if (auto error = ReadDouble(arguments, "time-scale", 1e-3, 1e3, &options->time_scale)) return error;
  options->arrivals.seed = options->prompts.seed;
  options->replay = arguments.Has("replay");
  const int ways = arguments.Has("concurrency") + arguments.Has("request-rate") + options->replay;
  if (ways != 1) return UsageError{"exactly one of --concurrency, --request-rate and --replay is needed"};
  if (!arguments.Has("request-rate") && (arguments.Has("burstiness") || arguments.Has("ramp-to"))) {
    return UsageError{"--burstiness and --ramp-to go with --request-rate"};
  }
  if (options->replay) {
    if (options->dataset != "jsonl" && options->dataset != "mooncake") {
      return UsageError{"--replay goes with --dataset jsonl or mooncake"};
    }
    options->plans.push_back({"trace", 0, limit});
    return std::nullopt;
  }
  const bool closed = arguments.Has("concurrency");
  const std::string name = closed ? "concurrency" : "request-rate";
  for (const absl::string_view part : absl::StrSplit(arguments.Get(name), ',')) {
    const std::string text(part);
    double value = 0;
    if (!InRange(text, closed ? 1 : 1e-3, 1e6, &value) || (closed && value != std::floor(value))) {
      return UsageError{absl::StrCat("--", name, " \"", text, "\" is not a ",
                                     closed ? "whole number in [1" : "number in [0.001", ", 1000000]")};
    }
    if (closed) {
      options->plans.push_back({absl::StrCat("concurrency ", text), 0, static_cast<size_t>(value)});
    } else {
      std::string label =
          absl::StrCat(text, arguments.Has("ramp-to") ? " to " + arguments.Get("ramp-to") : "", " requests/s");
      options->plans.push_back({std::move(label), value, limit});
    }
  }
  return std::nullopt;
}

// Without what it shares with other programs.
client::CommandSpec OwnSpec() {
  return {
      "",
      "",
      "Puts a server under load and reports its latencies. Nothing is sent to anything but --server.",
      0,
      {
          {"server", "HOST:PORT", "the server; required"},
          {"protocol", "NAME",
           "native, oip (Open Inference, Triton), vllm (its gRPC) or openai (HTTP); default native"},
          {"model", "NAME", "the model; native, vllm: default the served one; else required"},
          {"num-prompts", "N", "requests of each run; default 100"},
          {"concurrency", "N,...", "closed loop: so many requests at once; several make a sweep"},
          {"request-rate", "R,...", "requests per second, at random times; several make a sweep"},
          {"burstiness", "X", "shape of the gaps' gamma distribution; 1 (Poisson) is the default, less is burstier"},
          {"ramp-to", "R", "the request rate moves linearly to R over the run"},
          {"replay", "", "send at the times of the data set"},
          {"time-scale", "X", "stretch the times of the data set; default 1"},
          {"max-concurrency", "N", "with a rate or a replay: never more at once"},
          {"dataset", "NAME", "random, shared-prefix, sharegpt, jsonl or mooncake; default random"},
          {"dataset-path", "FILE", "of the last three"},
          {"input-len", "N", "prompt tokens of random and shared-prefix; default 128"},
          {"output-len", "N", "tokens to generate; default 64, or what a file says"},
          {"range-ratio", "X", "lengths vary by this share; default 0"},
          {"num-prefixes", "N", "shared-prefix: different prefixes; default 1"},
          {"prefix-len", "N", "shared-prefix: tokens in front of --input-len; default 128"},
          {"trace-block", "N", "mooncake: tokens per hash id; default 512"},
          {"max-input-len", "N", "cut longer prompts of a file, or leave texts out"},
          {"vocab-size", "N", "openai: send random prompts as ids below N; default: as text"},
          {"temperature", "X", "default 0"},
          {"stop-at-eos", "", "let the model end early; default: it generates the full length"},
          {"timeout", "SECONDS", "of each request; default none"},
          {"connections", "N", "gRPC connections; default 1"},
          {"metadata", "KEY=VALUE", "header of each request (repeatable)"},
          {"warmup", "N", "requests in front that count nowhere; default 0"},
          {"seed", "N", "of prompts, arrivals and sampling; default 0"},
          {"goodput", "LIMITS", "count requests within limits in ms, e.g. ttft:200,tpot:30,e2el:5000"},
          {"result", "FILE", "append one JSON object per run, with the keys of vLLM's benchmark"},
          {"detailed", "", "with --result: every request's times too"},
          {"report", "FILE", "write an HTML page with curves; it opens offline"},
          {"json", "", "print the JSON instead of the table"},
          {"quiet", "", "no progress"},
          {"help", "", "this text"},
      }};
}

}  // namespace

const client::CommandSpec& BenchSpec() {
  static const client::CommandSpec kSpec = [] {
    client::CommandSpec spec = OwnSpec();
    const std::vector<client::OptionSpec>& security = client::SecurityOptions();
    spec.options.insert(spec.options.end(), security.begin(), security.end());
    return spec;
  }();
  return kSpec;
}

Result ReadBenchOptions(const Arguments& arguments, BenchOptions* options) {
  if (auto error = ReadPrompts(arguments, options)) return error;
  if (auto error = ReadDriver(arguments, options)) return error;
  if (auto error = ReadPlans(arguments, options)) return error;
  const bool asks = options->protocol == "native" || options->protocol == "vllm";
  if (!asks && options->driver.model.empty()) {
    return UsageError{"--protocol " + options->protocol + " needs --model"};
  }
  if (arguments.Has("vocab-size") && options->protocol != "openai") {
    return UsageError{"--vocab-size goes with --protocol openai"};
  }
  uint64_t warmup = 0;
  if (auto error = ReadUint(arguments, "warmup", 0, 1'000'000, &warmup)) return error;
  options->warmup = warmup;
  if (arguments.Has("goodput") && !ParseTargets(arguments.Get("goodput"), &options->targets)) {
    return UsageError{"--goodput \"" + arguments.Get("goodput") + "\" is not ttft:MS,tpot:MS,e2el:MS"};
  }
  options->result_path = arguments.Get("result");
  options->report_path = arguments.Get("report");
  options->detailed = arguments.Has("detailed");
  options->quiet = arguments.Has("quiet");
  return std::nullopt;
}

}  // namespace minitron::bench
