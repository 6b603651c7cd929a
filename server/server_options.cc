#include "server/server_options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <functional>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/json.h"
#include "server/small_file.h"

namespace minitron::server {
namespace {

// A flag: where its value goes and what it may be. Exactly one of the four targets is set.
struct Flag {
  const char* name;
  const char* help;
  std::string ServerOptions::*text = nullptr;
  int ServerOptions::*integer = nullptr;
  double ServerOptions::*seconds = nullptr;
  bool ServerOptions::*toggle = nullptr;
  double min = 0;
  double max = 0;
};

Flag Text(const char* name, std::string ServerOptions::*target, const char* help) { return {name, help, target}; }
Flag Int(const char* name, int ServerOptions::*target, int min, int max, const char* help) {
  return {name, help, nullptr, target, nullptr, nullptr, static_cast<double>(min), static_cast<double>(max)};
}
Flag Seconds(const char* name, double ServerOptions::*target, double min, double max, const char* help) {
  return {name, help, nullptr, nullptr, target, nullptr, min, max};
}
Flag Switch(const char* name, bool ServerOptions::*target, const char* help) {
  return {name, help, nullptr, nullptr, nullptr, target};
}

const std::vector<Flag>& Flags() {
  using O = ServerOptions;
  static const std::vector<Flag> kFlags = {
      Text("model", &O::model, "model folder; default: the model that ships with the server"),
      Text("served-model-name", &O::served_model_name, "name clients use; default: the folder's name"),
      Text("tokenizer-sha256", &O::tokenizer_sha256, "SHA-256 that tokenizer.model must have; another one is refused"),
      Text("host", &O::host, "address to listen on, for gRPC and metrics"),
      Int("port", &O::port, 0, 65535, "gRPC port; 0 picks a free one"),
      Int("metrics-port", &O::metrics_port, 0, 65535, "HTTP port of /metrics; 0 picks a free one"),
      Text("port-file", &O::port_file, "file to write both ports to when ready"),
      Text("backend", &O::backend, "auto, cpu or cuda"),
      Text("quantize", &O::quantize,
           "weights: none (as loaded), int8, int4, fp8 (GPU) or fp8-dynamic (GPU; activations in 8 bits too)"),
      Text("kv-cache-dtype", &O::kv_cache_dtype, "element type of the KV cache: bf16, fp32 (CPU) or fp8 (GPU)"),
      Text("activation-dtype", &O::activation_dtype,
           "rows that bf16 weights are multiplied with: bf16, fp32 (CPU) or auto: on a CPU bf16 where it multiplies "
           "bf16, "
           "else fp32"),
      Text("cache-dir", &O::cache_dir,
           "folder of packed weights, on a GPU of timed products; default: the model's (weights: from 256 MiB on)"),
      Int("threads", &O::threads, 0, 1024, "CPU threads; 0 means one per physical core"),
      Int("kv-cache-mib", &O::kv_cache_mib, 0, 1 << 20, "KV-cache size in MiB; 0 sizes it from free memory"),
      Int("block-size", &O::block_size, 8, 256, "tokens per KV block, a power of two"),
      Int("max-num-sequences", &O::max_num_sequences, 1, 4096, "sequences that run at once"),
      Int("max-step-tokens", &O::max_step_tokens, 1, 65536, "tokens computed per step"),
      Int("max-prefill-chunk", &O::max_prefill_chunk, 1, 65536, "prompt tokens of one request per step"),
      Int("max-context-tokens", &O::max_context_tokens, 0, 1 << 20, "prompt and completion together; 0: the model's"),
      Int("max-queued-requests", &O::max_queued_requests, 1, 1 << 20, "sequences that wait; more are refused"),
      Text("prefix-cache", &O::prefix_cache, "who shares cached prompts: off, tenant or shared (all)"),
      Text("admission-mode", &O::admission_mode, "optimistic (may preempt) or reserve (memory for max_tokens)"),
      Text("overlap", &O::overlap, "plan a step while the one before runs: auto, on or off"),
      Int("max-queued-tokens", &O::max_queued_tokens, 1, 1 << 30, "prompt tokens that wait; more are refused"),
      Int("max-queued-mib", &O::max_queued_mib, 1, 1 << 20, "memory of requests that wait, in MiB; more are refused"),
      Seconds("itl-target", &O::itl_target_ms, 0, 60000,
              "ms between tokens that prompts leave to running streams; 0: off"),
      Seconds("priority-wait-bound", &O::priority_wait_bound_s, 0.001, 86400,
              "seconds after which a passed-over priority gets a turn"),
      Int("default-max-tokens", &O::default_max_tokens, 1, 1 << 20, "tokens to generate when a request does not say"),
      Int("max-receive-mib", &O::max_receive_mib, 1, 256, "largest request message in MiB"),
      Seconds("drain-timeout", &O::drain_timeout_s, 0, 86400, "seconds running requests get to finish on SIGTERM"),
      Seconds("drain-delay", &O::drain_delay_s, 0, 3600, "seconds between not ready and refusing, on SIGTERM"),
      Seconds("write-stall-timeout", &O::write_stall_timeout_s, 0.01, 86400, "seconds a client may not read"),
      Seconds("max-request-timeout", &O::max_request_timeout_s, 0.01, 86400, "longest deadline of a request, seconds"),
      Text("config", &O::config, "JSON file with options by name; flags and environment count before it"),
      Text("tls-cert", &O::tls_cert, "PEM certificate chain; with --tls-key turns TLS on; re-read when it changes"),
      Text("tls-key", &O::tls_key, "PEM private key of --tls-cert"),
      Text("tls-client-ca", &O::tls_client_ca, "PEM authorities; clients must then show a certificate of one"),
      Text("auth-file", &O::auth_file, "JSON file of tokens, roles and tenants; turns authentication on"),
      Text("audit-log", &O::audit_log, "file that gets one JSON line per call"),
      Text("log-format", &O::log_format, "text or json"),
      Text("metrics-compat", &O::metrics_compat, "none, or vllm: also the names that tools for vLLM read"),
      Int("health-port", &O::health_port, -1, 65535, "plaintext port for health checks alone; 0 any free, -1 none"),
      Int("max-connections", &O::max_connections, 0, 1 << 20, "open connections; 0: half the descriptor limit"),
      Int("max-connections-per-address", &O::max_connections_per_address, 0, 1 << 20, "of one client; 0: no limit"),
      Seconds("handshake-timeout", &O::handshake_timeout_s, 0.1, 600, "seconds until a connection must speak HTTP/2"),
      Seconds("hang-timeout", &O::hang_timeout_s, 0.1, 86400, "seconds without an engine step that count as hung"),
      Seconds("memory-mark", &O::memory_mark, 0.1, 1, "fraction of the memory limit above which it is not ready"),
      Switch("self-test", &O::self_test, "run the model on a fixed prompt before ready"),
      Switch("reflection", &O::reflection, "gRPC server reflection; with --auth-file for known tokens only"),
      Switch("channelz", &O::channelz, "gRPC channelz; with --auth-file for the role admin only"),
      Int("http-port", &O::http_port, -1, 65535, "OpenAI-compatible HTTP port; 0 any free, -1 none"),
      Text("http-host", &O::http_host, "address of the HTTP port; it is not encrypted: beyond the machine use a proxy"),
      Int("http-threads", &O::http_threads, 1, 1024, "HTTP requests answered at once; more wait"),
      Text("chat-template", &O::chat_template, "none or nemotron-mini: how /v1/chat/completions makes a prompt"),
      Switch("open-inference", &O::open_inference, "Open Inference Protocol (Triton's clients) on the gRPC port"),
      Switch("vllm-grpc", &O::vllm_grpc, "vLLM's gRPC APIs (its gateways) on the gRPC port"),
      Switch("add-bos", &O::add_bos, "prepend BOS to text prompts unless a request says otherwise"),
      Switch("help", &O::show_help, "print this and exit"),
      Switch("version", &O::show_version, "print the version and exit"),
  };
  return kFlags;
}

const Flag* FindFlag(const std::string& name) {
  for (const Flag& flag : Flags()) {
    if (name == flag.name) return &flag;
  }
  return nullptr;
}

std::string Number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.12g", value);
  return text;
}

// An option somebody gave: `shown` is how they wrote its name.
struct Given {
  const Flag* flag;
  std::string value;
  std::string shown;
};

absl::Status BadValue(const std::string& shown, const std::string& value, const std::string& problem) {
  return absl::InvalidArgumentError(absl::StrCat(shown, "=", value, ": ", problem));
}

absl::Status SetNumber(const Given& given, ServerOptions& options) {
  const Flag& flag = *given.flag;
  const std::string& value = given.value;
  double number = 0;
  const std::string range = absl::StrCat("[", Number(flag.min), ", ", Number(flag.max), "]");
  if (flag.integer != nullptr) {
    int whole = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), whole);
    if (end != value.data() + value.size() || error != std::errc()) {
      return BadValue(given.shown, value, absl::StrCat("not an integer in ", range));
    }
    number = whole;
  } else if (!absl::SimpleAtod(value, &number) || !std::isfinite(number)) {
    return BadValue(given.shown, value, absl::StrCat("not a number in ", range));
  }
  if (number < flag.min || number > flag.max) return BadValue(given.shown, value, absl::StrCat("outside ", range));
  if (flag.integer != nullptr) {
    options.*flag.integer = static_cast<int>(number);
  } else {
    options.*flag.seconds = number;
  }
  return absl::OkStatus();
}

