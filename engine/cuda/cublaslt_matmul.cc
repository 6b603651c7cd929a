#include "engine/cuda/cublaslt_matmul.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <limits>
#include <map>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/log.h"
#include "engine/base/status_macros.h"
#include "engine/cuda/cublaslt_library.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/fp8_scratch.h"

namespace minitron::engine::cuda {
namespace {

constexpr int64_t kWorkspaceBytes = 32 << 20;  // what NVIDIA advises for Hopper; the default preference is none
constexpr int kMaxCandidates = 16;
// The rows a batch-invariant choice is timed at, if there are as many: a full decode step.
constexpr int kInvariantRows = 64;
constexpr int kTimedRuns = 10;
// Of a product that is scaled afterwards, at a time: 256 rows of the 8B's widest matrix, which stay in the cache.
constexpr int64_t kProductBytes = 16 << 20;

// What a choice is kept under: rows (0 stands for every number of them), outs, depth, kind.
using Key = std::tuple<int, int, int, int>;
int KindOf(const LtShape& shape) {
  return static_cast<int>(shape.out_type) + (shape.store == Store::kAdd ? 256 : 0) + (shape.fp8 ? 512 : 0);
}

// Where the operands of a product are.
struct Operands {
  const void* x;
  const void* w;
  void* out;
  LtScales scales = {};
};

class CublasLtMatMul final : public MatMul {
 public:
  CublasLtMatMul(const CublasLt& library, const CublasLtOptions& options) : library_(library), options_(options) {}
  ~CublasLtMatMul() override {
    if (handle_ != nullptr) library_.destroy(handle_);
  }

  absl::Status Start() {
    RETURN_IF_ERROR(LtStatus(library_.create(&handle_), "create"));
    ASSIGN_OR_RETURN(workspace_, DeviceBuffer<unsigned char>::Allocate(kWorkspaceBytes));
    cudaDeviceProp properties = {};
    RETURN_IF_ERROR(ToStatus(cudaGetDeviceProperties(&properties, 0), "device properties"));
    cache_bytes_ = std::max(1 << 20, properties.l2CacheSize);
    fingerprint_ = absl::StrCat(properties.name, " cublasLt ", library_.version());
    std::replace(fingerprint_.begin(), fingerprint_.end(), ' ', '_');
    LoadChoices();
    return absl::OkStatus();
  }

  absl::Status Run(const Bf16* x, const Bf16* w, int rows, int outs, int depth, Store store, Bf16* out,
                   cudaStream_t stream) override {
    return RunAs({rows, outs, depth, CUDA_R_16BF, store}, {x, w, out}, stream);
  }
  absl::Status Run(const Bf16* x, const Bf16* w, int rows, int outs, int depth, float* out,
                   cudaStream_t stream) override {
    return RunAs({rows, outs, depth, CUDA_R_32F}, {x, w, out}, stream);
  }
  absl::Status Run(const Fp8Matrix& x, const Fp8Matrix& w, int rows, int outs, int depth, Store store, Bf16* out,
                   cudaStream_t stream) override {
    if (row_scales_) {
      return RunAs({rows, outs, depth, CUDA_R_16BF, store, true}, {x.codes, w.codes, out, {x.scales, w.scales}},
                   stream);
    }
    return fp8_.MultiplyThenScale(x, w, rows, outs, store, out, stream, [&](int first, int count, float* product) {
      return RunAs({count, outs, depth, CUDA_R_32F, Store::kReplace, true},
                   {x.codes + int64_t{first} * depth, w.codes, product}, stream);
    });
  }
  absl::StatusOr<Fp8Rows> RowsForFp8(int rows, int depth) override { return fp8_.Rows(rows, depth); }

