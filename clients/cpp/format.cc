#include "clients/cpp/format.h"

#include <cstdio>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "google/protobuf/util/json_util.h"

namespace minitron::client {
namespace {

// What gRPC 1.51 writes when no connection comes about, and what its user can do. Empty when it is none of these.
std::string ConnectionAdvice(const std::string& message) {
  constexpr std::pair<const char*, const char*> kKnown[] = {
      {"Socket closed",
       "if the server encrypts, name its authority with --tls-ca FILE; if it asks for a certificate, give --tls-cert "
       "and "
       "--tls-key"},
      {"certificate verify failed",
       "the server's certificate is signed by no trusted authority: name its authority with --tls-ca FILE"},
      {"is not in peer certificate", "name the server as its certificate does with --tls-server-name NAME"},
      {"wrong version number", "the server does not encrypt: leave the --tls options out"},
  };
  for (const auto& [text, advice] : kKnown) {
    if (absl::StrContains(message, text)) return advice;
  }
  return "";
}

// What the user can do about an error; empty when there is nothing to say.
std::string NextStep(const Error& error, const std::string& target) {
  switch (error.code) {
    case grpc::StatusCode::UNAVAILABLE:
      if (!error.reason.empty()) return "the server is up but takes no requests now: try again later";
      if (std::string advice = ConnectionAdvice(error.message); !advice.empty()) return advice;
      return absl::StrCat("is a server running at ", target, "? start one, or name another with --server HOST:PORT");
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return "ask for fewer tokens or raise --timeout";
    case grpc::StatusCode::NOT_FOUND:
      return "`minitron models` lists what is served";
    case grpc::StatusCode::ALREADY_EXISTS:
      return "choose another --request-id, or leave it out";
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return "send less, or less often";
    case grpc::StatusCode::UNAUTHENTICATED:
    case grpc::StatusCode::PERMISSION_DENIED:
      return "pass a token of the role it takes with --token-file FILE";
    case grpc::StatusCode::UNIMPLEMENTED:
      return "client and server may be of different versions";
    case grpc::StatusCode::INTERNAL:
      return "see the server's log";
    default:
      return "";
  }
}

void AppendToken(const v1::TokenLogprob& token, std::string* out) {
  absl::StrAppend(out,
                  absl::StrFormat("%8d  %-16s %9.4f", token.token_id(), Quoted(token.token_bytes()), token.logprob()));
}

}  // namespace

std::string FormatSeconds(double seconds) {
  return seconds < 1 ? absl::StrFormat("%.1f ms", seconds * 1e3) : absl::StrFormat("%.2f s", seconds);
}

std::string FormatFigures(const Figures& figures) {
  std::string text = absl::StrCat("prompt ", figures.prompt_tokens, " tokens");
  if (figures.cached_tokens > 0) absl::StrAppend(&text, " (", figures.cached_tokens, " cached)");
  absl::StrAppend(&text, " | generated ", figures.generated_tokens, " tokens");
  if (figures.first_token_s.has_value()) {
    absl::StrAppend(&text, " | first token ", FormatSeconds(*figures.first_token_s));
  }
  if (figures.tokens_after_first > 0 && figures.decode_s > 0) {
    const double rate = figures.tokens_after_first / figures.decode_s;
    const std::string shown = absl::StrFormat("%.*f", rate < 10 ? 2 : 0, rate);
    absl::StrAppend(&text, " | ", shown, " tokens/s");
  }
  return text;
}

std::string FormatError(const Error& error, const std::string& target) {
  std::string text = absl::StrCat(CodeName(error.code), ": ", error.message.empty() ? "(no message)" : error.message);
  if (!error.reason.empty()) absl::StrAppend(&text, " [", error.reason, "]");
  for (const Violation& violation : error.field_violations) {
    const std::string shown = absl::StrCat(violation.subject, ": ", violation.description);
    if (!absl::StrContains(error.message, shown)) absl::StrAppend(&text, "; ", shown);
  }
  for (const Violation& violation : error.quota_violations) {
    absl::StrAppend(&text, "; quota of ", violation.subject, ": ", violation.description);
  }
  if (error.retry_delay.has_value()) {
    absl::StrAppend(&text, "; retry after ", FormatSeconds(static_cast<double>(error.retry_delay->count()) / 1e3));
  }
  if (const std::string next = NextStep(error, target); !next.empty()) absl::StrAppend(&text, "; ", next);
  // One line, whatever the server put into its message.
  std::string line;
  for (const char c : ForTerminal(text)) line.push_back(c == '\n' || c == '\t' ? ' ' : c);
  return line;
}

int ExitCode(const Error& error) { return 10 + static_cast<int>(error.code); }

std::string ToJsonLine(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  std::string json;
  const auto status = google::protobuf::util::MessageToJsonString(message, &json, options);
  if (!status.ok()) json = "{}";
  return json + "\n";
}

std::string ForTerminal(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    // C1 controls are U+0080 to U+009F: C2 80 to C2 9F.
    const auto next = i + 1 < text.size() ? static_cast<unsigned char>(text[i + 1]) : 0;
    if (byte == 0xC2 && next >= 0x80 && next <= 0x9F) {
      absl::StrAppend(&out, absl::StrFormat("\\x%02x", next));
      ++i;
    } else if ((byte < 0x20 && byte != '\n' && byte != '\t') || byte == 0x7F) {
      absl::StrAppend(&out, absl::StrFormat("\\x%02x", byte));
    } else {
      out.push_back(text[i]);
    }
  }
  return out;
}

