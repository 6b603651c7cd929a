// What the command line prints, as strings. Pure functions and one small state machine.
#pragma once

#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "clients/cpp/error.h"
#include "google/protobuf/message.h"
#include "minitron/v1/admin.pb.h"
#include "minitron/v1/generation.pb.h"
#include "minitron/v1/model.pb.h"

namespace minitron::client {

// Counts and times of one generation as this client saw them.
struct Figures {
  uint32_t prompt_tokens = 0;
  uint32_t cached_tokens = 0;
  uint32_t generated_tokens = 0;        // of all sequences
  std::optional<double> first_token_s;  // from sending the request
  double decode_s = 0;                  // from the first to the last message with tokens
  uint32_t tokens_after_first = 0;      // tokens that arrived in decode_s
};

// "prompt 9 tokens | generated 64 tokens | first token 12.3 ms | 812 tokens/s"; parts that are not known are left out.
std::string FormatFigures(const Figures& figures);

// "12.3 ms", "1.50 s".
std::string FormatSeconds(double seconds);

// One line: code, message, reason, fields, when to try again and what to do next. `target` is the server's address.
std::string FormatError(const Error& error, const std::string& target);

// Exit code of the process for an error: 10 + gRPC code.
int ExitCode(const Error& error);

// One JSON object on one line, field names as in the .proto. Ends with a newline.
std::string ToJsonLine(const google::protobuf::Message& message);

// Control characters but newline and tab become visible (\x1b): generated text must not drive a terminal.
std::string ForTerminal(const std::string& text);

// Quoted, with every byte that is not printable ASCII or part of a valid character escaped.
std::string Quoted(const std::string& bytes);

// A table of one position per line: token, log-probability, rank, alternatives.
std::string FormatLogprobs(const google::protobuf::RepeatedPtrField<v1::PositionLogprobs>& positions);

std::string FormatModel(const v1::Model& model);
std::string FormatLoad(const v1::GetLoadResponse& load);
std::string FormatInfo(const v1::GetServerInfoResponse& info);

// Orders the text of several sequences that arrive interleaved: the first is passed on as it comes, the others when
// those before them have ended, each under a header. One sequence has no header.
class SequencePrinter {
 public:
  explicit SequencePrinter(uint32_t num_sequences) : num_sequences_(num_sequences) {}

  // What to print now.
  std::string Add(uint32_t index, const std::string& text);
  std::string Finish(uint32_t index);
  // All that waits, when the stream has ended early.
  std::string Flush();

 private:
  std::string Header(uint32_t index) const;

  uint32_t num_sequences_;
  uint32_t current_ = 0;
  bool header_printed_ = false;
  std::map<uint32_t, std::string> waiting_;
  std::map<uint32_t, bool> finished_;
};

}  // namespace minitron::client
