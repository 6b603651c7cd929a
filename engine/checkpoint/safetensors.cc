#include "engine/checkpoint/safetensors.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/checked_math.h"
#include "engine/checkpoint/json.h"

namespace minitron::engine {
namespace {

constexpr int64_t kLengthBytes = 8;
// A tensor of rank 2 takes eight values; rank 8 takes fourteen. Metadata shares the budget.
constexpr int64_t kMaxHeaderValues = 1'500'000;
constexpr char kMetadataKey[] = "__metadata__";

absl::Status Malformed(const std::string& file, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(file, ": ", what));
}

absl::Status BadTensor(const std::string& file, const std::string& name, const std::string& what) {
  return Malformed(file, absl::StrCat("tensor \"", name, "\": ", what));
}

std::optional<DType> ParseDType(const std::string& text) {
  if (text == "BF16") return DType::kBf16;
  if (text == "F16") return DType::kF16;
  if (text == "F32") return DType::kF32;
  if (text == "F8_E4M3") return DType::kE4m3;
  return std::nullopt;
}

absl::Status CheckMetadata(const std::string& file, const JsonValue& metadata) {
  if (!metadata.is(JsonValue::Type::kObject)) {
    return Malformed(file, absl::StrCat("__metadata__ ", metadata.Describe(), " is not an object"));
  }
  for (size_t i = 0; i < metadata.items.size(); ++i) {
    if (!metadata.items[i].is(JsonValue::Type::kString)) {
      return Malformed(file, absl::StrCat("__metadata__.", metadata.keys[i].substr(0, 64), " ",
                                          metadata.items[i].Describe(), " is not a string"));
    }
  }
  return absl::OkStatus();
}

// An array of at most `max_items` non-negative integers.
std::optional<std::vector<int64_t>> Integers(const JsonValue* value, int64_t max_items) {
  if (value == nullptr || !value->is(JsonValue::Type::kArray)) return std::nullopt;
  if (static_cast<int64_t>(value->items.size()) > max_items) return std::nullopt;
  std::vector<int64_t> integers;
  for (const JsonValue& item : value->items) {
    if (!item.is(JsonValue::Type::kInt) || item.integer < 0) return std::nullopt;
    integers.push_back(item.integer);
  }
  return integers;
}

std::string DescribeMember(const JsonValue& info, const std::string& key) {
  const JsonValue* value = info.Find(key);
  return absl::StrCat(key, " ", value == nullptr ? "missing" : value->Describe());
}

// `buffer_begin` is the file offset of the tensor bytes, `buffer_bytes` their number.
absl::StatusOr<StoredTensor> ParseTensor(const std::string& file, const std::string& name, const JsonValue& info,
                                         int64_t buffer_begin, int64_t buffer_bytes) {
  if (!IsTensorName(name)) return Malformed(file, "a tensor name is empty, over 4096 bytes, or holds a NUL");
  if (!info.is(JsonValue::Type::kObject) || info.items.size() != 3) {
    return BadTensor(file, name, "needs exactly dtype, shape and data_offsets");
  }
  const JsonValue* dtype = info.Find("dtype");
  const std::optional<DType> parsed_dtype =
      dtype != nullptr && dtype->is(JsonValue::Type::kString) ? ParseDType(dtype->string) : std::nullopt;
  if (!parsed_dtype)
    return BadTensor(file, name, DescribeMember(info, "dtype") + ", supported: BF16, F16, F32, F8_E4M3");
  const std::optional<std::vector<int64_t>> shape = Integers(info.Find("shape"), kMaxRank);
  if (!shape) return BadTensor(file, name, DescribeMember(info, "shape") + " is not a list of up to 8 sizes");
  const std::optional<std::vector<int64_t>> offsets = Integers(info.Find("data_offsets"), 2);
  if (!offsets || offsets->size() != 2) {
    return BadTensor(file, name, DescribeMember(info, "data_offsets") + " is not a pair of offsets");
  }
  const int64_t begin = (*offsets)[0], end = (*offsets)[1];
  if (begin > end || end > buffer_bytes) {
    return BadTensor(file, name,
                     absl::StrCat("data_offsets [", begin, ", ", end, "] outside the ", buffer_bytes, " data bytes"));
  }
  const std::optional<int64_t> count = CheckedProduct(*shape);
  const std::optional<int64_t> num_bytes = count ? CheckedMul(*count, DTypeBytes(*parsed_dtype)) : std::nullopt;
  if (!num_bytes) return BadTensor(file, name, DescribeMember(info, "shape") + " overflows 63 bits");
  if (*num_bytes != end - begin) {
    return BadTensor(file, name,
                     absl::StrCat(DescribeMember(info, "shape"), " of ", DTypeName(*parsed_dtype), " takes ",
                                  *num_bytes, " bytes, data_offsets span ", end - begin));
  }
  return StoredTensor{name, *parsed_dtype, *shape, buffer_begin + begin, *num_bytes};
}

// Tensors must tile [begin, end): a byte outside all of them could be anything, one in two of them is a trick.
absl::Status CheckTiling(const std::string& file, const std::vector<StoredTensor>& tensors, int64_t begin,
                         int64_t end) {
  std::vector<const StoredTensor*> order;
  order.reserve(tensors.size());
  for (const StoredTensor& tensor : tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const StoredTensor* a, const StoredTensor* b) {
    return std::pair(a->offset, a->num_bytes) < std::pair(b->offset, b->num_bytes);
  });
  int64_t covered = begin;
  for (const StoredTensor* tensor : order) {
    if (tensor->offset != covered) {
      return BadTensor(file, tensor->name,
                       absl::StrCat("data begins at ", tensor->offset - begin, ", expected ", covered - begin,
                                    tensor->offset < covered ? " (overlap)" : " (hole)"));
    }
    covered += tensor->num_bytes;
  }
  if (covered != end) return Malformed(file, absl::StrCat(end - covered, " bytes after the last tensor"));
  return absl::OkStatus();
}

}  // namespace

