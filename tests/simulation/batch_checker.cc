#include "tests/simulation/batch_checker.h"

#include <algorithm>

namespace minitron::simulation {

using engine::BlockId;
using scheduler::Request;
using scheduler::Sequence;

BatchChecker::BatchChecker(const testing::FakeModelRunnerOptions& runner, const scheduler::SchedulerOptions& options,
                           Marks* marks, Violations* violations)
    : options_(options), marks_(marks), violations_(violations), fake_(runner), writers_(runner.num_kv_blocks) {}

absl::Status BatchChecker::Submit(const engine::Batch& batch) {
  CheckBudgets(batch);
  InFlight in_flight;
  in_flight.num_tokens = batch.num_tokens();
  for (int s = 0; s < batch.num_sequences(); ++s) {
    in_flight.parts.push_back(PartOf(batch, s, CheckSequence(batch, s)));
  }
  for (const engine::ResultRow& row : batch.results) in_flight.row_parts.push_back(row.sequence);
  in_flight_.push_back(std::move(in_flight));
  if (in_flight_.size() == 2) marks_->Hit("two steps in flight");
  CheckBlocksInFlight();
  return fake_.Submit(batch);
}

absl::StatusOr<engine::StepResult> BatchChecker::Collect() {
  CheckBlocksInFlight();
  absl::StatusOr<engine::StepResult> result = fake_.Collect();
  const InFlight done = std::move(in_flight_.front());
  in_flight_.pop_front();
  if (result.ok()) NoteFailures(done, *result);
  on_collect_(done.num_tokens);
  return result;
}

BatchChecker::InFlight::Part BatchChecker::PartOf(const engine::Batch& batch, int s, const Sequence* sequence) const {
  InFlight::Part part;
  if (sequence != nullptr) part.key = {sequence->id(), sequence->index()};
  part.table.assign(&batch.block_ids[batch.block_start[s]],
                    &batch.block_ids[batch.block_start[s]] + (batch.block_start[s + 1] - batch.block_start[s]));
  for (int t = batch.query_start[s]; t < batch.query_start[s + 1]; ++t) {
    part.written.push_back(static_cast<BlockId>(batch.slot_mapping[t] / block_size()));
  }
  return part;
}

void BatchChecker::NoteFailures(const InFlight& done, const engine::StepResult& result) {
  if (fake_.num_accidents() == 0) return;
  for (size_t row = 0; row < result.rows.size(); ++row) {
    if (!result.rows[row].failed) continue;
    const InFlight::Part& broken = done.parts[done.row_parts[row]];
    may_have_failed_.insert(broken.key);
    for (const InFlight& under_way : in_flight_) {
      for (const InFlight::Part& part : under_way.parts) {
        const bool shares = std::find_first_of(part.table.begin(), part.table.end(), broken.written.begin(),
                                               broken.written.end()) != part.table.end();
        if (shares && may_have_failed_.insert(part.key).second) marks_->Hit("shared a broken block under way");
      }
    }
  }
}

void BatchChecker::CheckBlocksInFlight() const {
  for (const InFlight& in_flight : in_flight_) {
    for (const InFlight::Part& part : in_flight.parts) {
      for (const BlockId block : part.table) {
        violations_->Expect(core_->scheduler().kv_cache().allocator().ref_count(block) > 0,
                            "a block of a batch in flight has an owner:", block);
      }
    }
  }
}

void BatchChecker::CheckBudgets(const engine::Batch& batch) const {
  const scheduler::Scheduler& scheduler = core_->scheduler();
  violations_->Expect(batch.num_tokens() <= scheduler.max_step_tokens(), "the token budget is kept");
  violations_->Expect(batch.num_sequences() <= scheduler.max_running_sequences(), "the sequence budget is kept");
  bool has_decode = false, has_prefill = false;
  for (int s = 0; s < batch.num_sequences(); ++s) {
    const int num_rows = batch.query_start[s + 1] - batch.query_start[s];
    violations_->Expect(num_rows <= options_.max_prefill_chunk, "no chunk is longer than the limit");
    (num_rows == 1 ? has_decode : has_prefill) = true;
  }
  if (has_decode && has_prefill) marks_->Hit("step with decode and prefill");
  std::map<int, int> num_targets;
  for (const engine::ResultRow& row : batch.results) num_targets[row.sequence] += row.target != engine::kNone;
  for (const auto& [sequence, count] : num_targets) {
    violations_->Expect(count <= options_.max_logprob_rows_per_step, "prompt logprobs per step are bounded");
  }
}

std::string BatchChecker::SaltOf(const Request& request) const {
  switch (options_.prefix_sharing) {
    case scheduler::PrefixSharing::kRequest:
      return std::to_string(request.id);
    case scheduler::PrefixSharing::kTenant:
      return request.tenant + "\n" + request.cache_salt;
    case scheduler::PrefixSharing::kAll:
      return request.cache_salt;
  }
  return "";
}

const Sequence* BatchChecker::FindWriter(BlockId block) const {
  const Sequence* found = nullptr;
  for (const auto& sequence : core_->scheduler().running()) {
    const scheduler::BlockTable& table = sequence->block_table();
    if (std::find(table.begin(), table.end(), block) == table.end()) continue;
    violations_->Expect(found == nullptr, "only a block with one owner is written, not", block);
    found = sequence.get();
  }
  violations_->Expect(found != nullptr, "a running sequence owns the block that is written:", block);
  return found;
}

void BatchChecker::CheckMayRun(const engine::Batch& batch, int s, const Sequence& sequence) const {
  const Request& request = sequence.request();
  const bool late =
      request.deadline <= now_() || (request.first_token_deadline <= now_() && sequence.num_output_tokens() == 0 &&
                                     sequence.num_computed_tokens() < sequence.num_prompt_tokens());
  violations_->Expect(!sequence.abort_requested() && (!late || request.num_sequences > 1),
                      "nobody runs who was cancelled or is too late:", sequence.id());
  violations_->Expect(
      !request.WaitsForEachToken() || !engine::IsFromPreviousResult(batch.token_ids[batch.query_start[s]]),
      "nobody who wants to see each token is run ahead of it:", sequence.id());
}

const Sequence* BatchChecker::CheckSequence(const engine::Batch& batch, int s) {
  const int first = batch.positions[batch.query_start[s]];
  const int first_block = first / block_size();
  const BlockId* table = &batch.block_ids[batch.block_start[s]];
  const int num_blocks = batch.block_start[s + 1] - batch.block_start[s];
  const Sequence* sequence = FindWriter(table[first_block]);
  if (sequence == nullptr) return nullptr;
  CheckMayRun(batch, s, *sequence);
  const std::string salt = SaltOf(sequence->request());
  for (int i = 0; i < first_block; ++i) {
    violations_->Expect(writers_[table[i]].salt == salt, "no prefix is shared across salts:", sequence->id());
  }
  int& num_starts = num_starts_[{sequence->id(), sequence->index()}];
  if (num_starts <= sequence->num_preemptions()) {
    num_starts = sequence->num_preemptions() + 1;
    NoteStart(*sequence, first_block);
  }
  for (int i = first_block; i < num_blocks; ++i) {
    if (i > first_block) FindWriter(table[i]);
    Writer& writer = writers_[table[i]];
    writer = {.salt = salt, .id = sequence->id(), .first_tokens = {}, .has_output = false};
    writer.has_output = (i + 1) * block_size() > sequence->num_prompt_tokens();
    if (i == 0 && sequence->num_tokens() >= block_size()) {
      writer.first_tokens.assign(sequence->tokens().begin(), sequence->tokens().begin() + block_size());
    }
  }
  return sequence;
}

void BatchChecker::NoteStart(const Sequence& sequence, int num_shared_blocks) {
  const scheduler::PrefixCache& cache = core_->scheduler().kv_cache().prefix_cache();
  bool from_other = false, from_output = false;
  for (int i = 0; i < num_shared_blocks; ++i) {
    const BlockId block = sequence.block_table()[i];
    hit_contents_.insert(cache.ChainTo(block).content);
    from_other = from_other || writers_[block].id != sequence.id();
    from_output = from_output || writers_[block].has_output;
  }
  if (sequence.kv().num_reserved > 0) marks_->Hit("reserved to completion");
  if (from_other) marks_->Hit("hit on block of another request");
  if (from_other && from_output) marks_->Hit("hit on block with generated tokens");
  if (num_shared_blocks > 0 && sequence.num_preemptions() > 0) marks_->Hit("preempted found blocks again");
  if (num_shared_blocks > 0 && options_.prefix_hash_bits < 8) marks_->Hit("hit among colliding hashes");
  if (num_shared_blocks > 0 || sequence.num_tokens() <= block_size()) return;
  for (BlockId block = 0; block < num_kv_blocks(); ++block) {
    const Writer& writer = writers_[block];
    if (!cache.Contains(block) || writer.first_tokens.empty() || writer.salt == SaltOf(sequence.request())) continue;
    if (!std::equal(writer.first_tokens.begin(), writer.first_tokens.end(), sequence.tokens().begin())) continue;
    return marks_->Hit("salt kept apart");
  }
}

}  // namespace minitron::simulation
