// minitron generate.
#include <unistd.h>

#include <chrono>
#include <cstdio>

#include "clients/cpp/commands.h"
#include "clients/cpp/format.h"
#include "clients/cpp/generate_request.h"

namespace minitron::client {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

std::string JoinIds(const google::protobuf::RepeatedField<uint32_t>& ids) {
  std::string text;
  for (const uint32_t id : ids) text += std::to_string(id) + " ";
  return text;
}

// Prints the events of one stream and counts.
class EventPrinter {
 public:
  EventPrinter(const Session& session, const v1::GenerationTask& task)
      : json_(session.json),
        token_ids_(session.arguments.Has("token-ids")),
        terminal_(isatty(STDOUT_FILENO) != 0),
        printer_(task.sampling().num_sequences()),
        begin_(Clock::now()) {}

  // False when the output is closed.
  bool OnEvent(const v1::GenerateStreamResponse& event) {
    Count(event);
    if (json_) return Print(ToJsonLine(event));
    switch (event.event_case()) {
      case v1::GenerateStreamResponse::kStarted:
        std::fputs(FormatLogprobs(event.started().prompt_logprobs()).c_str(), stderr);
        return true;
      case v1::GenerateStreamResponse::kDelta:
        // The table follows the text: interleaved on one terminal both would be unreadable.
        logprobs_[event.delta().index()].MergeFrom(event.delta().logprobs());
        return PrintText(printer_.Add(event.delta().index(),
                                      token_ids_ ? JoinIds(event.delta().token_ids()) : event.delta().text()));
      case v1::GenerateStreamResponse::kFinished:
        return PrintText(printer_.Finish(event.finished().index()));
      default:
        return true;  // a newer server's event
    }
  }

  // The text that waits when the stream has failed, so that the error starts on a line of its own.
  void Abandon() {
    if (!json_) PrintText(printer_.Flush());
  }

  void PrintLogprobs() const {
    if (json_) return;
    for (const auto& [index, positions] : logprobs_) std::fputs(FormatLogprobs(positions).c_str(), stderr);
  }

  const Figures& figures() const { return figures_; }

 private:
  bool PrintText(const std::string& text) { return text.empty() || Print(terminal_ ? ForTerminal(text) : text); }

  void Count(const v1::GenerateStreamResponse& event) {
    if (event.has_started()) {
      figures_.prompt_tokens = event.started().prompt_token_count();
      figures_.cached_tokens = event.started().cached_token_count();
    }
    if (event.has_finished()) figures_.generated_tokens += event.finished().usage().completion_tokens();
    if (!event.has_delta()) return;
    const Clock::time_point now = Clock::now();
    if (!figures_.first_token_s.has_value()) {
      figures_.first_token_s = Seconds(now - begin_);
      first_ = now;
      return;
    }
    figures_.decode_s = Seconds(now - first_);
    figures_.tokens_after_first += static_cast<uint32_t>(event.delta().token_ids_size());
  }

  bool json_;
  bool token_ids_;
  bool terminal_;
  SequencePrinter printer_;
  std::map<uint32_t, google::protobuf::RepeatedPtrField<v1::PositionLogprobs>> logprobs_;
  Figures figures_;
  Clock::time_point begin_;
  Clock::time_point first_;
};

int RunUnary(const Session& session, const v1::GenerationTask& task) {
  v1::GenerateRequest request;
  *request.mutable_task() = task;
  v1::GenerateResponse response;
  if (const Outcome error = session.client->Generate(request, &response, session.cancellation)) {
    return Fail(session, *error);
  }
  if (session.json) return Print(ToJsonLine(response)) ? kExitOk : kExitOutput;
  // The same words as the stream's, through the same printer.
  EventPrinter printer(session, task);
  v1::GenerateStreamResponse event;
  *event.mutable_started() = response.started();
  bool printed = printer.OnEvent(event);
  for (const v1::GeneratedSequence& sequence : response.sequences()) {
    v1::Delta& delta = *event.mutable_delta();
    delta.set_index(sequence.index());
    delta.set_text(sequence.text());
    *delta.mutable_token_ids() = sequence.token_ids();
    *delta.mutable_logprobs() = sequence.logprobs();
    printed = printed && printer.OnEvent(event);
    *event.mutable_finished() = sequence.finished();
    event.mutable_finished()->set_index(sequence.index());
    printed = printed && printer.OnEvent(event);
  }
  printer.PrintLogprobs();
  if (!session.arguments.Has("quiet")) {
    Figures figures = printer.figures();
    figures.first_token_s.reset();  // not visible to a unary call
    figures.tokens_after_first = 0;
    std::fprintf(stderr, "%s\n", FormatFigures(figures).c_str());
  }
  return printed ? kExitOk : kExitOutput;
}

}  // namespace

int RunGenerate(const Session& session) {
  std::optional<std::string> text;
  if (const auto error = ReadPrompt(session.arguments, &text)) return FailUsage(session, *error);
  v1::GenerateStreamRequest request;
  if (const auto error = BuildTask(session.arguments, text, request.mutable_task())) return FailUsage(session, *error);
  if (session.arguments.Has("echo") && text.has_value() && !session.json && !Print(*text)) return kExitOutput;
  if (session.arguments.Has("no-stream")) return RunUnary(session, request.task());

  EventPrinter printer(session, request.task());
  bool printed = true;
  const Outcome error = session.client->GenerateStream(
      request,
      [&](const v1::GenerateStreamResponse& event) {
        printed = printed && printer.OnEvent(event);
        return printed;
      },
      session.cancellation);
  if (!printed) return kExitOutput;
  if (error.has_value()) {
    printer.Abandon();
    return Fail(session, *error);
  }
  printer.PrintLogprobs();
  if (!session.arguments.Has("quiet") && !session.json) {
    std::fprintf(stderr, "%s\n", FormatFigures(printer.figures()).c_str());
  }
  return kExitOk;
}

}  // namespace minitron::client
