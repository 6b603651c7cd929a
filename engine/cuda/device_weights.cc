#include "engine/cuda/device_weights.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/convert.h"

namespace minitron::engine::cuda {
namespace {

constexpr int64_t kStagingBytes = 16 << 20;  // large enough to reach the link's bandwidth
// One thread copies some 10 GB/s out of the page cache, the link takes several times that. Quantizing is work for every
// core there is, up to what is left to gain.
constexpr int kCopyThreads = 4;
constexpr int kMaxQuantizeThreads = 16;

}  // namespace

WeightFormat FormatOf(DType type) {
  CHECK(IsTiles(type));
  return type == DType::kInt8Tiles   ? WeightFormat::kInt8
         : type == DType::kInt4Tiles ? WeightFormat::kInt4
                                     : WeightFormat::kE4m3;
}

void ConvertToFloat(const WeightView& weight, int64_t first, int64_t count, float* out) {
  if (weight.dtype != DType::kE4m3) {
    WeightsToFloat(weight, first, count, out);
    return;
  }
  const auto* codes = static_cast<const uint8_t*>(weight.data);
  for (int64_t i = first; i < first + count; ++i) *out++ = E4m3Value(codes[i]) * weight.scales[i / weight.cols];
}

void ConvertToBf16(const WeightView& weight, int64_t first, int64_t count, uint16_t* out) {
  if (weight.dtype == DType::kBf16) {
    std::memcpy(out, static_cast<const uint16_t*>(weight.data) + first, static_cast<size_t>(count) * sizeof(uint16_t));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    float value = 0.0f;
    ConvertToFloat(weight, first + i, 1, &value);
    out[i] = FloatToBf16(value);
  }
}

namespace {

// What matrices that are one to the product are stored as: as asked for; else in E4M3 if they all are.
template <typename Views>
DType MatrixType(const Views& views, Quantization quantization) {
  constexpr DType kTypes[] = {DType::kBf16, DType::kInt8Tiles, DType::kInt4Tiles, DType::kE4m3Tiles, DType::kE4m3};
  const bool fp8 = std::all_of(views.begin(), views.end(), [](const auto* v) { return v->dtype == DType::kE4m3; });
  return fp8 && quantization == Quantization::kOff ? DType::kE4m3Tiles : kTypes[static_cast<int>(quantization)];
}
// The head decides between near-equal tokens: it never has less than 8 bits, and its input 16.
template <typename View>
DType HeadType(View& head, Quantization quantization) {
  const Quantization least = quantization == Quantization::kInt4         ? Quantization::kInt8
                             : quantization == Quantization::kFp8Dynamic ? Quantization::kFp8
                                                                         : quantization;
  return MatrixType(std::initializer_list<View*>{&head}, least);
}

// Calls visit({views}, type on the device) for all tensors, those together that lie one behind the other there.
template <typename Weights, typename Visit>
void VisitTensors(Weights& weights, Quantization quantization, const Visit& visit) {
  using View = std::conditional_t<std::is_const_v<Weights>, const WeightView, WeightView>;
  const auto visit_matrices = [&](std::initializer_list<View*> views) {
    visit(views, MatrixType(views, quantization));
  };
  visit({&weights.embedding}, DType::kBf16);
  for (auto& layer : weights.layers) {
    visit({&layer.input_norm_weight}, DType::kF32);
    visit({&layer.input_norm_bias}, DType::kF32);
    visit_matrices({&layer.q_proj, &layer.k_proj, &layer.v_proj});
    visit_matrices({&layer.o_proj});
    visit({&layer.post_norm_weight}, DType::kF32);
    visit({&layer.post_norm_bias}, DType::kF32);
    visit_matrices({&layer.up_proj});
    visit_matrices({&layer.down_proj});
  }
  visit({&weights.final_norm_weight}, DType::kF32);
  visit({&weights.final_norm_bias}, DType::kF32);
  visit({&weights.lm_head}, HeadType(weights.lm_head, quantization));
}

// A tensor as units of which any number can cross by itself: elements, tiles of 16 rows, or rows of E4M3, whose scales
// lie elsewhere.
struct Units {
  int64_t count, bytes, scale_bytes;
  int64_t total() const { return count * (bytes + scale_bytes); }
};
Units UnitsOf(const WeightView& view, DType type) {
  if (type == DType::kE4m3) return {view.rows, view.cols, sizeof(float)};
  if (!IsTiles(type)) return {view.size(), DTypeBytes(type), 0};
  return {NumTiles(view.rows), TileBytes(FormatOf(type), static_cast<int>(view.cols)), 0};
}

// Part of a tensor that crosses in one copy.
struct Piece {
  WeightView source;  // host memory
  DType type = DType::kBf16;
  unsigned char* destination = nullptr;  // of the tensor
  float* scales = nullptr;               // of the tensor, kE4m3
  int64_t first = 0, count = 0;          // units
  int64_t unit_bytes = 0;

