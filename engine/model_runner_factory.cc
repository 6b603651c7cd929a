// CreateModelRunner: options checked, model loaded, KV cache sized, backend chosen.
#include <sys/stat.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "engine/base/log.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/checkpoint.h"
#include "engine/cpu/cpu_model_runner.h"
#include "engine/cpu/cpu_topology.h"
#include "engine/cpu/packed_weights.h"
#include "engine/model_config.h"
#include "engine/model_runner.h"
#include "engine/nemotron_weights.h"
#if MINITRON_CUDA
#include "engine/cuda/cuda_backend.h"
#endif

namespace minitron::engine {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxSequences = 4096;
constexpr int kMaxTokens = 65536;

absl::Status CheckRange(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " ", value, " outside [", low, ", ", high, "]"));
}

absl::Status CheckOptions(const EngineOptions& options) {
  RETURN_IF_ERROR(CheckRange("num_threads", options.num_threads, 0, kMaxThreads));
  RETURN_IF_ERROR(CheckRange("block_size", options.block_size, 8, 256));
  if ((options.block_size & (options.block_size - 1)) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("block_size ", options.block_size, " is not a power of two"));
  }
  RETURN_IF_ERROR(CheckRange("kv_cache_bytes", options.kv_cache_bytes, 0, int64_t{1} << 50));
  RETURN_IF_ERROR(CheckRange("max_num_sequences", options.max_num_sequences, 1, kMaxSequences));
  RETURN_IF_ERROR(CheckRange("max_num_tokens", options.max_num_tokens, 1, kMaxTokens));
  if (options.max_num_tokens < options.max_num_sequences) {
    return absl::InvalidArgumentError(absl::StrCat("max_num_tokens ", options.max_num_tokens,
                                                   " below max_num_sequences ", options.max_num_sequences,
                                                   ": a decode step needs a row for every sequence"));
  }
  if (options.model_dir.empty()) return absl::InvalidArgumentError("model_dir is empty");
  struct stat info {};
  if (stat(options.model_dir.c_str(), &info) != 0) {
    return absl::NotFoundError(absl::StrCat("model folder '", options.model_dir, "' is not there"));
  }
  if (!S_ISDIR(info.st_mode)) {
    return absl::NotFoundError(absl::StrCat("model folder '", options.model_dir, "' is no folder"));
  }
  return absl::OkStatus();
}

// The number behind `key` in /proc/meminfo, in bytes; 0 if it cannot be read.
int64_t MemoryInfoBytes(const std::string& key) {
  std::ifstream file("/proc/meminfo");
  std::string name, unit;
  int64_t kibibytes = 0;
  while (file >> name >> kibibytes && std::getline(file, unit)) {
    if (name == key + ":") return kibibytes * 1024;
  }
  return 0;
}

// Memory this process may still take: what is available, and no more than its container's limit.
int64_t AvailableMemoryBytes() {
  int64_t available = MemoryInfoBytes("MemAvailable");
  if (available == 0) available = INT64_MAX;
  std::ifstream file("/sys/fs/cgroup/memory.max");  // "max" when there is no limit
  int64_t limit = 0;
  if (file >> limit && limit > 0) available = std::min(available, limit);
  return available;
}

// Blocks the KV cache gets. An explicit size is taken as it is; else every sequence gets its full context, unless that
// exceeds a quarter of the free memory, but never less than one full context.
absl::StatusOr<int> SizeKvCache(const EngineOptions& options, int max_context_tokens, int64_t bytes_per_token) {
  const int64_t block_bytes = bytes_per_token * options.block_size;
  const int64_t context_blocks = (max_context_tokens + options.block_size - 1) / options.block_size;
  const int64_t context_bytes = context_blocks * block_bytes;
  const int64_t available = AvailableMemoryBytes();
  int64_t bytes = options.kv_cache_bytes;
  if (bytes == 0) bytes = std::min(context_bytes * options.max_num_sequences, std::max(context_bytes, available / 4));
  if (bytes > available) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "KV cache of ", bytes, " bytes, but ", available, " bytes of memory are available (one context of ",
        max_context_tokens, " tokens * ", bytes_per_token, " bytes = ", context_bytes,
        " bytes); lower kv_cache_bytes or max_context_tokens"));
  }
  const int64_t num_blocks = bytes / block_bytes;
  if (num_blocks < 2) {
    return absl::ResourceExhaustedError(absl::StrCat("KV cache: ", bytes, " bytes hold ", num_blocks, " blocks of ",
                                                     options.block_size, " tokens * ", bytes_per_token,
                                                     " bytes = ", block_bytes, " bytes; at least 2 are needed"));
  }
  return static_cast<int>(std::min<int64_t>(num_blocks, INT32_MAX));
}

