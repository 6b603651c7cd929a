// ModelRunner: the outer seam of the engine, one per process, called once or twice per step.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/batch.h"

namespace minitron::engine {

enum class Backend { kAuto, kCpu, kCuda };

// How matrices are stored: as loaded, as 8- or 4-bit integers with a scale per group of 64 or 32, or as 8-bit floats
// with a scale per output (CUDA only). kFp8Dynamic: so that products are computed in 8-bit floats as well, each token's
// activations with a scale of their own.
enum class Quantization { kOff, kInt8, kInt4, kFp8, kFp8Dynamic };

// Element type of the KV cache: bf16, as the weights; fp32 (CPU only); 8-bit floats with an exponent for each token and
// head (CUDA only), half of bf16's memory and traffic.
enum class KvCacheType { kBf16, kF32, kFp8 };

// What the CPU backend's products with bf16 weights do to their rows: keep them in fp32, or round them to bf16 first.
// kAuto: bf16 where the processor multiplies bf16, which makes prompts about twice as fast, else fp32. Quantised
// weights have integers of their own for rows (engine/cpu); CUDA's activations are bf16.
enum class ActivationType { kAuto, kF32, kBf16 };

struct EngineOptions {
  std::string model_dir;  // Hugging Face style folder: config.json and weights
  Backend backend = Backend::kAuto;
  int num_threads = 0;  // CPU backend; 0 means one per physical core
  Quantization quantization = Quantization::kOff;
  // Folder of what is worked out once: packed weights (CPU; empty: beside the model when they are large), the products'
  // timed choices (CUDA; empty: beside the model).
  std::string cache_dir;
  KvCacheType kv_cache_type = KvCacheType::kBf16;
  ActivationType activation_type = ActivationType::kAuto;
  int block_size = 16;         // tokens per KV block, a power of two in [8, 256]
  int64_t kv_cache_bytes = 0;  // 0: sized from free memory, at most what max_num_sequences full contexts need
  int max_num_sequences = 64;  // sequences per batch
  int max_num_tokens = 512;    // token rows per batch
  int max_context_tokens = 0;  // 0: the model's max_position_embeddings
  bool early_launch = false;   // CUDA: kernels of recorded steps may start early; off until a device has shown the gain
  bool show_progress = false;  // draw a loading bar on stderr when it is a terminal and the files are over 1 GB
};

// What the loaded model is; fixed after load.
struct ModelInfo {
  std::string architecture;  // "nemotron"
  std::string backend;       // "cpu" or "cuda"
  std::string weight_type;   // "bf16", "f16", "f32", "int8", "int4" or "fp8"
  int64_t num_parameters = 0;
  int64_t weight_bytes = 0;
  int64_t kv_bytes_per_token = 0;
  int vocab_size = 0;
  int hidden_size = 0;
  int num_layers = 0;
  int num_attention_heads = 0;
  int num_key_value_heads = 0;
  int head_dim = 0;
  int intermediate_size = 0;
  int max_context_tokens = 0;
  TokenId bos_token_id = 0;
  std::vector<TokenId> eos_token_ids;  // from generation_config.json if it has them, else config.json
};

// Runs batches over a paged KV cache. Engine thread only; not synchronized. Batches complete in order.
//
// Batches take effect in order: a batch reads in the KV cache what the batches submitted before it wrote.
//
// Contract every backend honours: the output bits of a sequence's row are a function of that sequence's tokens, params
// and output position alone; not of the other rows, the chunking of the prompt, the block ids or the row's place.
class ModelRunner {
 public:
  virtual ~ModelRunner() = default;

  // Enqueues one step. The batch and everything it borrows must stay alive until the matching Collect.
  // At most two batches may be outstanding. Requires: 0 < T <= max_num_tokens, S <= max_num_sequences, ids in range.
  // Error: INTERNAL when the device failed; the runner is then unusable.
  virtual absl::Status Submit(const Batch& batch) = 0;

  // Waits for the oldest outstanding batch. Error: INTERNAL when the device failed; the runner is then unusable.
  virtual absl::StatusOr<StepResult> Collect() = 0;

  // Takes a result's storage back, for a later Collect to fill. Optional.
  virtual void Recycle(StepResult&& /*result*/) {}

  // Whether Submit returns while the batch still runs. Where it does not, submitting ahead is correct, but results are
  // read a step later than they could be.
  virtual bool submits_asynchronously() const { return false; }

  virtual const ModelInfo& model_info() const = 0;
  virtual int num_kv_blocks() const = 0;
  virtual int block_size() const = 0;         // tokens
  virtual int max_num_tokens() const = 0;     // token rows per batch
  virtual int max_num_sequences() const = 0;  // sequences per batch; history slots are [0, 2 * max_num_sequences)
};

// Loads the model and sizes the KV cache.
// Errors: NOT_FOUND (no such folder or file), INVALID_ARGUMENT (malformed or unsupported checkpoint: names file, key
// and value), RESOURCE_EXHAUSTED (does not fit), UNIMPLEMENTED (backend not built in).
absl::StatusOr<std::unique_ptr<ModelRunner>> CreateModelRunner(const EngineOptions& options);

}  // namespace minitron::engine
