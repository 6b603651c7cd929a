// DeviceWeights: the model's weights on the device: matrices as bf16 or quantized, embedding as bf16, norms as fp32.
// Matrices that are in E4M3 on disk keep their codes, unless another format is asked for.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/quantized_weights.h"
#include "engine/model_config.h"
#include "engine/model_runner.h"
#include "engine/nemotron_weights.h"

namespace minitron::engine::cuda {

// Owns the memory; weights() points into it.
class DeviceWeights {
 public:
  // Copies every tensor by several threads, each through two pinned buffers that take turns: while one crosses, the
  // other is filled (f16 and f32 rounded to bf16, matrices quantized). The memory is allocated and the threads end
  // before it returns. Errors: as ToStatus; RESOURCE_EXHAUSTED when the weights do not fit;
  // INVALID_ARGUMENT for NaN or infinity in a matrix that is to be quantized (names the tensor and the place).
  static absl::StatusOr<DeviceWeights> Upload(const NemotronWeights& host, Quantization quantization);

  // What Upload allocates.
  static int64_t NumBytes(const NemotronWeights& host, Quantization quantization);
  // Error: INVALID_ARGUMENT for a depth the quantized product has no kernel for.
  static absl::Status CheckShapes(const NemotronConfig& config, const NemotronWeights& host, Quantization quantization);

  // Whether two matrices on the device can be read as one, the second's rows behind the first's.
  static bool Adjoin(const WeightView& first, const WeightView& second);

  const NemotronWeights& weights() const { return weights_; }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  NemotronWeights weights_;
  std::vector<DeviceBuffer<unsigned char>> buffers_;
  int64_t num_bytes_ = 0;
};

// The format of a type of tiles.
WeightFormat FormatOf(DType type);

// `count` elements from element `first` of a weight as bf16 (rounded to nearest even) or fp32.
void ConvertToBf16(const WeightView& weight, int64_t first, int64_t count, uint16_t* out);
void ConvertToFloat(const WeightView& weight, int64_t first, int64_t count, float* out);

}  // namespace minitron::engine::cuda
