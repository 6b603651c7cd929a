#include "server/compat/open_inference_tensors.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/grpc_status.h"
#include "server/limits.h"

namespace minitron::server::compat {
namespace {

using inference::ModelInferRequest;
using Kind = InputTensor::Kind;

// Raw contents are little-endian on the wire and copied as they are.
static_assert(std::endian::native == std::endian::little);

// Elements of one input at most: more than any list a request may carry (logit biases, stop words).
constexpr int64_t kMaxElements = 4096;

std::string FieldOf(const std::string& name) { return "inputs." + name.substr(0, 64); }

absl::Status BadTensor(const std::string& name, const std::string& message, const Metadata& metadata = {}) {
  return FieldError(FieldOf(name), message, metadata);
}

absl::StatusOr<int64_t> CountElements(const ModelInferRequest::InferInputTensor& input) {
  int64_t count = 1;
  for (const int64_t extent : input.shape()) {
    if (extent < 0) return BadTensor(input.name(), absl::StrCat("extent ", extent, " below 0"));
    if (extent > kMaxElements || count * extent > kMaxElements) {
      return BadTensor(input.name(), absl::StrCat("more than ", kMaxElements, " elements"),
                       {{"limit", absl::StrCat(kMaxElements)}});
    }
    count *= extent;
  }
  return count;
}

absl::Status CheckCount(const std::string& name, int64_t actual, int64_t wanted) {
  if (actual == wanted) return absl::OkStatus();
  return BadTensor(name, absl::StrCat(actual, " elements, its shape says ", wanted),
                   {{"actual", absl::StrCat(actual)}, {"limit", absl::StrCat(wanted)}});
}

// The elements of a raw tensor of fixed-size elements, one by one.
template <typename Element, typename Values>
absl::Status ReadRaw(const std::string& name, const std::string& raw, int64_t count, Values& values) {
  if (raw.size() != static_cast<size_t>(count) * sizeof(Element)) {
    return BadTensor(name, absl::StrCat(raw.size(), " raw bytes, its shape and type say ", count * sizeof(Element)));
  }
  values.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    Element element;
    std::memcpy(&element, raw.data() + static_cast<size_t>(i) * sizeof(Element), sizeof(Element));
    values.push_back(static_cast<typename Values::value_type>(element));
  }
  return absl::OkStatus();
}

absl::Status ReadRawBytes(const std::string& name, const std::string& raw, int64_t count,
                          std::vector<std::string>& values) {
  size_t at = 0;
  while (at < raw.size()) {
    uint32_t size = 0;
    if (raw.size() - at < sizeof(size)) return BadTensor(name, "raw bytes end inside a length");
    std::memcpy(&size, raw.data() + at, sizeof(size));
    at += sizeof(size);
    if (raw.size() - at < size) return BadTensor(name, "raw bytes end inside an element");
    if (values.size() >= static_cast<size_t>(kMaxElements)) break;  // its count is refused below
    values.push_back(raw.substr(at, size));
    at += size;
  }
  return CheckCount(name, static_cast<int64_t>(values.size()), count);
}

// How one data type is read: from raw bytes, and from its typed field.
struct DataTypeEntry {
  const char* name;
  Kind kind;
  absl::Status (*raw)(const std::string& name, const std::string& raw, int64_t count, InputTensor& out);
  void (*typed)(const inference::InferTensorContents& contents, InputTensor& out);
};

template <typename Element>
absl::Status RawInts(const std::string& name, const std::string& raw, int64_t count, InputTensor& out) {
  return ReadRaw<Element>(name, raw, count, out.ints);
}

template <typename Element>
absl::Status RawFloats(const std::string& name, const std::string& raw, int64_t count, InputTensor& out) {
  return ReadRaw<Element>(name, raw, count, out.floats);
}

using Contents = inference::InferTensorContents;
constexpr DataTypeEntry kDataTypes[] = {
    {"BOOL", Kind::kBool,
     [](const std::string& name, const std::string& raw, int64_t count, InputTensor& out) {
       return ReadRaw<uint8_t>(name, raw, count, out.bools);
     },
     [](const Contents& c, InputTensor& out) { out.bools.assign(c.bool_contents().begin(), c.bool_contents().end()); }},
    {"INT32", Kind::kInt, RawInts<int32_t>,
     [](const Contents& c, InputTensor& out) { out.ints.assign(c.int_contents().begin(), c.int_contents().end()); }},
    {"INT64", Kind::kInt, RawInts<int64_t>,
     [](const Contents& c, InputTensor& out) {
       out.ints.assign(c.int64_contents().begin(), c.int64_contents().end());
     }},
    {"UINT32", Kind::kInt, RawInts<uint32_t>,
     [](const Contents& c, InputTensor& out) { out.ints.assign(c.uint_contents().begin(), c.uint_contents().end()); }},
    {"UINT64", Kind::kInt, RawInts<uint64_t>,
     [](const Contents& c, InputTensor& out) {
       for (const uint64_t value : c.uint64_contents()) out.ints.push_back(static_cast<int64_t>(value));
     }},
    {"FP32", Kind::kFloat, RawFloats<float>,
     [](const Contents& c, InputTensor& out) {
       out.floats.assign(c.fp32_contents().begin(), c.fp32_contents().end());
     }},
    {"FP64", Kind::kFloat, RawFloats<double>,
     [](const Contents& c, InputTensor& out) {
       out.floats.assign(c.fp64_contents().begin(), c.fp64_contents().end());
     }},
    {"BYTES", Kind::kBytes,
     [](const std::string& name, const std::string& raw, int64_t count, InputTensor& out) {
       return ReadRawBytes(name, raw, count, out.bytes);
     },
     [](const Contents& c, InputTensor& out) {
       out.bytes.assign(c.bytes_contents().begin(), c.bytes_contents().end());
     }},
};

absl::StatusOr<InputTensor> DecodeOne(const ModelInferRequest::InferInputTensor& input, const std::string* raw) {
  for (const DataTypeEntry& type : kDataTypes) {
    if (input.datatype() != type.name) continue;
    ASSIGN_OR_RETURN(const int64_t count, CountElements(input));
    InputTensor tensor;
    tensor.name = input.name();
    tensor.kind = type.kind;
    if (raw != nullptr) {
      RETURN_IF_ERROR(type.raw(input.name(), *raw, count, tensor));
    } else {
      type.typed(input.contents(), tensor);
      RETURN_IF_ERROR(CheckCount(input.name(), static_cast<int64_t>(tensor.size()), count));
    }
    return tensor;
  }
  const std::string shown = input.datatype().substr(0, 32);
  return BadTensor(
      input.name(),
      absl::StrCat("datatype \"", shown, "\" is none of BOOL, INT32, INT64, UINT32, UINT64, FP32, FP64, BYTES"),
      {{"value", shown}});
}

absl::Status CheckOne(const InputTensor& tensor, Kind kind, const char* type) {
  if (tensor.kind != kind) return BadTensor(tensor.name, absl::StrCat("is not ", type));
  if (tensor.size() == 1) return absl::OkStatus();
  return BadTensor(tensor.name, absl::StrCat(tensor.size(), " elements, 1 is needed"),
                   {{"actual", absl::StrCat(tensor.size())}, {"limit", "1"}});
}

inference::ModelInferResponse::InferOutputTensor& AddOutput(const std::string& name, const char* datatype,
                                                            inference::ModelInferResponse& out) {
  auto& output = *out.add_outputs();
  output.set_name(name);
  output.set_datatype(datatype);
  return output;
}

template <typename Element>
void AddElements(const std::vector<Element>& values, inference::ModelInferResponse& out) {
  std::string& raw = *out.add_raw_output_contents();
  raw.resize(values.size() * sizeof(Element));
  if (!values.empty()) std::memcpy(raw.data(), values.data(), raw.size());
}

}  // namespace

