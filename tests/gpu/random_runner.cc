#include "tests/gpu/random_runner.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/cuda/cublaslt_matmul.h"
#include "engine/cuda/cuda_model_runner.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/memory_plan.h"
#include "engine/model_runner_impl.h"
#include "tests/bench/random_checkpoint.h"
#include "tests/gpu/stream_kernels.h"
#include "tests/gpu/timed_ops.h"

namespace minitron::gpu {
namespace {

using namespace engine::cuda;  // NOLINT: a program about this room
using bench::TensorSpec;
using engine::DType;
using engine::NemotronConfig;
using engine::NemotronWeights;
using engine::WeightView;

constexpr uint64_t kSeed = 1;  // minitron-make-checkpoint's

// Owns the memory of the weights. Matrices in one piece, in the order of the file: a layer's Q, K and V are one matrix
// to the product. Norms in fp32, as the backend keeps them.
struct RandomWeights {
  NemotronWeights weights;
  DeviceBuffer<Bf16> matrices;
  DeviceBuffer<float> norms;
};

// The views in the order of TensorSpecs.
std::vector<WeightView*> Views(NemotronWeights& w) {
  std::vector<WeightView*> views = {&w.embedding};
  for (engine::LayerWeights& layer : w.layers) {
    views.insert(views.end(),
                 {&layer.input_norm_weight, &layer.input_norm_bias, &layer.q_proj, &layer.k_proj, &layer.v_proj,
                  &layer.o_proj, &layer.post_norm_weight, &layer.post_norm_bias, &layer.up_proj, &layer.down_proj});
  }
  views.insert(views.end(), {&w.final_norm_weight, &w.final_norm_bias, &w.lm_head});
  return views;
}

struct Sizes {
  int64_t matrices = 0, norms = 0;  // elements
  int64_t num_bytes() const { return 2 * matrices + 4 * norms; }
};
Sizes SizesOf(const std::vector<TensorSpec>& tensors) {
  Sizes sizes;
  for (const TensorSpec& tensor : tensors) {
    (tensor.shape.size() == 2 ? sizes.matrices : sizes.norms) += tensor.NumElements();
  }
  return sizes;
}

absl::StatusOr<std::shared_ptr<RandomWeights>> MakeWeights(const NemotronConfig& config,
                                                           const std::vector<TensorSpec>& tensors) {
  auto made = std::make_shared<RandomWeights>();
  const Sizes sizes = SizesOf(tensors);
  ASSIGN_OR_RETURN(made->matrices, DeviceBuffer<Bf16>::Allocate(sizes.matrices));
  ASSIGN_OR_RETURN(made->norms, DeviceBuffer<float>::Allocate(sizes.norms));
  ASSIGN_OR_RETURN(const Stream stream, CreateStream());
  made->weights.layers.resize(config.num_layers);
  const std::vector<WeightView*> views = Views(made->weights);
  CHECK(views.size() == tensors.size());
  Bf16* matrix = made->matrices.data();
  float* norm = made->norms.data();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorSpec& tensor = tensors[i];
    const int64_t count = tensor.NumElements();
    if (tensor.shape.size() == 2) {
      *views[i] = {.data = matrix, .dtype = DType::kBf16, .rows = tensor.shape[0], .cols = tensor.shape[1]};
      RETURN_IF_ERROR(ToStatus(FillRandom(tensor.seed, count, tensor.scale, matrix, stream.get()), "fill"));
      matrix += count;
    } else {
      *views[i] = {.data = norm, .dtype = DType::kF32, .rows = 1, .cols = count};
      RETURN_IF_ERROR(ToStatus(FillRandom(tensor.seed, count, tensor.scale, norm, stream.get()), "fill"));
      norm += count;
    }
  }
  made->weights.num_parameters = sizes.matrices + sizes.norms;
  made->weights.num_bytes = sizes.num_bytes();
  RETURN_IF_ERROR(ToStatus(cudaStreamSynchronize(stream.get()), "stream"));
  return made;
}

absl::StatusOr<std::unique_ptr<MatMul>> MakeMatMul([[maybe_unused]] const std::string& cache_dir,
                                                   [[maybe_unused]] bool batch_invariant) {
#if defined(MINITRON_CUDA_EMULATION)
  return CreateReferenceMatMul();
#else
  // The choices of a server that has this folder, so that the bits are the same.
  const bool kept = batch_invariant && !cache_dir.empty();
  return CreateCublasLtMatMul(
      {.batch_invariant = batch_invariant, .tuning_file = kept ? cache_dir + "/minitron-cublaslt.txt" : std::string()});
#endif
}

}  // namespace

absl::StatusOr<RandomRunner> MakeRandomRunner(const std::string& shape, const engine::EngineOptions& options,
                                              bool batch_invariant) {
  NemotronConfig config;
  if (!bench::ShapeByName(shape, config)) return absl::InvalidArgumentError(absl::StrCat("no shape ", shape));
  engine::RunnerLimits limits{.block_size = options.block_size,
                              .max_num_sequences = options.max_num_sequences,
                              .max_num_tokens = options.max_num_tokens,
                              .max_context_tokens = options.max_context_tokens > 0 ? options.max_context_tokens
                                                                                   : config.max_position_embeddings,
                              .kv_cache_type = options.kv_cache_type};
  RETURN_IF_ERROR(CudaOps::CheckShapes(config, limits));
  ASSIGN_OR_RETURN(const DeviceInfo device, OpenDevice());
  ASSIGN_OR_RETURN(std::unique_ptr<MatMul> matmul, MakeMatMul(options.cache_dir, batch_invariant));
  const std::vector<TensorSpec> tensors = bench::TensorSpecs(config, kSeed);
  size_t free_bytes = 0, total_bytes = 0;
  RETURN_IF_ERROR(ToStatus(cudaMemGetInfo(&free_bytes, &total_bytes), "memory info"));
  ASSIGN_OR_RETURN(const MemoryPlan plan,
                   PlanMemory(config, SizesOf(tensors).num_bytes(), limits, matmul->workspace_bytes(),
                              {static_cast<int64_t>(free_bytes), static_cast<int64_t>(total_bytes)}));
  limits.num_kv_blocks = plan.num_kv_blocks;
  ASSIGN_OR_RETURN(const std::shared_ptr<RandomWeights> made, MakeWeights(config, tensors));
  ASSIGN_OR_RETURN(std::unique_ptr<CudaOps> ops, CudaOps::Create(config, limits, std::move(matmul),
                                                                 {.num_processors = device.num_processors,
                                                                  .early_launch = options.early_launch,
                                                                  .fp8_products = false}));
  const CudaOps& borrowed = *ops;
  const auto marks = std::make_shared<StepMarks>();
  engine::ModelInfo info = DescribeModel(config, made->weights, limits.max_context_tokens);
  info.backend = "cuda";
  info.weight_type = "bf16";
  info.weight_bytes = made->weights.num_bytes;
  info.kv_bytes_per_token = KvBytesPerToken(config, limits.kv_cache_type);
  RandomRunner result{.runner = nullptr, .gaps = marks};
  result.runner = std::make_unique<engine::ModelRunnerImpl<TimedOps>>(std::make_unique<TimedOps>(std::move(ops), marks),
                                                                      config, made->weights, made, info, limits);
  RETURN_IF_ERROR(borrowed.status());
  return result;
}

}  // namespace minitron::gpu