  // Scales for each row of both operands are there on sm_90 alone, from 12.9 on; elsewhere the product is computed
  // without scales and scaled by a kernel of ours.
  absl::Status PrepareFp8(int max_rows, int max_outs, int max_depth) override {
    LtShape shape{max_rows, max_outs, max_depth, CUDA_R_16BF, Store::kReplace, true};
    ASSIGN_OR_RETURN(fp8_, Fp8Scratch::Allocate(max_rows, max_outs, max_depth, 0));
    // The library looks at where scales are, not at what they hold.
    const auto* anywhere = reinterpret_cast<const float*>(workspace_.data());
    row_scales_ = kHasRowScales && HasAlgorithm(shape, {anywhere, anywhere});
    if (row_scales_) return absl::OkStatus();
    shape.out_type = CUDA_R_32F;
    if (!HasAlgorithm(shape, {})) {
      return absl::FailedPreconditionError(absl::StrCat("cublasLt ", library_.version(),
                                                        " has no product in fp8 on this device; quantization fp8 has "
                                                        "weights of the same size"));
    }
    ASSIGN_OR_RETURN(fp8_, Fp8Scratch::Allocate(max_rows, max_outs, max_depth, kProductBytes));
    return absl::OkStatus();
  }
  int64_t workspace_bytes() const override { return kWorkspaceBytes + fp8_.num_bytes(); }

 private:
  bool HasAlgorithm(const LtShape& shape, const LtScales& scales) {
    const LtProblem problem(library_, shape, scales);
    return problem.status().ok() && Candidates(problem).ok();
  }

  Key KeyOf(const LtShape& shape) const {
    return {options_.batch_invariant ? 0 : shape.rows, shape.outs, shape.depth, KindOf(shape)};
  }

  absl::Status RunAs(const LtShape& shape, const Operands& operands, cudaStream_t stream) {
    const LtProblem problem(library_, shape, operands.scales);
    RETURN_IF_ERROR(problem.status());
    auto found = choices_.find(KeyOf(shape));
    if (found != choices_.end() && !found->second.checked) {
      if (IsUsable(problem, found->second.algorithm)) {
        found->second.checked = true;
      } else {
        base::LogWarning(absl::StrCat(options_.tuning_file, ": a choice does not suit this library; made anew"));
        choices_.erase(found);
        found = choices_.end();
      }
    }
    if (found == choices_.end()) {
      RETURN_IF_ERROR(Choose(shape, operands, stream));
      found = choices_.find(KeyOf(shape));
    }
    return Enqueue(problem, found->second.algorithm, shape.store, operands, stream);
  }

  // Whether the library takes an algorithm, which may come from a file, for a problem.
  bool IsUsable(const LtProblem& problem, const cublasLtMatmulAlgo_t& algorithm) const {
    cublasLtMatmulHeuristicResult_t result = {};
    return library_.check(handle_, problem.desc, problem.w, problem.x, problem.out, problem.out, &algorithm, &result) ==
               CUBLAS_STATUS_SUCCESS &&
           result.state == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= static_cast<size_t>(kWorkspaceBytes);
  }

  absl::Status Enqueue(const LtProblem& problem, const cublasLtMatmulAlgo_t& algorithm, Store store,
                       const Operands& operands, cudaStream_t stream) {
    const float alpha = 1.0f, beta = store == Store::kAdd ? 1.0f : 0.0f;
    return LtStatus(library_.matmul(handle_, problem.desc, &alpha, operands.w, problem.w, operands.x, problem.x, &beta,
                                    operands.out, problem.out, operands.out, problem.out, &algorithm, workspace_.data(),
                                    kWorkspaceBytes, stream),
                    "matmul");
  }

  // Whether an algorithm sums as asked for, whatever the library made of the mask: in one sequence, if it has to.
  bool MaySum(const cublasLtMatmulAlgo_t& algorithm) const {
    int32_t num_splits = 0;
    size_t written = 0;
    return !options_.batch_invariant ||
           library_.config_get(&algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &num_splits, sizeof(num_splits),
                               &written) != CUBLAS_STATUS_SUCCESS ||
           num_splits <= 1;
  }