  int64_t num_bytes() const { return count * unit_bytes; }
};

// The first number of rows [first_row, ...) of a matrix that is none. Quantized it would pass for one.
absl::Status CheckFinite(const WeightView& matrix, int64_t first_row, const std::vector<float>& numbers,
                         int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (std::isfinite(numbers[i])) continue;
    return absl::InvalidArgumentError(absl::StrCat(numbers[i], " at [", first_row + i / matrix.cols, ", ",
                                                   i % matrix.cols, "]: only finite weights can be quantized"));
  }
  return absl::OkStatus();
}

// Rows of E4M3, then their scales.
absl::Status ConvertToE4m3(const Piece& piece, std::vector<float>& row, unsigned char* out) {
  const int64_t depth = piece.source.cols;
  auto* scales = reinterpret_cast<float*>(out + piece.num_bytes());
  if (piece.source.dtype == DType::kE4m3) {
    std::memcpy(out, static_cast<const unsigned char*>(piece.source.data) + piece.first * depth,
                static_cast<size_t>(piece.num_bytes()));
    std::copy_n(piece.source.scales + piece.first, piece.count, scales);
    return absl::OkStatus();
  }
  row.resize(static_cast<size_t>(depth));
  for (int64_t r = 0; r < piece.count; ++r) {
    ConvertToFloat(piece.source, (piece.first + r) * depth, depth, row.data());
    RETURN_IF_ERROR(CheckFinite(piece.source, piece.first + r, row, depth));
    scales[r] = QuantizeE4m3Row(row.data(), depth, out + r * depth);
  }
  return absl::OkStatus();
}

// Writes the piece as it lies on the device. `rows` is work space. Error: INVALID_ARGUMENT for what is to be quantized
// and not finite.
absl::Status Convert(const Piece& piece, std::vector<float>& rows, unsigned char* out) {
  if (piece.type == DType::kBf16) {
    ConvertToBf16(piece.source, piece.first, piece.count, reinterpret_cast<uint16_t*>(out));
    return absl::OkStatus();
  }
  if (piece.type == DType::kF32) {
    ConvertToFloat(piece.source, piece.first, piece.count, reinterpret_cast<float*>(out));
    return absl::OkStatus();
  }
  if (piece.type == DType::kE4m3) return ConvertToE4m3(piece, rows, out);
  const int64_t depth = piece.source.cols;
  const bool keeps_codes = piece.type == DType::kE4m3Tiles && piece.source.dtype == DType::kE4m3;
  rows.resize(static_cast<size_t>(kTileRows * depth));
  for (int64_t tile = piece.first; tile < piece.first + piece.count; ++tile, out += piece.unit_bytes) {
    const int64_t first_row = tile * kTileRows, count = std::min<int64_t>(kTileRows, piece.source.rows - first_row);
    if (keeps_codes) {
      PackE4m3Tile(static_cast<const uint8_t*>(piece.source.data) + first_row * depth, piece.source.scales + first_row,
                   static_cast<int>(count), static_cast<int>(depth), out);
      continue;
    }
    ConvertToFloat(piece.source, first_row * depth, count * depth, rows.data());
    RETURN_IF_ERROR(CheckFinite(piece.source, first_row, rows, count * depth));
    QuantizeTile(FormatOf(piece.type), rows.data(), static_cast<int>(count), static_cast<int>(depth), out);
  }
  return absl::OkStatus();
}

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
// and f32 are rounded to bf16, matrices quantized). Any one thread.
class Uploader {
 public:
  // `host`: names tensors in errors.
  explicit Uploader(const NemotronWeights& host) : host_(host) {}
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;
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
    const absl::Status converted = Convert(piece, rows_, turn.staging.data());
    if (!converted.ok()) {
      return absl::Status(converted.code(),
                          absl::StrCat("tensor ", host_.NameOf(piece.source.data), " has ", converted.message()));
    }
    const auto copy = [this](void* to, const unsigned char* from, int64_t num_bytes) {
      return ToStatus(cudaMemcpyAsync(to, from, static_cast<size_t>(num_bytes), cudaMemcpyHostToDevice, stream_.get()),
                      "copy to device");
    };
    RETURN_IF_ERROR(copy(piece.destination + piece.first * piece.unit_bytes, turn.staging.data(), piece.num_bytes()));
    if (piece.scales != nullptr) {
      RETURN_IF_ERROR(copy(piece.scales + piece.first, turn.staging.data() + piece.num_bytes(),
                           piece.count * static_cast<int64_t>(sizeof(float))));
    }
    return ToStatus(cudaEventRecord(turn.crossed.get(), stream_.get()), "record event");
  }