bool IsTensorName(const std::string& name) {
  return !name.empty() && name.size() <= kMaxTensorNameBytes && name.find('\0') == std::string::npos;
}

absl::StatusOr<std::vector<StoredTensor>> ParseSafetensors(const uint8_t* data, int64_t size, const std::string& file) {
  if (size < kLengthBytes) return Malformed(file, absl::StrCat(size, " bytes, too short for a safetensors file"));
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, data, kLengthBytes);
  if (header_bytes > static_cast<uint64_t>(kMaxHeaderBytes)) {
    return Malformed(file, absl::StrCat("header of ", header_bytes, " bytes, limit ", kMaxHeaderBytes));
  }
  const int64_t buffer_begin = kLengthBytes + static_cast<int64_t>(header_bytes);
  if (buffer_begin > size) {
    return Malformed(file, absl::StrCat("header of ", header_bytes, " bytes in a file of ", size, " (truncated?)"));
  }
  if (header_bytes == 0 || data[kLengthBytes] != '{') return Malformed(file, "header does not start with '{'");
  JsonValue header;
  std::string error;
  const JsonLimits limits{.max_bytes = kMaxHeaderBytes, .max_values = kMaxHeaderValues, .max_depth = 64};
  if (!ParseJson(reinterpret_cast<const char*>(data) + kLengthBytes, static_cast<int64_t>(header_bytes), limits,
                 &header, &error)) {
    return Malformed(file, absl::StrCat("header: ", error));
  }
  const int64_t num_tensors =
      static_cast<int64_t>(header.items.size()) - (header.Find(kMetadataKey) == nullptr ? 0 : 1);
  if (num_tensors > kMaxTensors) {
    return Malformed(file, absl::StrCat(num_tensors, " tensors, limit ", kMaxTensors));
  }
  std::vector<StoredTensor> tensors;
  tensors.reserve(header.items.size());
  for (size_t i = 0; i < header.items.size(); ++i) {
    if (header.keys[i] == kMetadataKey) {
      RETURN_IF_ERROR(CheckMetadata(file, header.items[i]));
      continue;
    }
    ASSIGN_OR_RETURN(StoredTensor tensor,
                     ParseTensor(file, header.keys[i], header.items[i], buffer_begin, size - buffer_begin));
    tensors.push_back(std::move(tensor));
  }
  RETURN_IF_ERROR(CheckTiling(file, tensors, buffer_begin, size));
  return tensors;
}

}  // namespace minitron::engine