std::string Quoted(const std::string& bytes) {
  std::string out = "\"";
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n') {
      out += "\\n";
    } else if (c == '"' || c == '\\') {
      out += {'\\', c};
    } else if (byte < 0x20 || byte >= 0x7F) {
      absl::StrAppend(&out, absl::StrFormat("\\x%02x", byte));
    } else {
      out.push_back(c);
    }
  }
  return out + "\"";
}

std::string FormatLogprobs(const google::protobuf::RepeatedPtrField<v1::PositionLogprobs>& positions) {
  std::string text;
  for (const v1::PositionLogprobs& position : positions) {
    if (position.has_chosen()) {
      AppendToken(position.chosen(), &text);
      absl::StrAppend(&text, "  rank ", position.chosen().rank());
    } else {
      absl::StrAppend(&text, "       -  (nothing before it)");
    }
    for (const v1::TokenLogprob& token : position.top()) {
      absl::StrAppend(&text, "  ", Quoted(token.token_bytes()), " ", absl::StrFormat("%.4f", token.logprob()));
    }
    text += "\n";
  }
  return text;
}

std::string FormatModel(const v1::Model& model) {
  const v1::ModelShape& shape = model.shape();
  return absl::StrCat(model.name(), "\n  architecture ", model.architecture(), ", ", model.parameter_count(),
                      " parameters, ", model.weight_type(), "\n  context ", model.max_context_tokens(),
                      " tokens, vocabulary ", model.vocab_size(), ", default max_tokens ", model.default_max_tokens(),
                      "\n  ", shape.num_layers(), " layers, hidden ", shape.hidden_size(), ", ",
                      shape.num_attention_heads(), " heads over ", shape.num_key_value_heads(), " of width ",
                      shape.head_dim(), ", feed-forward ", shape.intermediate_size(), "\n");
}

std::string FormatLoad(const v1::GetLoadResponse& load) {
  return absl::StrCat("running ", load.running_sequences(), " | waiting ", load.waiting_sequences(), " | kv blocks ",
                      load.kv_blocks_used(), " of ", load.kv_blocks(), " | calls ", load.active_calls(),
                      load.draining() ? " | draining" : "", "\n");
}

std::string FormatInfo(const v1::GetServerInfoResponse& info) {
  return absl::StrCat("version ", info.version(), "\nbackend ", info.backend(), "\nmodel ", info.model(), "\nuptime ",
                      FormatSeconds(static_cast<double>(info.uptime().seconds())), "\nkv blocks ", info.kv_blocks(),
                      " of ", info.kv_block_size(), " tokens\nmax running sequences ", info.max_running_sequences(),
                      "\nmax step tokens ", info.max_step_tokens(), "\nmax queued requests ",
                      info.max_queued_requests(), "\nmax context tokens ", info.max_context_tokens(), "\n");
}

std::string SequencePrinter::Header(uint32_t index) const {
  return num_sequences_ > 1 ? absl::StrCat("=== sequence ", index, " ===\n") : "";
}

std::string SequencePrinter::Add(uint32_t index, const std::string& text) {
  if (index != current_) {
    waiting_[index] += text;
    return "";
  }
  std::string out = header_printed_ ? "" : Header(index);
  header_printed_ = true;
  return out + text;
}

std::string SequencePrinter::Finish(uint32_t index) {
  finished_[index] = true;
  std::string out;
  while (finished_.count(current_) != 0) {
    if (!header_printed_) out += Header(current_);
    out += waiting_[current_] + "\n";
    ++current_;
    header_printed_ = false;
    // The next one goes on from what has arrived of it.
    if (finished_.count(current_) == 0 && waiting_.count(current_) != 0) {
      out += Header(current_) + waiting_[current_];
      header_printed_ = true;
      waiting_.erase(current_);
    }
  }
  return out;
}

std::string SequencePrinter::Flush() {
  std::string out = header_printed_ ? "\n" : "";
  for (const auto& [index, text] : waiting_) {
    if (index >= current_ && !text.empty()) out += Header(index) + text + "\n";
  }
  waiting_.clear();
  return out;
}

}  // namespace minitron::client
