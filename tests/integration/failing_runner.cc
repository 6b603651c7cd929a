// Instead of the engine: a model whose device is lost after some steps, to see the whole program end.
#include <memory>

#include "engine/model_runner.h"
#include "tests/testing/fake_model_runner.h"

namespace minitron::engine {

absl::StatusOr<std::unique_ptr<ModelRunner>> CreateModelRunner(const EngineOptions&) {
  testing::FakeModelRunnerOptions options;
  options.vocab_size = 2048;   // of the shipped tokenizer
  options.fail_at_step = 100;  // past the self-test
  return std::make_unique<testing::FakeModelRunner>(options);
}

}  // namespace minitron::engine