absl::Status Set(const Given& given, const char* source, ServerOptions& options) {
  const Flag& flag = *given.flag;
  options.sources[flag.name] = source;
  if (flag.text == nullptr && flag.toggle == nullptr) return SetNumber(given, options);
  if (flag.toggle != nullptr) {
    if (given.value != "true" && given.value != "false") {
      return BadValue(given.shown, given.value, "not true or false");
    }
    options.*flag.toggle = given.value == "true";
    return absl::OkStatus();
  }
  if (given.value.empty()) return BadValue(given.shown, given.value, "is empty");
  options.*flag.text = given.value;
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Given>> ReadArguments(const std::vector<std::string>& arguments) {
  std::vector<Given> result;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument.rfind("--", 0) != 0) {
      return absl::InvalidArgumentError(absl::StrCat("\"", argument, "\" is not a flag; see --help"));
    }
    const size_t equals = argument.find('=');
    std::string name = argument.substr(2, equals == std::string::npos ? equals : equals - 2);
    const Flag* flag = FindFlag(name);
    const bool negated = flag == nullptr && name.rfind("no-", 0) == 0 && equals == std::string::npos;
    if (negated) flag = FindFlag(name.substr(3));
    if (flag == nullptr || (negated && flag->toggle == nullptr)) {
      return absl::InvalidArgumentError(absl::StrCat("unknown flag --", name, "; see --help"));
    }
    std::string value;
    if (equals != std::string::npos) {
      value = argument.substr(equals + 1);
    } else if (flag->toggle != nullptr) {
      value = negated ? "false" : "true";
    } else if (++i < arguments.size()) {
      value = arguments[i];
    } else {
      return absl::InvalidArgumentError(absl::StrCat("--", name, " needs a value"));
    }
    result.push_back({flag, std::move(value), absl::StrCat("--", flag->name)});
  }
  return result;
}

