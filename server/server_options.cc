#include "server/server_options.h"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <functional>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

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
      Text("host", &O::host, "address to listen on, for gRPC and metrics"),
      Int("port", &O::port, 0, 65535, "gRPC port; 0 picks a free one"),
      Int("metrics-port", &O::metrics_port, 0, 65535, "HTTP port of /metrics; 0 picks a free one"),
      Text("port-file", &O::port_file, "file to write both ports to when ready"),
      Text("backend", &O::backend, "auto, cpu or cuda"),
      Text("quantize", &O::quantize, "weights on the CPU: none (as loaded), int8 or int4"),
      Int("threads", &O::threads, 0, 1024, "CPU threads; 0 means one per core"),
      Int("kv-cache-mib", &O::kv_cache_mib, 0, 1 << 20, "KV-cache size in MiB; 0 sizes it from free memory"),
      Int("block-size", &O::block_size, 8, 256, "tokens per KV block, a power of two"),
      Int("max-num-sequences", &O::max_num_sequences, 1, 4096, "sequences that run at once"),
      Int("max-step-tokens", &O::max_step_tokens, 1, 65536, "tokens computed per step"),
      Int("max-prefill-chunk", &O::max_prefill_chunk, 1, 65536, "prompt tokens of one request per step"),
      Int("max-context-tokens", &O::max_context_tokens, 0, 1 << 20, "prompt and completion together; 0: the model's"),
      Int("max-queued-requests", &O::max_queued_requests, 1, 1 << 20, "sequences that wait; more are refused"),
      Int("default-max-tokens", &O::default_max_tokens, 1, 1 << 20, "tokens to generate when a request does not say"),
      Int("max-receive-mib", &O::max_receive_mib, 1, 256, "largest request message in MiB"),
      Seconds("drain-timeout", &O::drain_timeout_s, 0, 86400, "seconds running requests get to finish on SIGTERM"),
      Seconds("drain-delay", &O::drain_delay_s, 0, 3600, "seconds between not ready and refusing, on SIGTERM"),
      Seconds("write-stall-timeout", &O::write_stall_timeout_s, 0.01, 86400, "seconds a client may not read"),
      Seconds("max-request-timeout", &O::max_request_timeout_s, 0.01, 86400, "longest deadline of a request, seconds"),
      Switch("reflection", &O::reflection, "gRPC server reflection"),
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

absl::Status BadValue(const Flag& flag, const std::string& value, const std::string& problem) {
  return absl::InvalidArgumentError(absl::StrCat("--", flag.name, "=", value, ": ", problem));
}

absl::Status SetNumber(const Flag& flag, const std::string& value, ServerOptions& options) {
  double number = 0;
  if (flag.integer != nullptr) {
    int whole = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), whole);
    if (end != value.data() + value.size() || error != std::errc()) {
      return BadValue(flag, value, absl::StrCat("not an integer in [", Number(flag.min), ", ", Number(flag.max), "]"));
    }
    number = whole;
  } else if (!absl::SimpleAtod(value, &number) || !std::isfinite(number)) {
    return BadValue(flag, value, absl::StrCat("not a number in [", Number(flag.min), ", ", Number(flag.max), "]"));
  }
  if (number < flag.min || number > flag.max) {
    return BadValue(flag, value, absl::StrCat("outside [", Number(flag.min), ", ", Number(flag.max), "]"));
  }
  if (flag.integer != nullptr) {
    options.*flag.integer = static_cast<int>(number);
  } else {
    options.*flag.seconds = number;
  }
  return absl::OkStatus();
}

absl::Status SetSwitch(const Flag& flag, const std::string& value, ServerOptions& options) {
  if (value != "true" && value != "false") return BadValue(flag, value, "not true or false");
  options.*flag.toggle = value == "true";
  return absl::OkStatus();
}

absl::Status Set(const Flag& flag, const std::string& value, ServerOptions& options) {
  if (flag.toggle != nullptr) return SetSwitch(flag, value, options);
  if (flag.text == nullptr) return SetNumber(flag, value, options);
  if (value.empty()) return BadValue(flag, value, "is empty");
  options.*flag.text = value;
  return absl::OkStatus();
}

absl::Status CheckTogether(const ServerOptions& options) {
  if ((options.block_size & (options.block_size - 1)) != 0) {
    return BadValue(*FindFlag("block-size"), absl::StrCat(options.block_size), "not a power of two in [8, 256]");
  }
  if (options.backend != "auto" && options.backend != "cpu" && options.backend != "cuda") {
    return BadValue(*FindFlag("backend"), options.backend, "not one of auto, cpu, cuda");
  }
  if (options.quantize != "none" && options.quantize != "int8" && options.quantize != "int4") {
    return BadValue(*FindFlag("quantize"), options.quantize, "not one of none, int8, int4");
  }
  if (options.max_step_tokens < options.max_num_sequences) {
    return BadValue(*FindFlag("max-step-tokens"), absl::StrCat(options.max_step_tokens),
                    absl::StrCat("below --max-num-sequences=", options.max_num_sequences,
                                 ": every running sequence needs a token per step"));
  }
  if (options.port != 0 && options.port == options.metrics_port) {
    return BadValue(*FindFlag("metrics-port"), absl::StrCat(options.metrics_port), "the same as --port");
  }
  return absl::OkStatus();
}

std::string DefaultOf(const Flag& flag) {
  const ServerOptions defaults;
  if (flag.integer != nullptr) return absl::StrCat(defaults.*flag.integer);
  if (flag.seconds != nullptr) return Number(defaults.*flag.seconds);
  if (flag.toggle != nullptr) return defaults.*flag.toggle ? "true" : "false";
  return defaults.*flag.text;
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
  return engine::Quantization::kOff;
}

absl::StatusOr<ServerOptions> ParseServerOptions(const std::vector<std::string>& arguments) {
  ServerOptions options;
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
    RETURN_IF_ERROR(Set(*flag, value, options));
  }
  RETURN_IF_ERROR(CheckTogether(options));
  return options;
}

std::string ServerOptionsHelp() {
  std::string help = "minitron-server: serves a Nemotron model over gRPC.\n\nFlags (--flag=value or --flag value):\n";
  for (const Flag& flag : Flags()) {
    std::string left = absl::StrCat("  --", flag.name);
    const std::string fallback = DefaultOf(flag);
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