// Whether to run on the device. Error: asked for, and not possible. `why_not` is set when auto found none, or what only
// the CPU has was asked for; it is told only once the model is loaded, because a failed start is one line.
absl::StatusOr<bool> UseCuda(const EngineOptions& options, [[maybe_unused]] std::string& why_not) {
  if (options.backend == Backend::kCpu) return false;
#if MINITRON_CUDA
  const char* wide =
      options.kv_cache_type == KvCacheType::kF32 ? "kv_cache_type fp32 is for the cpu backend; cuda has bf16 and fp8"
      : options.activation_type == ActivationType::kF32 ? "activation_type fp32 is for the cpu backend; cuda has bf16"
                                                        : nullptr;
  if (wide != nullptr && options.backend == Backend::kCuda) return absl::InvalidArgumentError(wide);
  if (wide != nullptr) {
    why_not = wide;
    return false;
  }
  const absl::Status device = cuda::ProbeDevice();
  if (device.ok()) return true;
  if (options.backend == Backend::kCuda) return device;
  why_not = std::string(device.message());
  return false;
#else
  if (options.backend == Backend::kCuda) return absl::UnimplementedError("this build has no CUDA backend");
  return false;
#endif
}

std::string Because(const std::string& why_not_cuda) { return why_not_cuda.empty() ? "" : ": " + why_not_cuda; }

// 8-bit floats are not for the CPU.
absl::Status CheckNoFp8(const EngineOptions& options, const std::string& why_not_cuda) {
  const char* asked = options.quantization == Quantization::kFp8          ? "quantization fp8"
                      : options.quantization == Quantization::kFp8Dynamic ? "quantization fp8-dynamic"
                      : options.kv_cache_type == KvCacheType::kFp8        ? "kv_cache_type fp8"
                                                                          : nullptr;
  if (asked == nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(asked, " is for the cuda backend", Because(why_not_cuda)));
}

// For the log: what products with bf16 weights do to their rows.
const char* RowsOf(const NemotronWeights& weights, ActivationType activations) {
  if (weights.matrix_dtype != DType::kBf16Panels) return "";
  return activations == ActivationType::kBf16 ? " activations=bf16" : " activations=fp32";
}

// What the runner's weights point into.
struct LoadedWeights {
  std::shared_ptr<const Checkpoint> checkpoint;
  std::unique_ptr<const cpu::PackedWeights> packed;
};