  const NemotronWeights& host_;
  std::vector<float> rows_;
  Turn turns_[2];
  Stream stream_;
};

absl::Status UploadPieces(const NemotronWeights& host, PieceQueue& queue, int64_t staging_bytes, int most_threads) {
  const auto num_threads = static_cast<size_t>(std::clamp<int64_t>(queue.size(), 1, most_threads));
  std::vector<absl::Status> statuses(num_threads);
  std::vector<std::thread> threads;
  threads.reserve(num_threads);
  for (absl::Status& status : statuses) {
    threads.emplace_back([&host, &queue, staging_bytes, &status] {
      status = Uploader(host).Run(queue, staging_bytes);
      if (!status.ok()) queue.Fail();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (absl::Status& status : statuses) RETURN_IF_ERROR(status);
  return absl::OkStatus();
}

}  // namespace

int64_t DeviceWeights::NumBytes(const NemotronWeights& host, Quantization quantization) {
  int64_t num_bytes = 0;
  VisitTensors(host, quantization, [&num_bytes](std::initializer_list<const WeightView*> views, DType type) {
    for (const WeightView* view : views) num_bytes += UnitsOf(*view, type).total();
  });
  return num_bytes;
}

bool DeviceWeights::Adjoin(const WeightView& first, const WeightView& second) {
  const Units units = UnitsOf(first, first.dtype);
  return first.dtype == second.dtype && first.cols == second.cols &&
         (!IsTiles(first.dtype) || first.rows % kTileRows == 0) &&
         (first.dtype != DType::kE4m3 || first.scales + first.rows == second.scales) &&
         static_cast<const unsigned char*>(first.data) + units.count * units.bytes == second.data;
}

absl::Status DeviceWeights::CheckShapes(const NemotronConfig& config, const NemotronWeights& host,
                                        Quantization quantization) {
  if (quantization == Quantization::kOff && !host.has_fp8()) return absl::OkStatus();
  for (const auto& [name, depth] : {std::pair{"hidden_size", config.hidden_size},
                                    {"intermediate_size", config.intermediate_size},
                                    {"num_attention_heads * head_dim", config.query_width()}}) {
    if (depth % kDepthStep != 0) {
      return absl::InvalidArgumentError(absl::StrCat("the cuda backend has no kernel for quantized weights with ", name,
                                                     " ", depth, ": a multiple of ", kDepthStep));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<DeviceWeights> DeviceWeights::Upload(const NemotronWeights& host, Quantization quantization) {
  DeviceWeights device;
  device.weights_ = host;
  device.num_bytes_ = NumBytes(host, quantization);
  std::vector<Piece> pieces;
  int64_t staging_bytes = 0;
  absl::Status status;
  // Tensors of one buffer: a layer's Q, K and V are one matrix to the product.
  const auto add = [&](std::initializer_list<WeightView*> views, DType type) {
    int64_t num_bytes = 0, unscaled_bytes = 0;
    for (const WeightView* view : views) {
      CHECK(!IsPanels(view->dtype) && !IsTiles(view->dtype));
      num_bytes += UnitsOf(*view, type).total();
      unscaled_bytes += UnitsOf(*view, type).count * UnitsOf(*view, type).bytes;
    }
    if (!status.ok()) return;
    auto buffer = DeviceBuffer<unsigned char>::Allocate(num_bytes);
    status = buffer.status();
    if (!status.ok()) return;
    unsigned char* destination = buffer->data();
    auto* scales = type == DType::kE4m3 ? reinterpret_cast<float*>(destination + unscaled_bytes) : nullptr;
    for (WeightView* view : views) {
      const Units units = UnitsOf(*view, type);
      const int64_t most = std::max<int64_t>(1, kStagingBytes / units.bytes);
      for (int64_t first = 0; first < units.count; first += most) {
        const int64_t count = std::min(most, units.count - first);
        pieces.push_back({*view, type, destination, scales, first, count, units.bytes});
        staging_bytes = std::max(staging_bytes, count * (units.bytes + units.scale_bytes));
      }
      view->data = destination;
      view->dtype = type;
      view->scales = scales;
      destination += units.count * units.bytes;
      if (scales != nullptr) scales += view->rows;
    }
    device.buffers_.push_back(*std::move(buffer));
  };
  VisitTensors(device.weights_, quantization, add);
  RETURN_IF_ERROR(status);
  PieceQueue queue(std::move(pieces));
  const int num_cores = static_cast<int>(std::thread::hardware_concurrency());
  const int most_threads = quantization == Quantization::kOff && !host.has_fp8()
                               ? kCopyThreads
                               : std::clamp(num_cores, kCopyThreads, kMaxQuantizeThreads);
  RETURN_IF_ERROR(UploadPieces(host, queue, staging_bytes, most_threads));
  return device;
}

}  // namespace minitron::engine::cuda
