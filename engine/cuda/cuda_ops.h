// CudaOps: the op set of ops.h on a device, bf16 activations and weights, fp32 norms and logits.
//
// One stream. A step is: one copy of its arrays from pinned memory, the forward pass (replayed from a recorded graph
// when every sequence has one row), sampling, one copy of the results back. Nothing waits until Wait; sampled tokens
// stay on the device for the step behind. Two steps may be under way: their pinned memory takes turns.
//
// Errors: an op cannot return one, so the first is kept, later ops do nothing, and Wait reports it.
#pragma once

#include <algorithm>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/kernels.h"
#include "engine/cuda/matmul.h"
#include "engine/cuda/memory_plan.h"
#include "engine/cuda/sampler.h"
#include "engine/cuda/step_arrays.h"
#include "engine/model_config.h"
#include "engine/model_runner_impl.h"
#include "engine/ops.h"

namespace minitron::engine::cuda {

struct CudaOpsOptions {
  int num_processors = 1;     // of the device: bounds attention's grid
  bool early_launch = false;  // kernels of recorded steps may start early, see LaunchStream
  bool fp8_products = false;  // the layers' matrices are in E4M3, and `matmul` is prepared for it
};

// Engine thread only. Owns the KV cache, the histories and all work space.
class CudaOps {
 public:
  static constexpr bool kAsynchronous = true;
  using Element = Bf16;
  using Buffer = DeviceBuffer<Bf16>;
  using FloatBuffer = DeviceBuffer<float>;
  using Matrix = MatrixView<Bf16>;
  using ConstMatrix = MatrixView<const Bf16>;

  // Error: INVALID_ARGUMENT for a shape without a kernel (names value and limit).
  static absl::Status CheckShapes(const NemotronConfig& config, const RunnerLimits& limits);
  // Allocates everything but the activations. Errors: as CheckShapes and ToStatus.
  static absl::StatusOr<std::unique_ptr<CudaOps>> Create(const NemotronConfig& config, const RunnerLimits& limits,
                                                         std::unique_ptr<MatMul> matmul, const CudaOpsOptions& options);
  // What Create allocates, by purpose, without allocating it.
  static std::vector<MemoryUse> Requirements(const NemotronConfig& config, const RunnerLimits& limits);
  // Waits for the device, so that nothing runs on freed memory.
  ~CudaOps();

  Buffer Allocate(int64_t count) { return AllocateOrFail<Bf16>(count, "activations"); }
  FloatBuffer AllocateFloats(int64_t count) { return AllocateOrFail<float>(count, "logits"); }

  BatchView Upload(const Batch& batch);
  void Embed(const BatchView& batch, const WeightView& embedding, Matrix out);
  void AddLayerNorm1p(Matrix residual, ConstMatrix delta, const WeightView& weight, const WeightView& bias, float eps,
                      Matrix out);
  void MatMul(ConstMatrix x, const WeightView& w, Matrix out);
  void MatMul(ConstMatrix x, const WeightView& w, MatrixView<float> out);
  // The product adds (beta = 1): nothing is left for the norm.
  ConstMatrix MatMulToResidual(ConstMatrix x, const WeightView& w, Matrix residual, Matrix delta);
  // One product for all three: DeviceWeights keeps the matrices one behind the other. Row t of q, k and v lies at
  // t * (q.cols + k.cols + v.cols) of the outputs' memory.
  void ProjectQkv(ConstMatrix x, const WeightView& wq, const WeightView& wk, const WeightView& wv, Matrix q, Matrix k,
                  Matrix v);
  void RopeAndStoreKv(const BatchView& batch, int layer, Matrix q, ConstMatrix k, ConstMatrix v);
  void PagedAttention(const BatchView& batch, int layer, ConstMatrix q, Matrix out);
  // Where products are in E4M3, x is only ever the next one's operand: it is left there in E4M3 alone.
  void SquaredRelu(Matrix x);
  void GatherRows(ConstMatrix x, const int32_t* rows, Matrix out);
  void Sample(MatrixView<float> logits, absl::Span<const ResultRow> rows, int first_row,
              absl::Span<ResultRowOutput> outputs);
  absl::Status Wait();

  // Recorded steps (RecordingOpSet): one per size, the last for max_num_sequences rows.
  static std::vector<int> RecordedSizes(int max_num_sequences);
  std::vector<BatchView> StepsToRecord();
  void PrepareStep(const BatchView& view);
  void BeginRecording(const BatchView& view);
  void EndRecording(const BatchView& view);
  bool Replay(const BatchView& view);

  // The first error of any op; OK while all went well.
  const absl::Status& status() const { return status_; }
  // What everything is put on, in order.
  cudaStream_t stream() const { return stream_.get(); }

 private:
  // One of the two steps that may be under way.
  struct Slot {
    PinnedBuffer forward, sample, results;
    Event done;
  };
  // A Sample call whose outputs Wait has to fill.
  struct Pending {
    int first_row = 0;
    absl::Span<const ResultRow> rows;
    absl::Span<ResultRowOutput> outputs;
  };
  // A result row whose token the walk of its history slot is waiting for.
  struct ConstrainedRow {
    int result_row = 0;
    int history_slot = 0;
    int64_t epoch = 0;
  };
  struct Step {
    int slot = 0;
    std::vector<Pending> pending;
    std::vector<ConstrainedRow> constrained;
  };
  // How far a history slot's constraint has come; on the host, because that is where masks are made.
  struct Walk {
    std::unique_ptr<TokenWalk> walk;  // null: no constraint
    int64_t epoch = 0;                // counts resets: a row of the slot's former sequence may still be in flight
    bool waits = false;               // for the token of a row in flight
  };
  struct Recorded {
    int rows = 0;
    GraphExec graph;
  };

