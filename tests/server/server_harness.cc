#include "tests/server/server_harness.h"

#include <prometheus/text_serializer.h>

#include <algorithm>

#include "engine/base/check.h"

namespace minitron::server {

using scheduler::FinishReason;

absl::Status ScriptedEngine::Submit(scheduler::Request request) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!refusal.ok()) return refusal;
  const size_t n = static_cast<size_t>(request.num_sequences);
  const scheduler::RequestId id = request.id;
  live_[id] = {std::move(request), std::vector<int>(n), std::vector<bool>(n), std::vector<bool>(n)};
  ++num_submitted_;
  changed_.notify_all();
  return absl::OkStatus();
}

void ScriptedEngine::Abort(scheduler::RequestId id, int index) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++num_aborts_;
  changed_.notify_all();
  const auto found = live_.find(id);
  if (found == live_.end()) return;
  std::vector<bool>& aborted = found->second.aborted;
  if (index < 0) {
    std::fill(aborted.begin(), aborted.end(), true);
  } else {
    aborted[index] = true;
  }
}

void ScriptedEngine::WaitForRequests(int count) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return num_submitted_ >= count; });
}

void ScriptedEngine::WaitForAborts(int count) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return num_aborts_ >= count; });
}

bool ScriptedEngine::WaitForWork() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return stopped_ || !live_.empty() || !engine_error.empty(); });
  return !stopped_;
}

void ScriptedEngine::Stop() {
  std::lock_guard<std::mutex> lock(mutex_);
  stopped_ = true;
  changed_.notify_all();
}

int ScriptedEngine::num_live() {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int>(live_.size());
}

bool ScriptedEngine::Step(OutputProcessor& output) {
  scheduler::StepOutput step;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (live_.empty() && engine_error.empty()) return false;
    step.engine_error = engine_error;
    step.stats.time = now_();
    step.stats.num_blocks = 100;
    if (engine_error.empty()) {
      for (auto& [id, live] : live_) StepOne(live, step);
    }
    std::erase_if(live_, [&](const auto& entry) {
      const std::vector<bool>& finished = entry.second.finished;
      return std::all_of(finished.begin(), finished.end(), [](bool f) { return f; });
    });
    if (!engine_error.empty()) live_.clear();
    engine_error.clear();
    step.stats.num_running = static_cast<int>(live_.size());
    step.stats.num_batch_tokens = step.stats.num_batch_sequences = static_cast<int>(step.tokens.size());
  }
  output.Process(std::move(step));
  return true;
}

void ScriptedEngine::StepOne(Live& live, scheduler::StepOutput& output) {
  const scheduler::Request& request = live.request;
  const bool runs = now_() < request.deadline && !fail_next_request &&
                    std::find(live.aborted.begin(), live.aborted.end(), false) != live.aborted.end();
  if (!live.started && runs) {
    live.started = true;
    if (request.num_prompt_top_logprobs >= 0) {
      scheduler::PromptLogprobsEvent event{request.id, request.prompt_logprobs_start, {}};
      for (size_t i = request.prompt_logprobs_start; i < request.prompt_token_ids.size(); ++i) {
        engine::ResultRowOutput row;
        row.token_id = row.chosen.token_id = request.prompt_token_ids[i];
        row.chosen.logprob = -0.5f;
        row.chosen.rank = 1;
        row.top.resize(request.num_prompt_top_logprobs, row.chosen);
        event.positions.push_back(row);
      }
      output.prompt_logprobs.push_back(event);
    }
    output.prompts_done.push_back({request.id, static_cast<int>(request.prompt_token_ids.size()), 0});
  }
  for (int i = 0; i < request.num_sequences; ++i) {
    if (!live.finished[i]) StepSequence(live, i, output);
  }
  fail_next_request = false;
}

void ScriptedEngine::StepSequence(Live& live, int index, scheduler::StepOutput& output) {
  const scheduler::Request& request = live.request;
  if (live.aborted[index]) return Finish(live, index, FinishReason::kCancelled, 0, output);
  if (now_() >= request.deadline) return Finish(live, index, FinishReason::kDeadline, 0, output);
  if (fail_next_request) return Finish(live, index, FinishReason::kError, 0, output);
  if (request.max_tokens == 0) return Finish(live, index, FinishReason::kLength, 0, output);
  scheduler::TokenEvent event;
  event.id = request.id;
  event.index = index;
  event.output_position = live.num_tokens[index]++;
  event.output.token_id = script[event.output_position % script.size()];
  if (request.num_top_logprobs >= 0) {
    event.output.chosen = {event.output.token_id, -0.25f, 1};
    event.output.top.resize(request.num_top_logprobs, event.output.chosen);
  }
  const TokenId token = event.output.token_id;
  output.tokens.push_back(std::move(event));
  const auto is_in = [&](const std::vector<TokenId>& ids) { return std::count(ids.begin(), ids.end(), token) > 0; };
  if (live.num_tokens[index] >= request.min_tokens && is_in(request.eos_token_ids)) {
    Finish(live, index, FinishReason::kEosToken, token, output);
  } else if (live.num_tokens[index] >= request.min_tokens && is_in(request.stop_token_ids)) {
    Finish(live, index, FinishReason::kStopToken, token, output);
  } else if (live.num_tokens[index] >= request.max_tokens) {
    Finish(live, index, FinishReason::kLength, 0, output);
  }
}

