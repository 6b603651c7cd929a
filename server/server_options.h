// Options of minitron-server: flags, environment and one file, validated into one struct. What a flag says counts
// before the environment, that before the file, that before the default; in each, names nobody knows are refused.
//
// A flag --max-context-tokens is the variable MINITRON_SERVER_MAX_CONTEXT_TOKENS and the file's key
// "max-context-tokens". No option holds a secret: secrets are in files that options name.
//
// Our own small parser instead of absl flags: those are process-wide mutable state, print several lines on an error
// and choose the exit code themselves.
#pragma once

#include <chrono>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/base/log.h"
#include "engine/model_runner.h"

namespace minitron::server {

struct ServerOptions {
  std::string model;              // folder
  std::string tokenizer_sha256;   // 64 lower-case hex digits; empty: any tokenizer.model that passes its checks
  std::string served_model_name;  // empty: the folder's own name
  std::string host = "0.0.0.0";   // a container must listen on all addresses; choose 127.0.0.1 on a workstation
  int port = 50051;               // 0: any free one
  int metrics_port = 9090;        // 0: any free one
  std::string port_file;          // written when ready
  std::string backend = "auto";
  std::string quantize = "none";
  std::string cache_dir;
  std::string kv_cache_dtype = "bf16";
  std::string activation_dtype = "auto";
  int threads = 0;
  int kv_cache_mib = 0;
  int block_size = 16;
  int max_num_sequences = 64;
  int max_step_tokens = 512;
  int max_prefill_chunk = 256;
  int max_context_tokens = 0;
  int max_queued_requests = 256;
  std::string prefix_cache = "tenant";
  std::string admission_mode = "optimistic";
  std::string overlap = "auto";
  int max_queued_tokens = 262144;
  int max_queued_mib = 64;
  int default_max_tokens = 256;
  int max_receive_mib = 4;
  double drain_timeout_s = 30;
  double drain_delay_s = 0;
  double write_stall_timeout_s = 30;
  double max_request_timeout_s = 600;
  double itl_target_ms = 0;
  double priority_wait_bound_s = 5;
  std::string config;    // JSON file
  std::string tls_cert;  // PEM; empty: plaintext
  std::string tls_key;
  std::string tls_client_ca;  // empty: clients need no certificate
  std::string auth_file;      // empty: everybody may call everything
  std::string audit_log;      // empty: none
  std::string log_format = "text";
  std::string metrics_compat = "none";
  int health_port = -1;                 // -1: none
  int max_connections = 0;              // 0: half the descriptors
  int max_connections_per_address = 0;  // 0: no limit
  double handshake_timeout_s = 10;
  double hang_timeout_s = 10;
  double memory_mark = 0.95;
  bool self_test = true;
  bool reflection = true;
  bool channelz = false;
  bool open_inference = true;
  bool vllm_grpc = true;
  int http_port = -1;  // -1: none, 0: any free one
  std::string http_host = "127.0.0.1";
  int http_threads = 32;
  std::string chat_template = "none";
  bool add_bos = false;
  bool show_help = false;
  bool show_version = false;

  // Where each option that was given comes from: flag, environment, file.
  std::map<std::string, std::string> sources;

  engine::Backend backend_kind() const;
  engine::Quantization quantization() const;
  engine::KvCacheType kv_cache_type() const;
  engine::ActivationType activation_type() const;
};

// Reads argv[1..] (--flag=value and --flag value; --no-flag for switches), the environment ("NAME=value" each; names
// that do not start with MINITRON_SERVER_ are not ours) and the file that one of the two names.
// Error: INVALID_ARGUMENT or NOT_FOUND, one line with name, value and limit.
absl::StatusOr<ServerOptions> ParseServerOptions(const std::vector<std::string>& arguments,
                                                 const std::vector<std::string>& environment = {});

// Every option that was given, with its value and where it comes from, for the first line of the log.
base::LogFields DescribeOptions(const ServerOptions& options);

// One line per flag with its default and meaning.
std::string ServerOptionsHelp();

// The model that ships with the server: in the source tree of a build, or in the share folder of an installation.
// Empty when there is none. `executable` is the path of the running program.
std::string FindDefaultModel(const std::string& executable);

}  // namespace minitron::server