  // The candidates of the library's heuristic for a shape, best guess first.
  absl::StatusOr<std::vector<cublasLtMatmulAlgo_t>> Candidates(const LtProblem& problem) {
    cublasLtMatmulPreference_t preference = nullptr;
    RETURN_IF_ERROR(LtStatus(library_.preference_create(&preference), "preference"));
    const uint64_t workspace = kWorkspaceBytes;
    // Split-K sums in an order that depends on the split. Where it is allowed, partial sums stay in fp32: in place they
    // would be of the output's type.
    const uint32_t schemes =
        options_.batch_invariant ? CUBLASLT_REDUCTION_SCHEME_NONE : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    std::array<cublasLtMatmulHeuristicResult_t, kMaxCandidates> results = {};
    int count = 0;
    cublasStatus_t status =
        library_.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof(workspace));
    if (status == CUBLAS_STATUS_SUCCESS) {
      status =
          library_.preference_set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof(schemes));
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
      status = library_.heuristic(handle_, problem.desc, problem.w, problem.x, problem.out, problem.out, preference,
                                  kMaxCandidates, results.data(), &count);
    }
    library_.preference_destroy(preference);
    RETURN_IF_ERROR(LtStatus(status, "heuristic"));
    std::vector<cublasLtMatmulAlgo_t> algorithms;
    for (int i = 0; i < count; ++i) {
      if (results[i].state == CUBLAS_STATUS_SUCCESS && MaySum(results[i].algo)) algorithms.push_back(results[i].algo);
    }
    if (algorithms.empty()) return absl::InternalError("cublasLt: no algorithm for a shape");
    return algorithms;
  }

  // Times the candidates where that is possible and keeps the fastest.
  absl::Status Choose(const LtShape& shape, const Operands& operands, cudaStream_t stream) {
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    RETURN_IF_ERROR(ToStatus(cudaStreamIsCapturing(stream, &capturing), "capture status"));
    LtShape asked = shape;
    if (options_.batch_invariant) asked.rows = std::min(asked.rows, kInvariantRows);
    const LtProblem problem(library_, asked, operands.scales);
    RETURN_IF_ERROR(problem.status());
    ASSIGN_OR_RETURN(const std::vector<cublasLtMatmulAlgo_t> candidates, Candidates(problem));
    size_t best = 0;
    if (capturing == cudaStreamCaptureStatusNone) {
      ASSIGN_OR_RETURN(best, Fastest(problem, candidates, asked, operands, stream));
    }
    choices_[KeyOf(shape)] = {candidates[best], true};
    SaveChoices();
    return absl::OkStatus();
  }

  // The index of the fastest candidate. What `out` holds is kept aside meanwhile where the product adds to it.
  absl::StatusOr<size_t> Fastest(const LtProblem& problem, const std::vector<cublasLtMatmulAlgo_t>& candidates,
                                 const LtShape& shape, const Operands& operands, cudaStream_t stream) {
    const int64_t num_bytes = int64_t{shape.rows} * shape.outs * static_cast<int64_t>(sizeof(Bf16));
    const auto copy = [&](void* to, const void* from) {
      return ToStatus(cudaMemcpyAsync(to, from, static_cast<size_t>(num_bytes), cudaMemcpyDeviceToDevice, stream),
                      "copy");
    };
    DeviceBuffer<unsigned char> kept;
    if (shape.store == Store::kAdd) {
      ASSIGN_OR_RETURN(kept, DeviceBuffer<unsigned char>::Allocate(num_bytes));
      RETURN_IF_ERROR(copy(kept.data(), operands.out));
    }
    ASSIGN_OR_RETURN(const DeviceBuffer<unsigned char> evicting,
                     DeviceBuffer<unsigned char>::Allocate(2 * cache_bytes_));
    size_t best = 0;
    float best_ms = std::numeric_limits<float>::infinity();
    for (size_t i = 0; i < candidates.size(); ++i) {
      ASSIGN_OR_RETURN(const float ms, Time(problem, candidates[i], shape.store, operands, evicting, stream));
      if (ms < best_ms) best_ms = ms, best = i;
    }
    if (shape.store == Store::kAdd) {
      RETURN_IF_ERROR(copy(operands.out, kept.data()));
      RETURN_IF_ERROR(ToStatus(cudaStreamSynchronize(stream), "stream"));  // before the copy goes
    }
    return best;
  }