  CudaOps(const NemotronConfig& config, const RunnerLimits& limits, std::unique_ptr<cuda::MatMul> matmul,
          const CudaOpsOptions& options);
  // Where the kernels of a forward pass go.
  LaunchStream Launching() const { return {stream_.get(), options_.early_launch && recording_}; }
  // Calls visit(buffer, count, purpose) for every piece of device memory.
  template <typename Visit>
  absl::Status VisitBuffers(const Visit& visit);
  absl::Status AllocateAll();
  absl::Status AllocateSlots();
  absl::Status UploadRopeTables();
  template <typename T>
  absl::Status AllocateInto(DeviceBuffer<T>& buffer, int64_t count, const char* name);
  template <typename T>
  DeviceBuffer<T> AllocateOrFail(int64_t count, const char* name);

  void Multiply(ConstMatrix x, const WeightView& w, Store store, Matrix out);
  Fp8Rows RowsForFp8(ConstMatrix x);
  Fp8Matrix InFp8(ConstMatrix x);
  // Keeps the first error.
  void Check(const absl::Status& status);
  void Check(cudaError_t error, const char* what);

  ForwardCounts CountsFor(const Batch& batch, const StepPlan& plan) const;
  ForwardCounts RecordedCounts(int rows) const;
  BatchView ViewOf(const ForwardCounts& counts) const;
  void CopyForward(const ForwardCounts& counts);
  void ResetWalks(const Batch& batch);
  void AddMasks(const Batch& batch, StepPlan& plan, Step& step);
  void AdvanceWalks(const Slot& slot, const Step& step);
  void UploadSample(const Batch& batch, const StepPlan& plan, Slot& slot);
  SampleLayout LargestSampleLayout() const;
  AttentionParams Attention(int layer, ConstMatrix q, Matrix out) const;
  KvCacheView CacheOf(int layer) const;
  int ProjectionWidth() const { return static_cast<int>(config_.query_width() + 2 * config_.key_value_width()); }
  int64_t ScratchSlot() const { return int64_t{limits_.num_kv_blocks} * limits_.block_size; }
  int64_t CacheRowsPerLayer() const {  // of one head's key or value
    return (int64_t{limits_.num_kv_blocks} + 1) * limits_.block_size * config_.num_key_value_heads;
  }
  int MaxChunks() const { return (limits_.max_context_tokens + kChunkKeys - 1) / kChunkKeys; }
  int64_t RotaryTableSize() const {
    return std::max<int64_t>(1, int64_t{limits_.max_context_tokens} * (config_.rotary_dim / 2));
  }
  int MaxResults() const { return limits_.max_num_tokens + limits_.max_num_sequences; }
  template <typename T>
  const T* ForwardArray(int64_t offset) const {
    return reinterpret_cast<const T*>(forward_arrays_.data() + offset);
  }
  template <typename T>
  const T* SampleArray(int64_t offset) const {
    return reinterpret_cast<const T*>(sample_arrays_.data() + offset);
  }
  void FillOutputs(const Slot& slot, const Pending& pending) const;

  const NemotronConfig config_;
  const RunnerLimits limits_;
  const CudaOpsOptions options_;
  bool recording_ = false;
  const Bf16* coded_ = nullptr;  // the activations that were left in E4M3 where matmul_ will read them
  int block_shift_ = 0;
  absl::Status status_;
  std::unique_ptr<cuda::MatMul> matmul_;

  // The stream is declared before what runs on it, so that it is destroyed after.
  Stream stream_;
  // [layer][block][kv head][token][head_dim] of bf16 or E4M3; one scratch block behind the last.
  DeviceBuffer<unsigned char> keys_, values_;
  DeviceBuffer<int8_t> key_exponents_, value_exponents_;  // [layer][block][kv head][token]; E4M3 only
  DeviceBuffer<float> cosines_, sines_;                   // [max_context, rotary_dim / 2]
  DeviceBuffer<float> partials_;                          // of split rows, by decode item
  DeviceBuffer<unsigned char> forward_arrays_, sample_arrays_;
  DeviceBuffer<unsigned char> states_;
  DeviceBuffer<float> edited_;
  DeviceBuffer<uint64_t> bin_masses_, tile_masses_, tile_tops_;
  DeviceBuffer<uint32_t> bin_counts_, history_;
  DeviceBuffer<int32_t> result_tokens_;
  DeviceBuffer<SampleOutput> outputs_;
  DeviceBuffer<TopLogprob> top_;
  Slot slots_[2];
  std::vector<Recorded> recorded_;
  std::vector<Walk> walks_;  // by history slot

  // The step being enqueued.
  ForwardCounts counts_;
  ForwardLayout layout_{ForwardCounts()};
  SampleLayout sample_layout_{0, 0, 0, 0};
  SampleNeeds needs_;
  bool recorded_step_ = false;
  int num_tiles_ = 0;
  int num_gathered_ = 0;
  int next_slot_ = 0;
  std::deque<Step> steps_;
};

}  // namespace minitron::engine::cuda