size_t InputTensor::size() const {
  switch (kind) {
    case Kind::kBool:
      return bools.size();
    case Kind::kInt:
      return ints.size();
    case Kind::kFloat:
      return floats.size();
    case Kind::kBytes:
      return bytes.size();
  }
  return 0;
}

absl::StatusOr<std::vector<InputTensor>> DecodeInputs(const ModelInferRequest& request) {
  const int num_raw = request.raw_input_contents_size();
  if (num_raw != 0 && num_raw != request.inputs_size()) {
    return FieldError("raw_input_contents", absl::StrCat(num_raw, " entries for ", request.inputs_size(), " inputs"),
                      {{"actual", absl::StrCat(num_raw)}, {"limit", absl::StrCat(request.inputs_size())}});
  }
  std::vector<InputTensor> tensors;
  for (int i = 0; i < request.inputs_size(); ++i) {
    const std::string* raw = num_raw == 0 ? nullptr : &request.raw_input_contents(i);
    ASSIGN_OR_RETURN(tensors.emplace_back(), DecodeOne(request.inputs(i), raw));
  }
  return tensors;
}

absl::StatusOr<bool> OneBool(const InputTensor& tensor) {
  RETURN_IF_ERROR(CheckOne(tensor, Kind::kBool, "BOOL"));
  return static_cast<bool>(tensor.bools[0]);
}

absl::StatusOr<int64_t> OneInt(const InputTensor& tensor) {
  RETURN_IF_ERROR(CheckOne(tensor, Kind::kInt, "an integer type"));
  return tensor.ints[0];
}

absl::StatusOr<double> OneFloat(const InputTensor& tensor) {
  RETURN_IF_ERROR(CheckOne(tensor, Kind::kFloat, "FP32 or FP64"));
  return tensor.floats[0];
}

absl::StatusOr<std::string> OneText(const InputTensor& tensor) {
  RETURN_IF_ERROR(CheckOne(tensor, Kind::kBytes, "BYTES"));
  return tensor.bytes[0];
}

absl::StatusOr<std::vector<std::string>> Texts(const InputTensor& tensor) {
  if (tensor.kind != Kind::kBytes) return BadTensor(tensor.name, "is not BYTES");
  return tensor.bytes;
}

void AddBytes(const std::string& name, const std::vector<std::string>& values, inference::ModelInferResponse& out) {
  AddOutput(name, "BYTES", out).add_shape(static_cast<int64_t>(values.size()));
  std::string& raw = *out.add_raw_output_contents();
  for (const std::string& value : values) {
    const auto size = static_cast<uint32_t>(value.size());
    raw.append(reinterpret_cast<const char*>(&size), sizeof(size));
    raw.append(value);
  }
}

void AddFloats(const std::string& name, const std::vector<int64_t>& shape, const std::vector<float>& values,
               inference::ModelInferResponse& out) {
  AddOutput(name, "FP32", out).mutable_shape()->Assign(shape.begin(), shape.end());
  AddElements(values, out);
}

void AddUint32(const std::string& name, const std::vector<uint32_t>& values, inference::ModelInferResponse& out) {
  AddOutput(name, "UINT32", out).add_shape(static_cast<int64_t>(values.size()));
  AddElements(values, out);
}

void AddInt32(const std::string& name, const std::vector<int32_t>& values, inference::ModelInferResponse& out) {
  AddOutput(name, "INT32", out).add_shape(static_cast<int64_t>(values.size()));
  AddElements(values, out);
}

}  // namespace minitron::server::compat