absl::StatusOr<std::vector<Given>> ReadEnvironment(const std::vector<std::string>& environment) {
  std::vector<Given> result;
  const std::string prefix = "MINITRON_SERVER_";
  for (const std::string& variable : environment) {
    if (variable.rfind(prefix, 0) != 0) continue;
    const size_t equals = variable.find('=');
    const std::string shown = variable.substr(0, equals);
    std::string name = absl::AsciiStrToLower(shown.substr(prefix.size()));
    std::replace(name.begin(), name.end(), '_', '-');
    const Flag* flag = FindFlag(name);
    if (flag == nullptr) return absl::InvalidArgumentError(absl::StrCat("unknown variable ", shown, "; see --help"));
    result.push_back({flag, equals == std::string::npos ? "" : variable.substr(equals + 1), shown});
  }
  return result;
}

absl::StatusOr<std::vector<Given>> ReadConfigFile(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, 1 << 20));
  engine::JsonValue root;
  std::string error;
  if (!engine::ParseJson(text.data(), static_cast<int64_t>(text.size()), {}, &root, &error)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", error));
  }
  if (!root.is(engine::JsonValue::Type::kObject)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a JSON object"));
  }
  std::vector<Given> result;
  for (size_t i = 0; i < root.keys.size(); ++i) {
    const std::string shown = absl::StrCat(path, ": ", root.keys[i]);
    const Flag* flag = FindFlag(root.keys[i]);
    if (flag == nullptr || root.keys[i] == "config") {
      return absl::InvalidArgumentError(absl::StrCat(shown, ": unknown key; see --help"));
    }
    const engine::JsonValue& value = root.items[i];
    const bool is_text = value.is(engine::JsonValue::Type::kString);
    result.push_back({flag, is_text ? value.string : value.Describe(), shown});
  }
  return result;
}

