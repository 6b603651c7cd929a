#include "clients/cpp/generate_request.h"

#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>

namespace minitron::client {
namespace {

constexpr uint64_t kMaxUint32 = std::numeric_limits<uint32_t>::max();

// Reads options into setters and keeps the first complaint.
class Setter {
 public:
  explicit Setter(const Arguments& arguments) : arguments_(arguments) {}

  template <typename Set>
  void Uint(const std::string& name, uint64_t max, Set set) {
    uint64_t value = 0;
    if (!arguments_.Has(name)) return;
    if (!ParseUint(arguments_.Get(name), max, &value)) return Complain(name, "a whole number from 0");
    set(value);
  }

  template <typename Set>
  void Float(const std::string& name, Set set) {
    float value = 0;
    if (!arguments_.Has(name)) return;
    if (!ParseFloat(arguments_.Get(name), &value)) return Complain(name, "a number");
    set(value);
  }

  void Complain(const std::string& name, const std::string& wanted) {
    if (!error_) error_ = UsageError{"--" + name + " \"" + arguments_.Get(name) + "\" is not " + wanted};
  }

  void Refuse(const std::string& message) {
    if (!error_) error_ = UsageError{message};
  }

  const std::optional<UsageError>& error() const { return error_; }

 private:
  const Arguments& arguments_;
  std::optional<UsageError> error_;
};

void SetSampling(const Arguments& arguments, Setter* setter, v1::SamplingConfig* sampling) {
  setter->Float("temperature", [&](float value) { sampling->set_temperature(value); });
  setter->Uint("top-k", kMaxUint32, [&](uint64_t value) { sampling->set_top_k(static_cast<uint32_t>(value)); });
  setter->Float("top-p", [&](float value) { sampling->set_top_p(value); });
  setter->Float("min-p", [&](float value) { sampling->set_min_p(value); });
  setter->Uint("seed", std::numeric_limits<uint64_t>::max(), [&](uint64_t value) { sampling->set_seed(value); });
  setter->Float("repetition-penalty", [&](float value) { sampling->set_repetition_penalty(value); });
  setter->Float("presence-penalty", [&](float value) { sampling->set_presence_penalty(value); });
  setter->Float("frequency-penalty", [&](float value) { sampling->set_frequency_penalty(value); });
  setter->Uint("n", kMaxUint32, [&](uint64_t value) { sampling->set_num_sequences(static_cast<uint32_t>(value)); });
  for (const std::string& bias : arguments.All("logit-bias")) {
    const size_t equals = bias.find('=');
    uint64_t id = 0;
    float value = 0;
    if (equals == std::string::npos || !ParseUint(bias.substr(0, equals), kMaxUint32, &id) ||
        !ParseFloat(bias.substr(equals + 1), &value)) {
      return setter->Complain("logit-bias", "ID=NUMBER");
    }
    (*sampling->mutable_logit_bias())[static_cast<uint32_t>(id)] = value;
  }
}

void SetStopping(const Arguments& arguments, Setter* setter, v1::StoppingConfig* stopping) {
  setter->Uint("max-tokens", kMaxUint32,
               [&](uint64_t value) { stopping->set_max_tokens(static_cast<uint32_t>(value)); });
  setter->Uint("min-tokens", kMaxUint32,
               [&](uint64_t value) { stopping->set_min_tokens(static_cast<uint32_t>(value)); });
  for (const std::string& text : arguments.All("stop-id")) {
    std::vector<uint32_t> ids;
    if (!ParseIds(text, &ids)) return setter->Complain("stop-id", "a token id");
    stopping->mutable_stop_token_ids()->Add(ids.begin(), ids.end());
  }
  for (const std::string& text : arguments.All("stop")) {
    const std::string stop = Unescape(text);
    if (!IsUtf8(stop)) return setter->Complain("stop", "valid UTF-8");
    stopping->add_stop_sequences(stop);
  }
  if (arguments.Has("include-stop")) stopping->set_include_stop_sequence(true);
  if (arguments.Has("ignore-eos")) stopping->set_ignore_eos(true);
}

void SetConstraint(const Arguments& arguments, Setter* setter, v1::GenerationTask* task) {
  const bool has_choices = !arguments.All("choice").empty();
  const int num_kinds = static_cast<int>(arguments.Has("regex")) + static_cast<int>(arguments.Has("json-schema")) +
                        static_cast<int>(arguments.Has("json-object")) + static_cast<int>(arguments.Has("grammar")) +
                        static_cast<int>(has_choices);
  if (num_kinds == 0) return;
  if (num_kinds > 1) return setter->Refuse("give one of --regex, --json-schema, --json-object, --grammar and --choice");
  v1::OutputConstraint* const constraint = task->mutable_constraint();
  const auto text = [&](const char* name, const std::string& value) {
    if (!IsUtf8(value)) setter->Complain(name, "valid UTF-8");
    return value;
  };
  if (arguments.Has("regex")) constraint->set_regex(text("regex", arguments.Get("regex")));
  if (arguments.Has("json-schema")) constraint->set_json_schema(text("json-schema", arguments.Get("json-schema")));
  if (arguments.Has("grammar")) constraint->set_grammar(text("grammar", arguments.Get("grammar")));
  if (arguments.Has("json-object")) constraint->set_json_object(true);
  for (const std::string& choice : arguments.All("choice")) {
    constraint->mutable_choices()->add_options(text("choice", choice));
  }
}

void SetOutput(const Arguments& arguments, Setter* setter, v1::OutputConfig* output) {
  setter->Uint("logprobs", kMaxUint32, [&](uint64_t value) { output->set_logprobs(static_cast<uint32_t>(value)); });
  setter->Uint("prompt-logprobs", kMaxUint32,
               [&](uint64_t value) { output->set_prompt_logprobs(static_cast<uint32_t>(value)); });
  if (arguments.Has("keep-special")) output->set_skip_special_tokens(false);
}

}  // namespace

std::vector<OptionSpec> GenerateOptions() {
  return {
      {"prompt", "TEXT", "the prompt (or give it as the argument)"},
      {"prompt-file", "FILE", "read the prompt from a file, - for standard input"},
      {"prompt-ids", "IDS", "the prompt as token ids, e.g. 1,2,3"},
      {"model", "NAME", "the model; default: the served one"},
      {"request-id", "NAME", "name of the request, for `minitron cancel`"},
      {"priority", "N", "in [-100, 100], higher first"},
      {"cache-salt", "TEXT", "share cached prefixes only with requests of the same salt"},
      {"truncate-prompt", "N", "keep only the last N prompt tokens"},
      {"add-bos", "", "put the BOS token in front of a text prompt"},
      {"no-bos", "", "do not, whatever the model's default"},
      {"parse-special", "", "turn spellings such as </s> in the prompt into those tokens"},
      {"max-tokens", "N", "generate at most N tokens per sequence"},
      {"min-tokens", "N", "do not stop before N tokens"},
      {"stop", "TEXT", "stop at this text (repeatable; \\n, \\t, \\xNN are understood)"},
      {"stop-id", "IDS", "stop at these token ids (repeatable)"},
      {"include-stop", "", "leave the stop text in the output"},
      {"ignore-eos", "", "do not stop at the end-of-sequence token"},
      {"temperature", "X", "in [0, 2], 0 is greedy"},
      {"top-k", "N", "keep the N most likely tokens, 0 keeps all"},
      {"top-p", "X", "keep the most likely tokens that sum to X, in (0, 1]"},
      {"min-p", "X", "drop tokens below X times the most likely one, in [0, 1]"},
      {"seed", "N", "the same seed and options give the same text"},
      {"repetition-penalty", "X", "in [0.01, 10], 1 is off"},
      {"presence-penalty", "X", "in [-2, 2]"},
      {"frequency-penalty", "X", "in [-2, 2]"},
      {"logit-bias", "ID=X", "add X to the logit of a token (repeatable)"},
      {"n", "N", "number of completions, in [1, 16]"},
      {"regex", "EXPR", "the output matches this regular expression"},
      {"json-schema", "TEXT", "the output is JSON of this schema"},
      {"grammar", "TEXT", "the output is what rule root of this grammar (GBNF) derives"},
      {"json-object", "", "the output is a JSON object"},
      {"choice", "TEXT", "the output is this text, or another one given so (repeatable)"},
      {"logprobs", "N", "log-probabilities of each token and N alternatives, as a table on stderr"},
      {"prompt-logprobs", "N", "the same for the prompt"},
      {"keep-special", "", "leave special tokens in the text"},
      {"token-ids", "", "print token ids instead of text"},
      {"echo", "", "print the prompt in front of the text"},
      {"no-stream", "", "one unary call; print when all is done"},
      {"quiet", "", "no line of figures"},
  };
}

std::optional<UsageError> ReadFile(const std::string& path, std::string* text) {
  if (path == "-") {
    text->assign(std::istreambuf_iterator<char>(std::cin), {});
    return std::nullopt;
  }
  std::ifstream file(path, std::ios::binary);
  // A folder opens but does not read.
  if (!file || file.peek() == std::ifstream::traits_type::eof()) {
    if (!file.eof() || file.bad()) return UsageError{"cannot read " + path};
  }
  text->assign(std::istreambuf_iterator<char>(file), {});
  if (file.bad()) return UsageError{"cannot read " + path};
  return std::nullopt;
}

std::optional<UsageError> ReadPrompt(const Arguments& arguments, std::optional<std::string>* text) {
  const int sources = arguments.Has("prompt") + arguments.Has("prompt-file") + arguments.Has("prompt-ids") +
                      !arguments.positionals().empty();
  if (sources == 0)
    return UsageError{"no prompt: give it as the argument, or with --prompt, --prompt-file or --prompt-ids"};
  if (sources > 1)
    return UsageError{"more than one prompt: give only one of the argument, --prompt, --prompt-file and --prompt-ids"};
  if (arguments.Has("prompt-ids")) return std::nullopt;
  if (arguments.Has("prompt")) {
    *text = arguments.Get("prompt");
    return std::nullopt;
  }
  const bool from_file = arguments.Has("prompt-file");
  const std::string source = from_file ? arguments.Get("prompt-file") : arguments.positionals()[0];
  text->emplace();
  if (from_file || source == "-") return ReadFile(source, &**text);
  *text = source;
  return std::nullopt;
}

void SetTokenizeOptions(const Arguments& arguments, v1::TokenizeOptions* options) {
  if (arguments.Has("add-bos")) options->set_add_bos(true);
  if (arguments.Has("no-bos")) options->set_add_bos(false);
  if (arguments.Has("parse-special")) options->set_parse_special(true);
}

std::optional<UsageError> BuildTask(const Arguments& arguments, const std::optional<std::string>& text,
                                    v1::GenerationTask* task) {
  Setter setter(arguments);
  task->set_model(arguments.Get("model"));
  task->set_request_id(arguments.Get("request-id"));
  task->set_cache_salt(arguments.Get("cache-salt"));
  if (text.has_value()) {
    if (!IsUtf8(*text)) return UsageError{"the prompt is not valid UTF-8"};
    task->set_text(*text);
  } else {
    std::vector<uint32_t> ids;
    if (!ParseIds(arguments.Get("prompt-ids"), &ids)) setter.Complain("prompt-ids", "a list of token ids");
    task->mutable_token_ids()->mutable_ids()->Add(ids.begin(), ids.end());
  }
  if (arguments.Has("priority")) {
    int64_t priority = 0;
    if (ParseInt(arguments.Get("priority"), INT32_MIN, INT32_MAX, &priority)) {
      task->set_priority(static_cast<int32_t>(priority));
    } else {
      setter.Complain("priority", "a whole number");
    }
  }
  setter.Uint("truncate-prompt", kMaxUint32,
              [&](uint64_t value) { task->set_truncate_prompt_tokens(static_cast<uint32_t>(value)); });
  SetSampling(arguments, &setter, task->mutable_sampling());
  SetStopping(arguments, &setter, task->mutable_stopping());
  SetConstraint(arguments, &setter, task);
  SetOutput(arguments, &setter, task->mutable_output());
  SetTokenizeOptions(arguments, task->mutable_tokenize_options());
  return setter.error();
}

}  // namespace minitron::client
