// A cublasLt for tests: its functions over the emulation, with algorithms a test makes up. It computes as the reference
// does, whatever the algorithm, keeps a record of its calls, and aborts where it is not used as the library asks.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/cuda/cublaslt_library.h"

namespace minitron::engine::cuda {

struct FakeAlgorithm {
  uint64_t id = 0;
  float milliseconds = 1.0f;  // what a product pretends to take
  uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_NONE;
  int32_t num_splits = 1;
  bool fails = false;             // the product returns an error
  bool refused = false;           // cublasLtMatmulAlgoCheck does not take it
  bool ignores_the_mask = false;  // the heuristic names it whatever was asked for
};

// The library there is. One test at a time.
struct FakeLibrary {
  std::vector<FakeAlgorithm> algorithms;  // in the heuristic's order
  size_t version = 130100;
  bool has_fp8 = true, has_row_scales = true;

  // What was called.
  struct Product {
    uint64_t algorithm;
    int rows, outs, depth;
  };
  std::vector<Product> products;
  std::vector<uint32_t> masks;   // of the heuristic's calls
  std::vector<int> asked_rows;   // the same
  uint64_t workspace_bytes = 0;  // the last preference's
  int num_live = 0;              // handles, descriptions, layouts and preferences that were not destroyed
};
FakeLibrary& TheLibrary();

// Its functions.
CublasLt FakeFunctions();

}  // namespace minitron::engine::cuda