void ScriptedEngine::Finish(Live& live, int index, FinishReason reason, TokenId token, scheduler::StepOutput& output) {
  scheduler::FinishEvent event;
  event.id = live.request.id;
  event.index = index;
  event.reason = reason;
  event.stop_token = token;
  event.num_prompt_tokens = static_cast<int>(live.request.prompt_token_ids.size());
  event.num_output_tokens = live.num_tokens[index];
  event.arrival = live.request.arrival;
  if (live.started) event.first_scheduled = live.request.arrival;
  live.finished[index] = true;
  output.finished.push_back(event);
}

ServerHarness::ServerHarness(const HarnessOptions& options) {
  auto loaded = Tokenizer::Load(std::string(MINITRON_SOURCE_DIR) + "/deploy/models/minitron-tiny", 2048);
  CHECK(loaded.ok());
  tokenizer = *std::move(loaded);
  context.now = [this] { return scheduler::TimePoint(std::chrono::milliseconds(clock_ms.load())); };
  context.model.name = "tiny";
  context.model.info.vocab_size = 2048;
  context.model.info.max_context_tokens = 4096;
  context.model.info.eos_token_ids = {3};
  context.model.info.bos_token_id = 2;
  context.model.tokenizer = tokenizer.get();
  context.limits = {16, 100, 8, 128, 256};
  metrics = std::make_unique<Metrics>(MetricsOptions{"tiny", context.model.info, 100, 16});
  operator_metrics = std::make_unique<OperatorMetrics>(metrics->registry(), metrics->labels());
  if (options.auth != nullptr) auth = std::make_unique<AuthStore>(options.auth);
  tenants = std::make_unique<TenantGate>([this](const std::string& tenant) { return auth->table()->LimitsOf(tenant); },
                                         context.now,
                                         [this](const std::string& tenant, int64_t tokens) {
                                           operator_metrics->CountTenantRequest(tenant, static_cast<double>(tokens));
                                         });
  OutputProcessorOptions output_options;
  output_options.write_stall_timeout = std::chrono::seconds(5);
  output = std::make_unique<OutputProcessor>(output_options, tokenizer.get(), metrics.get(), context.now);
  engine = std::make_unique<ScriptedEngine>(context.now);
  engine->script = Encode("the quick brown fox jumps over the lazy dog");
  output->SetAbort([this](scheduler::RequestId id, int index) { engine->Abort(id, index); });
  output->SetOnEngineFailure([this] { ++num_engine_failures; });
  context.metrics = metrics.get();
  context.operator_metrics = operator_metrics.get();
  context.auth = auth.get();
  context.tenants = tenants.get();
  context.audit = options.audit;
  context.output = output.get();
  context.submit = [this](scheduler::Request request) { return engine->Submit(std::move(request)); };
  context.abort = [this](scheduler::RequestId id) { engine->Abort(id, -1); };
  context.check_admission = [this](const scheduler::Arrival& arrival) { return engine->CheckAdmission(arrival); };
  context.queue_depth = [] { return 0; };
  context.begin_drain = [this] { ++num_drain_requests; };
  GrpcServerOptions grpc_options = options.grpc;
  grpc_options.tls = options.tls;
  grpc_options.host = "127.0.0.1";
  grpc_options.port = 0;
  auto started = GrpcServer::Start(grpc_options, &context);
  CHECK(started.ok());
  server = *std::move(started);
  server->SetReady(true);
  const auto channel = Connect();
  generation = v1::GenerationService::NewStub(channel);
  model = v1::ModelService::NewStub(channel);
  admin = v1::AdminService::NewStub(channel);
}

ServerHarness::~ServerHarness() {
  engine->Stop();
  if (runner_.joinable()) runner_.join();
  server->Shutdown(std::chrono::milliseconds(0));
}

std::shared_ptr<grpc::Channel> ServerHarness::Connect() {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(server->port()), grpc::InsecureChannelCredentials(),
                                   arguments);
}

void ServerHarness::RunEngine() {
  runner_ = std::thread([this] {
    while (engine->WaitForWork()) engine->Step(*output);
  });
}

void ServerHarness::Step(int count) {
  for (int i = 0; i < count; ++i) engine->Step(*output);
}

std::string ServerHarness::MetricsText() {
  return prometheus::TextSerializer().Serialize(metrics->registry()->Collect());
}

}  // namespace minitron::server
