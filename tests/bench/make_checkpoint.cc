// minitron-make-checkpoint SHAPE DIR [SEED]: a random checkpoint of a known shape, for benchmarks.
#include <cstdio>
#include <cstdlib>

#include "tests/bench/random_checkpoint.h"

int main(int argc, char** argv) {
  minitron::engine::NemotronConfig config;
  if (argc < 3 || argc > 4 || !minitron::bench::ShapeByName(argv[1], config)) {
    std::fprintf(stderr, "usage: minitron-make-checkpoint 1b|1b-square|8b|8b-4-layers|test EXISTING_DIR [SEED]\n");
    return 2;
  }
  const uint64_t seed = argc == 4 ? std::strtoull(argv[3], nullptr, 10) : 1;
  return minitron::bench::WriteRandomCheckpoint(argv[2], config, seed) ? 0 : 1;
}