absl::Status CheckOneOf(const char* name, const std::string& value, const std::vector<std::string>& allowed) {
  if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return absl::OkStatus();
  return BadValue(absl::StrCat("--", name), value, absl::StrCat("not one of ", absl::StrJoin(allowed, ", ")));
}

absl::Status CheckTls(const ServerOptions& options) {
  if (options.tls_cert.empty() != options.tls_key.empty()) {
    return absl::InvalidArgumentError("--tls-cert and --tls-key: one without the other");
  }
  if (!options.tls_client_ca.empty() && options.tls_cert.empty()) {
    return absl::InvalidArgumentError("--tls-client-ca needs --tls-cert and --tls-key");
  }
  return absl::OkStatus();
}

// Lower case alone, so that what a log shows can be compared by eye.
absl::Status CheckDigest(const char* name, const std::string& value) {
  const auto is_hex = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
  if (value.empty() || (value.size() == 64 && std::all_of(value.begin(), value.end(), is_hex))) return absl::OkStatus();
  return BadValue(absl::StrCat("--", name), value, "not 64 lower-case hex digits");
}

absl::Status CheckTogether(const ServerOptions& options) {
  if ((options.block_size & (options.block_size - 1)) != 0) {
    return BadValue("--block-size", absl::StrCat(options.block_size), "not a power of two in [8, 256]");
  }
  RETURN_IF_ERROR(CheckOneOf("backend", options.backend, {"auto", "cpu", "cuda"}));
  RETURN_IF_ERROR(CheckOneOf("prefix-cache", options.prefix_cache, {"off", "tenant", "shared"}));
  RETURN_IF_ERROR(CheckOneOf("admission-mode", options.admission_mode, {"optimistic", "reserve"}));
  RETURN_IF_ERROR(CheckOneOf("overlap", options.overlap, {"auto", "on", "off"}));
  RETURN_IF_ERROR(CheckOneOf("quantize", options.quantize, {"none", "int8", "int4", "fp8", "fp8-dynamic"}));
  RETURN_IF_ERROR(CheckOneOf("kv-cache-dtype", options.kv_cache_dtype, {"bf16", "fp32", "fp8"}));
  RETURN_IF_ERROR(CheckOneOf("activation-dtype", options.activation_dtype, {"auto", "fp32", "bf16"}));
  RETURN_IF_ERROR(CheckOneOf("log-format", options.log_format, {"text", "json"}));
  RETURN_IF_ERROR(CheckOneOf("metrics-compat", options.metrics_compat, {"none", "vllm"}));
  RETURN_IF_ERROR(CheckOneOf("chat-template", options.chat_template, {"none", "nemotron-mini"}));
  RETURN_IF_ERROR(CheckDigest("tokenizer-sha256", options.tokenizer_sha256));
  RETURN_IF_ERROR(CheckTls(options));
  if (options.max_step_tokens < options.max_num_sequences) {
    return BadValue("--max-step-tokens", absl::StrCat(options.max_step_tokens),
                    absl::StrCat("below --max-num-sequences=", options.max_num_sequences,
                                 ": every running sequence needs a token per step"));
  }
  if (options.port != 0 && options.port == options.metrics_port) {
    return BadValue("--metrics-port", absl::StrCat(options.metrics_port), "the same as --port");
  }
  if (options.http_port > 0 && (options.http_port == options.port || options.http_port == options.metrics_port ||
                                options.http_port == options.health_port)) {
    return BadValue("--http-port", absl::StrCat(options.http_port), "the same as another port");
  }
  if (options.health_port > 0 && (options.health_port == options.port || options.health_port == options.metrics_port)) {
    return BadValue("--health-port", absl::StrCat(options.health_port), "the same as another port");
  }
  return absl::OkStatus();
}

