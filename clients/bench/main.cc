// minitron-bench: the load generator. Order: options, model, prompts, runs, reports.
#include <signal.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/bench/bench_options.h"
#include "clients/bench/html_report.h"
#include "clients/bench/json_report.h"
#include "clients/bench/load_run.h"
#include "clients/cpp/client.h"
#include "clients/cpp/commands.h"
#include "clients/cpp/format.h"

namespace minitron::bench {
namespace {

constexpr int kExitNothingCompleted = 3;

std::atomic<bool> stop_requested{false};
static_assert(std::atomic<bool>::is_always_lock_free, "set in a signal handler");

// The second Ctrl-C ends the process, as if there were no handler.
void InstallInterruptHandler() {
  struct sigaction action {};
  action.sa_handler = [](int) { stop_requested.store(true); };
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

int Fail(const std::string& message, int code) {
  std::fprintf(stderr, "minitron-bench: %s\n", message.c_str());
  return code;
}

std::unique_ptr<Driver> MakeDriver(const BenchOptions& options) {
  if (options.protocol == "oip") return MakeOpenInferenceDriver(options.driver);
  if (options.protocol == "vllm") return MakeVllmDriver(options.driver);
  if (options.protocol == "openai") return MakeOpenAiDriver(options.driver);
  return MakeNativeDriver(options.driver);
}

client::Client NativeClient(const DriverOptions& driver) {
  return client::Client({driver.target, std::chrono::seconds(10), driver.metadata, driver.tls});
}

std::optional<DatasetError> MakePrompts(const BenchOptions& options, uint64_t run, std::vector<Prompt>* prompts) {
  DatasetOptions made = options.prompts;
  // Every run has prompts of its own: the server may keep those of the run before in its cache.
  made.seed += run * 1'000'003;
  prompts->clear();
  if (options.dataset == "random") {
    *prompts = RandomPrompts(made);
  } else if (options.dataset == "shared-prefix") {
    *prompts = SharedPrefixPrompts(made);
  } else if (options.dataset == "mooncake") {
    return ReadMooncake(options.dataset_path, made, prompts);
  } else {
    TokenCounter count_tokens;
    if (options.protocol == "native") {
      const auto client = std::make_shared<client::Client>(NativeClient(options.driver));
      count_tokens = [client](const std::string& text) {
        v1::TokenizeRequest request;
        request.set_text(text);
        v1::TokenizeResponse response;
        const bool failed = client->Tokenize(request, &response).has_value();
        return failed ? static_cast<uint32_t>(text.size() / 4 + 1) : static_cast<uint32_t>(response.token_ids_size());
      };
    }
    return options.dataset == "jsonl" ? ReadJsonLines(options.dataset_path, made, count_tokens, prompts)
                                      : ReadShareGpt(options.dataset_path, made, count_tokens, prompts);
  }
  return std::nullopt;
}

// Open Inference has no tensor for token ids.
std::string CheckPrompts(const BenchOptions& options, const Driver& driver, const std::vector<Prompt>& prompts) {
  if (options.replay && prompts.front().arrival_s < 0) return "--replay: the data set has no timestamps";
  for (const Prompt& prompt : prompts) {
    if (!driver.takes_ids() && !prompt.ids.empty()) return "--protocol oip takes texts, and the data set has token ids";
  }
  return "";
}

void PrintProgress(const std::string& label, const Progress& progress) {
  std::fprintf(stderr, "\r%s: %zu of %zu ended, %zu open, %zu failed, %.1f s, %.0f tokens/s\x1b[K", label.c_str(),
               progress.ended, progress.total, progress.sent - progress.ended, progress.failed, progress.elapsed_s,
               progress.elapsed_s > 0 ? static_cast<double>(progress.output_tokens) / progress.elapsed_s : 0);
  if (progress.ended == progress.total) std::fputs("\r\x1b[K", stderr);
}

RunResult RunPlanned(const BenchOptions& options, const RunPlan& plan, const std::vector<Prompt>& prompts,
                     Driver* driver) {
  LoadOptions load;
  load.max_concurrency = plan.max_concurrency;
  load.stop = &stop_requested;
  if (!options.quiet) load.on_progress = [&plan](const Progress& progress) { PrintProgress(plan.label, progress); };
  if (options.replay) {
    for (const Prompt& prompt : prompts) load.offsets.push_back(prompt.arrival_s * options.time_scale);
  } else if (plan.rate > 0) {
    ArrivalOptions arrivals = options.arrivals;
    arrivals.rate = plan.rate;
    load.offsets = ArrivalOffsets(arrivals, prompts.size());
  }
  RunResult run = RunLoad(prompts, load, driver);
  run.label = plan.label;
  run.request_rate = plan.rate;
  run.burstiness = options.arrivals.burstiness;
  run.max_concurrency = plan.max_concurrency;
  return run;
}

// Requests that count nowhere: connections are made, memory is touched.
void WarmUp(const BenchOptions& options, Driver* driver) {
  if (options.warmup == 0) return;
  DatasetOptions made = options.prompts;
  made.count = options.warmup;
  made.seed = ~made.seed;
  RunPlan plan = options.plans.front();
  plan.label = "warm-up";
  plan.rate = 0;
  if (plan.max_concurrency == 0) plan.max_concurrency = 8;
  BenchOptions closed = options;
  closed.replay = false;
  RunPlanned(closed, plan, RandomPrompts(made), driver);
}

// The name and the vocabulary of the served model.
std::optional<client::Error> AskModel(BenchOptions* options) {
  if (options->protocol == "vllm") {
    ModelAnswer answer;
    if (auto error = AskVllmModel(options->driver, &answer)) return error;
    if (options->driver.model.empty()) options->driver.model = answer.name;
    options->prompts.vocab_size = answer.vocab_size;
  }
  if (options->protocol != "native") return std::nullopt;
  client::Client client = NativeClient(options->driver);
  v1::Model model;
  if (auto error = client.GetModel(options->driver.model, &model)) return error;
  options->driver.model = model.name();
  options->prompts.vocab_size = model.vocab_size();
  return std::nullopt;
}

std::string Now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof(text), "%Y%m%d-%H%M%S", &parts);
  return text;
}

// Runs everything; the files are open and the options are good.
int RunAll(const BenchOptions& options, bool json, std::ofstream* result, std::ofstream* report) {
  const std::unique_ptr<Driver> driver = MakeDriver(options);
  const ReportContext context{Now(),           options.protocol,     options.driver.target, options.driver.model,
                              options.dataset, options.prompts.seed, options.targets,       options.detailed};
  std::vector<ReportedRun> runs;
  size_t completed = 0;
  for (const RunPlan& plan : options.plans) {
    std::vector<Prompt> prompts;
    if (const auto error = MakePrompts(options, runs.size(), &prompts)) return Fail(error->message, client::kExitUsage);
    if (const std::string error = CheckPrompts(options, *driver, prompts); !error.empty()) {
      return Fail(error, client::kExitUsage);
    }
    if (runs.empty()) WarmUp(options, driver.get());
    if (stop_requested.load()) break;
    RunResult run = RunPlanned(options, plan, prompts, driver.get());
    const Summary summary = Summarize(run, options.targets, std::thread::hardware_concurrency());
    completed += summary.completed;
    const std::string line = JsonLine(context, run, summary);
    if (!client::Print(json ? line : (runs.empty() ? "" : "\n") + TextReport(context, run, summary))) {
      return client::kExitOutput;
    }
    if (result->is_open()) *result << line << std::flush;
    runs.push_back({std::move(run), summary});
  }
  if (report->is_open()) *report << HtmlReport(context, runs) << std::flush;
  if (!*result || !*report) return Fail("--result or --report could not be written", client::kExitOutput);
  if (stop_requested.load()) return client::kExitInterrupted;
  return completed > 0 ? client::kExitOk : kExitNothingCompleted;
}

int Run(const std::vector<std::string>& args) {
  client::Arguments arguments;
  if (const auto error = client::Arguments::Parse(BenchSpec(), args, &arguments)) {
    return Fail(error->message, client::kExitUsage);
  }
  if (arguments.Has("help")) {
    static constexpr char kExitCodes[] =
        "\nExit codes: 0 done; 1 output failed; 2 wrong command line or data set; 3 no request completed; 130 "
        "interrupted;\n10 + gRPC status code when the server could not be asked for its model.\n";
    return client::Print(client::Help(BenchSpec(), "minitron-bench") + kExitCodes) ? client::kExitOk
                                                                                   : client::kExitOutput;
  }
  BenchOptions options;
  if (const auto error = ReadBenchOptions(arguments, &options)) return Fail(error->message, client::kExitUsage);
  if (const auto error =
          client::ReadSecurity(arguments, nullptr, nullptr, &options.driver.tls, &options.driver.metadata)) {
    return Fail(error->message, client::kExitUsage);
  }
  if (const auto error = AskModel(&options)) {
    return Fail(client::FormatError(*error, options.driver.target), client::ExitCode(*error));
  }
  std::ofstream result;
  std::ofstream report;
  if (!options.result_path.empty()) result.open(options.result_path, std::ios::app);
  if (!options.report_path.empty()) report.open(options.report_path);
  if (!result) return Fail("cannot write " + options.result_path, client::kExitOutput);
  if (!report) return Fail("cannot write " + options.report_path, client::kExitOutput);
  InstallInterruptHandler();
  return RunAll(options, arguments.Has("json"), &result, &report);
}

}  // namespace
}  // namespace minitron::bench

int main(int argc, char** argv) {
  setenv("GRPC_VERBOSITY", "NONE", 0);  // an error is told once, by us; set it to see gRPC's own lines
  std::signal(SIGPIPE, SIG_IGN);
  return minitron::bench::Run({argv + 1, argv + argc});
}