absl::StatusOr<std::shared_ptr<const LoadedWeights>> Load(std::shared_ptr<const Checkpoint> checkpoint,
                                                          const NemotronWeights& source, const EngineOptions& options,
                                                          int num_threads, int64_t kv_cache_bytes) {
  cpu::ThreadPool pool(num_threads, cpu::ThreadCpusHere(num_threads));
  const cpu::PackOptions pack_options{.quantization = options.quantization,
                                      .cache_dir = options.cache_dir,
                                      .model_dir = options.model_dir,
                                      .show_progress = options.show_progress};
  if (cpu::PackPlan(source, options.quantization).matrices.empty()) checkpoint->Prefault(options.show_progress);
  const int64_t available = AvailableMemoryBytes();
  absl::StatusOr<std::unique_ptr<cpu::PackedWeights>> loaded;
  // In place: each thread first touches the part of each matrix that it will read in a step.
  pool.CallInPlace([&] { loaded = cpu::PackedWeights::Load(source, *checkpoint, pack_options, pool); });
  ASSIGN_OR_RETURN(auto packed, std::move(loaded));
  // The embedding is read where it lies. Where it does not fit beside all else it would only push that out.
  const bool fits = packed->weights().num_bytes + kv_cache_bytes <= available;
  if (fits) checkpoint->MapIn(source.embedding.data, source.embedding.bytes());
  return std::make_shared<const LoadedWeights>(LoadedWeights{std::move(checkpoint), std::move(packed)});
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelRunner>> CreateModelRunner(const EngineOptions& options) {
  std::string why_not_cuda;
  ASSIGN_OR_RETURN(const bool use_cuda, UseCuda(options, why_not_cuda));
  if (!use_cuda) RETURN_IF_ERROR(CheckNoFp8(options, why_not_cuda));
  RETURN_IF_ERROR(CheckOptions(options));
  ASSIGN_OR_RETURN(const NemotronConfig config, LoadNemotronConfig(options.model_dir));
  RETURN_IF_ERROR(CheckRange("max_context_tokens", options.max_context_tokens, 0, config.max_position_embeddings));
  const int max_context = options.max_context_tokens > 0 ? options.max_context_tokens : config.max_position_embeddings;
  ASSIGN_OR_RETURN(std::unique_ptr<Checkpoint> opened, Checkpoint::Open(options.model_dir));
  const std::shared_ptr<const Checkpoint> checkpoint = std::move(opened);
  ASSIGN_OR_RETURN(const NemotronWeights source, MapNemotronWeights(*checkpoint, config));
#if MINITRON_CUDA
  if (use_cuda) {
    const RunnerLimits limits{.block_size = options.block_size,
                              .max_num_sequences = options.max_num_sequences,
                              .max_num_tokens = options.max_num_tokens,
                              .max_context_tokens = max_context,
                              .kv_cache_type = options.kv_cache_type};
    const std::string& folder = options.cache_dir.empty() ? options.model_dir : options.cache_dir;
    return cuda::CreateCudaBackend(config, source, limits,
                                   {.quantization = options.quantization,
                                    .early_launch = options.early_launch,
                                    .kv_cache_bytes = options.kv_cache_bytes,
                                    .tuning_file = folder + "/minitron-cublaslt.txt"});
  }
#endif
  if (source.has_fp8()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the checkpoint's matrices are fp8: for the cuda backend", Because(why_not_cuda)));
  }
  const int64_t token_bytes = cpu::KvBytesPerToken(config, options.kv_cache_type);
  ASSIGN_OR_RETURN(const int num_blocks, SizeKvCache(options, max_context, token_bytes));
  const int num_threads = options.num_threads > 0 ? options.num_threads : cpu::NumUsableCores();
  ASSIGN_OR_RETURN(
      const std::shared_ptr<const LoadedWeights> loaded,
      Load(checkpoint, source, options, num_threads, int64_t{num_blocks} * options.block_size * token_bytes));
  const NemotronWeights& weights = loaded->packed->weights();
  if (!why_not_cuda.empty()) base::LogInfo(absl::StrCat("backend auto: cpu, because ", why_not_cuda));
  const ActivationType activations = cpu::ChooseActivationType(options.activation_type);
  base::LogInfo(absl::StrCat("engine backend=cpu threads=", num_threads, " parameters=", weights.num_parameters,
                             " weights=", DTypeName(weights.matrix_dtype), RowsOf(weights, activations), " context=",
                             max_context, " kv_blocks=", num_blocks, " kv_block_tokens=", options.block_size));
  const RunnerLimits limits{.block_size = options.block_size,
                            .num_kv_blocks = num_blocks,
                            .max_num_sequences = options.max_num_sequences,
                            .max_num_tokens = options.max_num_tokens,
                            .max_context_tokens = max_context,
                            .kv_cache_type = options.kv_cache_type,
                            .activation_type = activations};
  return cpu::CreateCpuModelRunner(config, weights, loaded, limits, num_threads);
}

}  // namespace minitron::engine
