// minitron-bench-engine: the CPU backend against the limits of the machine it runs on.
//   minitron-bench-engine [--threads N] [--shape 1b|1b-square|8b] [--target NAME] [--ops] [--rows 1,8] [--model DIR]
//                         [--quantize none|int8|int4] [--activation-dtype auto|fp32|bf16] [--cache-dir DIR]
//                         [--batches 1,8] [--prefill N] [--chunk N] [--context N] [--steps N] [--repeats N]
// Without --model only the limits and, with --ops, single matrix products are measured.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "engine/cpu/amx_matmul.h"
#include "engine/cpu/cpu_topology.h"
#include "hwy/targets.h"
#include "tests/bench/limits.h"
#include "tests/bench/model_bench.h"
#include "tests/bench/op_bench.h"
#include "tests/bench/random_checkpoint.h"

namespace minitron::bench {
namespace {

struct Options {
  engine::EngineOptions engine;
  engine::NemotronConfig shape;
  std::string target;
  bool ops = false;
  std::vector<int> rows = {1, 2, 3, 4, 6, 8, 12, 16, 32, 128};
  ModelRun run;
};

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "minitron-bench-engine: %s\n", what.c_str());
  std::exit(2);
}

std::vector<int> ParseList(const std::string& text) {
  std::vector<int> values;
  for (size_t at = 0; at < text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    values.push_back(std::atoi(text.substr(at, comma - at).c_str()));
    if (values.back() < 1 || values.back() > 512) Fail(text + ": each in [1, 512]");
    at = comma + 1;
  }
  return values;
}

engine::Quantization ParseQuantization(const std::string& text) {
  if (text == "none") return engine::Quantization::kOff;
  if (text == "int8") return engine::Quantization::kInt8;
  if (text == "int4") return engine::Quantization::kInt4;
  Fail("quantize " + text + " is not none, int8 or int4");
}

engine::ActivationType ParseActivations(const std::string& text) {
  if (text == "auto") return engine::ActivationType::kAuto;
  if (text == "fp32") return engine::ActivationType::kF32;
  if (text == "bf16") return engine::ActivationType::kBf16;
  Fail("activation-dtype " + text + " is not auto, fp32 or bf16");
}

int ParseCount(const std::string& name, const std::string& text, int low, int high) {
  const int value = std::atoi(text.c_str());
  if (value < low || value > high)
    Fail(name + " " + text + " outside [" + std::to_string(low) + ", " + std::to_string(high) + "]");
  return value;
}

Options Parse(int argc, char** argv) {
  Options options;
  ShapeByName("1b", options.shape);
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--ops") {
      options.ops = true;
      continue;
    }
    if (i + 1 == argc) Fail(flag + " needs a value");
    const std::string value = argv[++i];
    if (flag == "--threads") {
      options.engine.num_threads = ParseCount(flag, value, 1, 256);
    } else if (flag == "--shape") {
      if (!ShapeByName(value, options.shape)) Fail("shape " + value + " is not 1b, 1b-square or 8b");
    } else if (flag == "--target") {
      options.target = value;
    } else if (flag == "--model") {
      options.engine.model_dir = value;
    } else if (flag == "--quantize") {
      options.engine.quantization = ParseQuantization(value);
    } else if (flag == "--activation-dtype") {
      options.engine.activation_type = ParseActivations(value);
    } else if (flag == "--rows") {
      options.rows = ParseList(value);
    } else if (flag == "--cache-dir") {
      options.engine.cache_dir = value;
    } else if (flag == "--batches") {
      options.run.batches = ParseList(value);
    } else if (flag == "--prefill") {
      options.run.prefill_tokens = ParseCount(flag, value, 0, 4096);
    } else if (flag == "--chunk") {
      options.run.prefill_chunk = ParseCount(flag, value, 1, 4096);
    } else if (flag == "--context") {
      options.run.decode_context = ParseCount(flag, value, 1, 4096);
    } else if (flag == "--steps") {
      options.run.decode_steps = ParseCount(flag, value, 1, 1024);
    } else if (flag == "--repeats") {
      options.run.repeats = ParseCount(flag, value, 1, 100);
    } else {
      Fail("unknown flag " + flag);
    }
  }
  if (options.engine.num_threads == 0) options.engine.num_threads = engine::cpu::NumUsableCores();
  return options;
}

// Restricts Highway's dispatch to one instruction set, as on a machine that has no better one.
void ChooseTarget(const std::string& name) {
  if (name.empty()) return;
  engine::cpu::AllowAmx(false);
  const int64_t supported = hwy::SupportedTargets() & HWY_TARGETS;
  for (int64_t targets = supported; targets != 0; targets &= targets - 1) {
    const int64_t target = targets & -targets;
    if (name != hwy::TargetName(target)) continue;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    return;
  }
  Fail("target " + name + " is not among this machine's");
}

int Run(const Options& options) {
  ChooseTarget(options.target);
  const int64_t best = hwy::SupportedTargets() & HWY_TARGETS;
  const char* target = engine::cpu::AmxUsable() ? "AMX" : hwy::TargetName(best & -best);
  std::printf("target %s, %d threads\n", target, options.engine.num_threads);
  Limits limits;
  {
    engine::cpu::ThreadPool pool(options.engine.num_threads);
    limits = MeasureLimits(pool);
    std::printf("limits: read %.1f GB/s, fp32 FMA %.1f GFLOP/s\n", limits.read_bytes_per_s * 1e-9,
                limits.fma_flops_per_s * 1e-9);
    if (options.ops) BenchMatMul(pool, limits, options.shape, options.rows);
  }
  if (options.engine.model_dir.empty()) return 0;
  return BenchModel(options.engine, options.run, limits) ? 0 : 1;
}

}  // namespace
}  // namespace minitron::bench

int main(int argc, char** argv) { return minitron::bench::Run(minitron::bench::Parse(argc, argv)); }
