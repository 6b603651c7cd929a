#include "engine/cuda/device_weights.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "engine/base/check.h"
#include "engine/base/status_macros.h"

namespace minitron::engine::cuda {
namespace {

constexpr int64_t kStagingBytes = 32 << 20;  // large enough to reach the link's bandwidth

float F16ToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1Fu, mantissa = bits & 0x3FFu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1.0p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const uint32_t wide_exponent = exponent == 0x1Fu ? 0xFFu : exponent + (127 - 15);
  return std::bit_cast<float>(sign | wide_exponent << 23 | mantissa << 13);
}

uint16_t RoundToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float ElementAsFloat(const WeightView& weight, int64_t i) {
  if (weight.dtype == DType::kF32) return static_cast<const float*>(weight.data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(weight.data)[i];
  return weight.dtype == DType::kF16 ? F16ToFloat(bits) : std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

}  // namespace

void ConvertToBf16(const WeightView& weight, int64_t first, int64_t count, uint16_t* out) {
  if (weight.dtype == DType::kBf16) {
    std::memcpy(out, static_cast<const uint16_t*>(weight.data) + first, static_cast<size_t>(count) * sizeof(uint16_t));
    return;
  }
  for (int64_t i = 0; i < count; ++i) out[i] = RoundToBf16(ElementAsFloat(weight, first + i));
}

void ConvertToFloat(const WeightView& weight, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = ElementAsFloat(weight, first + i);
}

class DeviceWeights::Uploader {
 public:
  explicit Uploader(DeviceWeights& owner) : owner_(owner) {}
  ~Uploader() {
    if (stream_.get() != nullptr) cudaStreamSynchronize(stream_.get());  // copies read the staging memory
  }

  absl::Status Start() {
    ASSIGN_OR_RETURN(stream_, CreateStream());
    for (Turn& turn : turns_) {
      ASSIGN_OR_RETURN(turn.staging, PinnedBuffer::Allocate(kStagingBytes));
      ASSIGN_OR_RETURN(turn.crossed, CreateEvent());
    }
    return absl::OkStatus();
  }

  // Replaces a view of host memory by one of device memory.
  absl::Status Move(WeightView& weight, DType type) {
    CHECK(!IsPanels(weight.dtype) && (type == DType::kBf16 || type == DType::kF32));
    const int64_t element_bytes = DTypeBytes(type);
    ASSIGN_OR_RETURN(DeviceBuffer<unsigned char> buffer,
                     DeviceBuffer<unsigned char>::Allocate(weight.size() * element_bytes));
    const int64_t chunk = kStagingBytes / element_bytes;
    for (int64_t first = 0; first < weight.size(); first += chunk) {
      const int64_t count = std::min(chunk, weight.size() - first);
      Turn& turn = turns_[next_turn_];
      next_turn_ = 1 - next_turn_;
      RETURN_IF_ERROR(ToStatus(cudaEventSynchronize(turn.crossed.get()), "wait for a copy"));
      if (type == DType::kBf16) {
        ConvertToBf16(weight, first, count, reinterpret_cast<uint16_t*>(turn.staging.data()));
      } else {
        ConvertToFloat(weight, first, count, reinterpret_cast<float*>(turn.staging.data()));
      }
      RETURN_IF_ERROR(
          ToStatus(cudaMemcpyAsync(buffer.data() + first * element_bytes, turn.staging.data(),
                                   static_cast<size_t>(count * element_bytes), cudaMemcpyHostToDevice, stream_.get()),
                   "copy to device"));
      RETURN_IF_ERROR(ToStatus(cudaEventRecord(turn.crossed.get(), stream_.get()), "record event"));
    }
    weight.data = buffer.data();
    weight.dtype = type;
    owner_.num_bytes_ += buffer.size();
    owner_.buffers_.push_back(std::move(buffer));
    return absl::OkStatus();
  }

  absl::Status Finish() { return ToStatus(cudaStreamSynchronize(stream_.get()), "stream"); }

 private:
  struct Turn {
    PinnedBuffer staging;
    Event crossed;
  };
  DeviceWeights& owner_;
  Turn turns_[2];
  int next_turn_ = 0;
  Stream stream_;
};

absl::StatusOr<DeviceWeights> DeviceWeights::Upload(const NemotronWeights& host) {
  DeviceWeights device;
  device.weights_ = host;
  NemotronWeights& weights = device.weights_;
  Uploader uploader(device);
  RETURN_IF_ERROR(uploader.Start());
  RETURN_IF_ERROR(uploader.Move(weights.embedding, DType::kBf16));
  for (LayerWeights& layer : weights.layers) {
    for (WeightView* norm :
         {&layer.input_norm_weight, &layer.input_norm_bias, &layer.post_norm_weight, &layer.post_norm_bias}) {
      RETURN_IF_ERROR(uploader.Move(*norm, DType::kF32));
    }
    for (WeightView* matrix :
         {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj, &layer.up_proj, &layer.down_proj}) {
      RETURN_IF_ERROR(uploader.Move(*matrix, DType::kBf16));
    }
  }
  RETURN_IF_ERROR(uploader.Move(weights.final_norm_weight, DType::kF32));
  RETURN_IF_ERROR(uploader.Move(weights.final_norm_bias, DType::kF32));
  RETURN_IF_ERROR(uploader.Move(weights.lm_head, DType::kBf16));
  RETURN_IF_ERROR(uploader.Finish());
  return device;
}

}  // namespace minitron::engine::cuda