  // The median time of a product whose weights are not in the cache: in a step, the other layers' have been there
  // since.
  absl::StatusOr<float> Time(const LtProblem& problem, const cublasLtMatmulAlgo_t& algorithm, Store store,
                             const Operands& operands, const DeviceBuffer<unsigned char>& evicting,
                             cudaStream_t stream) {
    if (!Enqueue(problem, algorithm, store, operands, stream).ok()) return std::numeric_limits<float>::infinity();
    std::array<Event, kTimedRuns> begins, ends;
    for (int run = 0; run < kTimedRuns; ++run) {
      for (Event* event : {&begins[run], &ends[run]}) {
        cudaEvent_t handle = nullptr;
        RETURN_IF_ERROR(ToStatus(cudaEventCreate(&handle), "event"));
        *event = Event(handle);
      }
      const size_t evicting_bytes = static_cast<size_t>(evicting.size());
      RETURN_IF_ERROR(ToStatus(cudaMemsetAsync(evicting.data(), run, evicting_bytes, stream), "evict"));
      RETURN_IF_ERROR(ToStatus(cudaEventRecord(begins[run].get(), stream), "record event"));
      RETURN_IF_ERROR(Enqueue(problem, algorithm, store, operands, stream));
      RETURN_IF_ERROR(ToStatus(cudaEventRecord(ends[run].get(), stream), "record event"));
    }
    RETURN_IF_ERROR(ToStatus(cudaEventSynchronize(ends.back().get()), "wait for timed products"));
    std::array<float, kTimedRuns> times = {};
    for (int run = 0; run < kTimedRuns; ++run) {
      RETURN_IF_ERROR(ToStatus(cudaEventElapsedTime(&times[run], begins[run].get(), ends[run].get()), "elapsed time"));
    }
    std::nth_element(times.begin(), times.begin() + kTimedRuns / 2, times.end());
    return times[kTimedRuns / 2];
  }

  // The file: one line per choice: fingerprint, key, the algorithm's 8 opaque words.
  void LoadChoices() {
    std::ifstream file(options_.tuning_file);
    std::string line;
    while (std::getline(file, line)) {
      std::istringstream words(line);
      std::string fingerprint;
      int rows = 0, outs = 0, depth = 0, kind = 0;
      cublasLtMatmulAlgo_t algorithm = {};
      words >> fingerprint >> rows >> outs >> depth >> kind;
      for (auto& word : algorithm.data) words >> word;
      if (!words) continue;
      if (fingerprint == fingerprint_) {
        choices_[{rows, outs, depth, kind}] = {algorithm, false};
      } else {
        others_.push_back(line);
      }
    }
  }
  // A reader sees the old file or the new one.
  void SaveChoices() const {
    if (options_.tuning_file.empty()) return;
    const std::string temporary = absl::StrCat(options_.tuning_file, ".", getpid());
    std::ofstream file(temporary, std::ios::trunc);
    for (const std::string& line : others_) file << line << '\n';
    for (const auto& [key, choice] : choices_) {
      file << fingerprint_ << ' ' << std::get<0>(key) << ' ' << std::get<1>(key) << ' ' << std::get<2>(key) << ' '
           << std::get<3>(key);
      for (const auto word : choice.algorithm.data) file << ' ' << word;
      file << '\n';
    }
    file.close();
    if (!file || std::rename(temporary.c_str(), options_.tuning_file.c_str()) != 0) {
      std::remove(temporary.c_str());
      base::LogWarning(absl::StrCat("cannot write ", options_.tuning_file,
                                    ": products are timed at each start, and the next may choose others"));
    }
  }

  struct Choice {
    cublasLtMatmulAlgo_t algorithm;
    bool checked;  // by this library, with this shape
  };
  const CublasLt library_;
  const CublasLtOptions options_;
  cublasLtHandle_t handle_ = nullptr;
  DeviceBuffer<unsigned char> workspace_;
  Fp8Scratch fp8_;
  bool row_scales_ = false;
  int64_t cache_bytes_ = 0;  // the device's second level
  std::string fingerprint_;
  std::map<Key, Choice> choices_;
  std::vector<std::string> others_;  // lines of other devices and versions
};

}  // namespace

absl::StatusOr<std::unique_ptr<MatMul>> CreateCublasLtMatMulOver(const CublasLt& library,
                                                                 const CublasLtOptions& options) {
  auto matmul = std::make_unique<CublasLtMatMul>(library, options);
  RETURN_IF_ERROR(matmul->Start());
  return matmul;
}

}  // namespace minitron::engine::cuda
