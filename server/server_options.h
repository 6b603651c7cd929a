// Flags of minitron-server: parsed and validated into one struct. Pure apart from looking for the default model.
//
// Our own small parser instead of absl flags: those are process-wide mutable state, print several lines on an error
// and choose the exit code themselves.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_runner.h"

namespace minitron::server {

struct ServerOptions {
  std::string model;              // folder
  std::string served_model_name;  // empty: the folder's own name
  std::string host = "0.0.0.0";   // a container must listen on all addresses; choose 127.0.0.1 on a workstation
  int port = 50051;               // 0: any free one
  int metrics_port = 9090;        // 0: any free one
  std::string port_file;          // written when ready
  std::string backend = "auto";
  std::string quantize = "none";
  int threads = 0;
  int kv_cache_mib = 0;
  int block_size = 16;
  int max_num_sequences = 64;
  int max_step_tokens = 512;
  int max_prefill_chunk = 256;
  int max_context_tokens = 0;
  int max_queued_requests = 256;
  int default_max_tokens = 256;
  int max_receive_mib = 4;
  double drain_timeout_s = 30;
  double drain_delay_s = 0;
  double write_stall_timeout_s = 30;
  double max_request_timeout_s = 600;
  bool reflection = true;
  bool add_bos = false;
  bool show_help = false;
  bool show_version = false;

  engine::Backend backend_kind() const;
  engine::Quantization quantization() const;
};

// Reads argv[1..]. Both --flag=value and --flag value; --no-flag for switches.
// Error: INVALID_ARGUMENT, one line with flag, value and limit.
absl::StatusOr<ServerOptions> ParseServerOptions(const std::vector<std::string>& arguments);

// One line per flag with its default and meaning.
std::string ServerOptionsHelp();

// The model that ships with the server: in the source tree of a build, or in the share folder of an installation.
// Empty when there is none. `executable` is the path of the running program.
std::string FindDefaultModel(const std::string& executable);

}  // namespace minitron::server
