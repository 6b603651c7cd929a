#include "engine/cuda/device_weights.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "engine/base/check.h"
#include "engine/base/status_macros.h"

namespace minitron::engine::cuda {
namespace {

constexpr int64_t kStagingBytes = 16 << 20;  // large enough to reach the link's bandwidth
// One thread copies some 10 GB/s out of the page cache, the link takes several times that.
constexpr int kMaxUploadThreads = 4;

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

namespace {

// Calls visit(view, type on the device) for every tensor.
template <typename Weights, typename Visit>
void VisitTensors(Weights& weights, const Visit& visit) {
  visit(weights.embedding, DType::kBf16);
  for (auto& layer : weights.layers) {
    visit(layer.input_norm_weight, DType::kF32);
    visit(layer.input_norm_bias, DType::kF32);
    visit(layer.q_proj, DType::kBf16);
    visit(layer.k_proj, DType::kBf16);
    visit(layer.v_proj, DType::kBf16);
    visit(layer.o_proj, DType::kBf16);
    visit(layer.post_norm_weight, DType::kF32);
    visit(layer.post_norm_bias, DType::kF32);
    visit(layer.up_proj, DType::kBf16);
    visit(layer.down_proj, DType::kBf16);
  }
  visit(weights.final_norm_weight, DType::kF32);
  visit(weights.final_norm_bias, DType::kF32);
  visit(weights.lm_head, DType::kBf16);
}

// Part of a tensor that crosses in one copy.
struct Piece {
  WeightView source;  // host memory
  DType type = DType::kBf16;
  unsigned char* destination = nullptr;
  int64_t first = 0, count = 0;  // elements
};

// Pieces handed out one by one to the threads that copy them.
class PieceQueue {
 public:
  explicit PieceQueue(std::vector<Piece> pieces) : pieces_(std::move(pieces)) {}

  // Null when there is none left, or a thread has failed.
  const Piece* Next() {
    const size_t index = next_.fetch_add(1, std::memory_order_relaxed);
    return failed_.load(std::memory_order_relaxed) || index >= pieces_.size() ? nullptr : &pieces_[index];
  }
  void Fail() { failed_.store(true, std::memory_order_relaxed); }
  int64_t size() const { return static_cast<int64_t>(pieces_.size()); }

 private:
  const std::vector<Piece> pieces_;
  std::atomic<size_t> next_{0};
  std::atomic<bool> failed_{false};
};

// Copies pieces on a stream of its own. Two pinned buffers take turns: while one crosses, the other is filled (and f16
// and f32 are rounded to bf16). Any one thread.
class Uploader {
 public:
  ~Uploader() {
    if (stream_.get() != nullptr) cudaStreamSynchronize(stream_.get());  // copies read the staging memory
  }

  absl::Status Run(PieceQueue& queue, int64_t staging_bytes) {
    ASSIGN_OR_RETURN(stream_, CreateStream());
    for (Turn& turn : turns_) {
      ASSIGN_OR_RETURN(turn.staging, PinnedBuffer::Allocate(staging_bytes));
      ASSIGN_OR_RETURN(turn.crossed, CreateEvent());
    }
    for (int turn = 0; const Piece* piece = queue.Next(); turn = 1 - turn) RETURN_IF_ERROR(Copy(*piece, turns_[turn]));
    return ToStatus(cudaStreamSynchronize(stream_.get()), "stream");
  }

 private:
  struct Turn {
    PinnedBuffer staging;
    Event crossed;
  };

  absl::Status Copy(const Piece& piece, const Turn& turn) {
    RETURN_IF_ERROR(ToStatus(cudaEventSynchronize(turn.crossed.get()), "wait for a copy"));
    if (piece.type == DType::kBf16) {
      ConvertToBf16(piece.source, piece.first, piece.count, reinterpret_cast<uint16_t*>(turn.staging.data()));
    } else {
      ConvertToFloat(piece.source, piece.first, piece.count, reinterpret_cast<float*>(turn.staging.data()));
    }
    const int64_t element_bytes = DTypeBytes(piece.type);
    RETURN_IF_ERROR(ToStatus(
        cudaMemcpyAsync(piece.destination + piece.first * element_bytes, turn.staging.data(),
                        static_cast<size_t>(piece.count * element_bytes), cudaMemcpyHostToDevice, stream_.get()),
        "copy to device"));
    return ToStatus(cudaEventRecord(turn.crossed.get(), stream_.get()), "record event");
  }

  Turn turns_[2];
  Stream stream_;
};

absl::Status UploadPieces(PieceQueue& queue, int64_t staging_bytes) {
  const auto num_threads = static_cast<size_t>(std::clamp<int64_t>(queue.size(), 1, kMaxUploadThreads));
  std::vector<absl::Status> statuses(num_threads);
  std::vector<std::thread> threads;
  threads.reserve(num_threads);
  for (absl::Status& status : statuses) {
    threads.emplace_back([&queue, staging_bytes, &status] {
      status = Uploader().Run(queue, staging_bytes);
      if (!status.ok()) queue.Fail();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (absl::Status& status : statuses) RETURN_IF_ERROR(status);
  return absl::OkStatus();
}

}  // namespace

int64_t DeviceWeights::NumBytes(const NemotronWeights& host) {
  int64_t num_bytes = 0;
  VisitTensors(host, [&num_bytes](const WeightView& view, DType type) { num_bytes += view.size() * DTypeBytes(type); });
  return num_bytes;
}

absl::StatusOr<DeviceWeights> DeviceWeights::Upload(const NemotronWeights& host) {
  DeviceWeights device;
  device.weights_ = host;
  device.num_bytes_ = NumBytes(host);
  std::vector<Piece> pieces;
  int64_t staging_bytes = 0;
  absl::Status status;
  VisitTensors(device.weights_, [&](WeightView& view, DType type) {
    if (!status.ok()) return;
    CHECK(!IsPanels(view.dtype));
    const int64_t element_bytes = DTypeBytes(type);
    auto buffer = DeviceBuffer<unsigned char>::Allocate(view.size() * element_bytes);
    status = buffer.status();
    if (!status.ok()) return;
    const int64_t most = kStagingBytes / element_bytes;
    for (int64_t first = 0; first < view.size(); first += most) {
      const int64_t count = std::min(most, view.size() - first);
      pieces.push_back({view, type, buffer->data(), first, count});
      staging_bytes = std::max(staging_bytes, count * element_bytes);
    }
    view.data = buffer->data();
    view.dtype = type;
    device.buffers_.push_back(*std::move(buffer));
  });
  RETURN_IF_ERROR(status);
  PieceQueue queue(std::move(pieces));
  RETURN_IF_ERROR(UploadPieces(queue, staging_bytes));
  return device;
}

}  // namespace minitron::engine::cuda
