// Tensors of the Open Inference Protocol: reading inputs, writing outputs. Pure.
#pragma once

#include <compat/open_inference.pb.h>

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace minitron::server::compat {

// A decoded input. The elements are in the member of `kind`.
struct InputTensor {
  enum class Kind { kBool, kInt, kFloat, kBytes };
  std::string name;
  Kind kind = Kind::kBytes;
  std::vector<bool> bools;
  std::vector<int64_t> ints;  // of all integer types; UINT64 keeps its bits
  std::vector<double> floats;
  std::vector<std::string> bytes;

  size_t size() const;
};

// Decodes all inputs, from raw_input_contents when there are any, else from the typed contents. Elements must be as
// many as the shape says. Errors: INVALID_ARGUMENT naming the input ("inputs.top_k").
absl::StatusOr<std::vector<InputTensor>> DecodeInputs(const inference::ModelInferRequest& request);

// The one element of an input, checked for its type. Errors as above.
absl::StatusOr<bool> OneBool(const InputTensor& tensor);
absl::StatusOr<int64_t> OneInt(const InputTensor& tensor);
absl::StatusOr<double> OneFloat(const InputTensor& tensor);
absl::StatusOr<std::string> OneText(const InputTensor& tensor);
// All elements of a BYTES input.
absl::StatusOr<std::vector<std::string>> Texts(const InputTensor& tensor);

// Append an output and its raw contents.
void AddBytes(const std::string& name, const std::vector<std::string>& values, inference::ModelInferResponse& out);
void AddFloats(const std::string& name, const std::vector<int64_t>& shape, const std::vector<float>& values,
               inference::ModelInferResponse& out);
void AddUint32(const std::string& name, const std::vector<uint32_t>& values, inference::ModelInferResponse& out);
void AddInt32(const std::string& name, const std::vector<int32_t>& values, inference::ModelInferResponse& out);

}  // namespace minitron::server::compat
