// The matrix products through cublasLt. The library (half a gigabyte) is loaded when it is asked for, so that a program
// with this backend starts on machines without it.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/cuda/matmul.h"

namespace minitron::engine::cuda {

struct CublasLtOptions {
  // One algorithm per weight shape for every number of rows, without split-K: a row's bits do not depend on its batch,
  // which the contract of ModelRunner asks for. Off: the fastest per number of rows.
  bool batch_invariant = true;
  // Where timed choices are kept, keyed by device name and library version. Empty: they are made anew at each start.
  std::string tuning_file;
};

// Loads the library and creates a handle with a 32 MiB workspace. An algorithm is chosen the first time a shape is seen
// outside a capture: every candidate is timed on the operands given, with weights out of the cache, and the winner is
// kept (and written to tuning_file). Errors: FAILED_PRECONDITION when the library is not there or finds no device, else
// as ToStatus.
absl::StatusOr<std::unique_ptr<MatMul>> CreateCublasLtMatMul(const CublasLtOptions& options);

}  // namespace minitron::engine::cuda