std::string ValueOf(const Flag& flag, const ServerOptions& options) {
  if (flag.integer != nullptr) return absl::StrCat(options.*flag.integer);
  if (flag.seconds != nullptr) return Number(options.*flag.seconds);
  if (flag.toggle != nullptr) return options.*flag.toggle ? "true" : "false";
  return options.*flag.text;
}

}  // namespace

engine::Backend ServerOptions::backend_kind() const {
  if (backend == "cpu") return engine::Backend::kCpu;
  if (backend == "cuda") return engine::Backend::kCuda;
  return engine::Backend::kAuto;
}

engine::Quantization ServerOptions::quantization() const {
  if (quantize == "int8") return engine::Quantization::kInt8;
  if (quantize == "int4") return engine::Quantization::kInt4;
  if (quantize == "fp8") return engine::Quantization::kFp8;
  if (quantize == "fp8-dynamic") return engine::Quantization::kFp8Dynamic;
  return engine::Quantization::kOff;
}

engine::ActivationType ServerOptions::activation_type() const {
  if (activation_dtype == "fp32") return engine::ActivationType::kF32;
  if (activation_dtype == "bf16") return engine::ActivationType::kBf16;
  return engine::ActivationType::kAuto;
}

engine::KvCacheType ServerOptions::kv_cache_type() const {
  if (kv_cache_dtype == "fp32") return engine::KvCacheType::kF32;
  if (kv_cache_dtype == "fp8") return engine::KvCacheType::kFp8;
  return engine::KvCacheType::kBf16;
}

absl::StatusOr<ServerOptions> ParseServerOptions(const std::vector<std::string>& arguments,
                                                 const std::vector<std::string>& environment) {
  ASSIGN_OR_RETURN(const std::vector<Given> flags, ReadArguments(arguments));
  ASSIGN_OR_RETURN(const std::vector<Given> variables, ReadEnvironment(environment));
  ServerOptions options;
  std::string path;
  for (const auto* given : {&variables, &flags}) {
    for (const Given& one : *given) path = std::string(one.flag->name) == "config" ? one.value : path;
  }
  std::vector<Given> file;
  if (!path.empty()) {
    ASSIGN_OR_RETURN(file, ReadConfigFile(path));
  }
  for (const Given& given : file) RETURN_IF_ERROR(Set(given, "file", options));
  for (const Given& given : variables) RETURN_IF_ERROR(Set(given, "environment", options));
  for (const Given& given : flags) RETURN_IF_ERROR(Set(given, "flag", options));
  RETURN_IF_ERROR(CheckTogether(options));
  return options;
}

base::LogFields DescribeOptions(const ServerOptions& options) {
  base::LogFields fields;
  for (const Flag& flag : Flags()) {
    const auto source = options.sources.find(flag.name);
    if (source == options.sources.end()) continue;
    fields.emplace_back(flag.name, absl::StrCat(ValueOf(flag, options), " (", source->second, ")"));
  }
  return fields;
}

std::string ServerOptionsHelp() {
  std::string help =
      "minitron-server: serves a Nemotron model over gRPC.\n\nFlags (--flag=value or --flag value), also as "
      "MINITRON_SERVER_FLAG=value, or in a JSON file by name:\n";
  for (const Flag& flag : Flags()) {
    std::string left = absl::StrCat("  --", flag.name);
    const std::string fallback = ValueOf(flag, ServerOptions());
    if (!fallback.empty()) absl::StrAppend(&left, "=", fallback);
    if (left.size() < 34) left.resize(34, ' ');
    absl::StrAppend(&help, left, " ", flag.help, "\n");
  }
  return help;
}

std::string FindDefaultModel(const std::string& executable) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::path program = fs::canonical(executable, error);
  if (error) return "";
  const fs::path folder = program.parent_path();  // <prefix>/bin, or <source>/build/<preset>/bin
  for (const fs::path& candidate :
       {folder / "../share/minitron/models/minitron-tiny", folder / "../../../deploy/models/minitron-tiny"}) {
    if (fs::is_directory(candidate, error)) return fs::canonical(candidate, error).string();
  }
  return "";
}

}  // namespace minitron::server
