#include "clients/cpp/manual.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"

namespace minitron::client {
namespace {

constexpr char kShells[] = "bash zsh fish";

bool TakesShell(const Command& command) { return command.spec.arguments == "SHELL"; }
bool TakesFile(const OptionSpec& option) { return option.value == "FILE"; }

// In single quotes of a shell.
std::string Quote(const std::string& text) { return "'" + absl::StrReplaceAll(text, {{"'", "'\\''"}}) + "'"; }

std::string Bash(const std::vector<Command>& commands) {
  std::string names;
  std::string cases;
  for (const Command& command : commands) {
    absl::StrAppend(&names, names.empty() ? "" : " ", command.spec.name);
    std::string words = TakesShell(command) ? kShells : "";
    for (const OptionSpec& option : command.spec.options)
      absl::StrAppend(&words, words.empty() ? "--" : " --", option.name);
    absl::StrAppend(&cases, "    ", command.spec.name, ") words='", words, "' ;;\n");
  }
  return absl::StrCat(
      "# bash completion of minitron: source it, or put it into ~/.local/share/bash-completion/completions/minitron\n"
      "_minitron() {\n  local words=\n  if [ \"$COMP_CWORD\" -eq 1 ]; then\n    words='",
      names, "'\n  else\n    case ${COMP_WORDS[1]} in\n", cases,
      "    esac\n  fi\n  mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"${COMP_WORDS[COMP_CWORD]}\")\n}\n"
      "complete -o default -F _minitron minitron\n");
}

std::string Zsh(const std::vector<Command>& commands) {
  std::string names;
  std::string cases;
  // _describe and _arguments take "name:text" and "--name[text]": their own marks in a text need a backslash.
  const auto escape = [](const std::string& text) {
    return absl::StrReplaceAll(text, {{"\\", "\\\\"}, {":", "\\:"}, {"[", "\\["}, {"]", "\\]"}});
  };
  for (const Command& command : commands) {
    absl::StrAppend(&names, " ", Quote(absl::StrCat(command.spec.name, ":", escape(command.spec.summary))));
    absl::StrAppend(&cases, "    ", command.spec.name, ") _arguments");
    for (const OptionSpec& option : command.spec.options) {
      absl::StrAppend(&cases, " ",
                      Quote(absl::StrCat("*--", option.name, option.value.empty() ? "" : "=", "[", escape(option.help),
                                         "]", option.value.empty() ? "" : ":" + escape(option.value),
                                         TakesFile(option) ? ":_files" : "")));
    }
    absl::StrAppend(&cases, TakesShell(command) ? absl::StrCat(" '1:shell:(", kShells, ")'") : "", " ;;\n");
  }
  return absl::StrCat(
      "#compdef minitron\n# zsh completion of minitron: put it into a folder of $fpath as _minitron\n",
      "_minitron() {\n  local -a commands\n  commands=(", names,
      ")\n  if (( CURRENT == 2 )); then\n    _describe command commands\n    return\n  fi\n"
      "  local name=$words[2]\n  shift words\n  (( CURRENT-- ))\n  case $name in\n",
      cases,
      "  esac\n}\nif [[ $funcstack[1] == _minitron ]]; then _minitron \"$@\"; else compdef _minitron minitron; fi\n");
}

std::string Fish(const std::vector<Command>& commands) {
  std::string text =
      "# fish completion of minitron: put it into ~/.config/fish/completions/minitron.fish\n"
      "complete -c minitron -f\n";  // no files but where an option takes one
  for (const Command& command : commands) {
    absl::StrAppend(&text, "complete -c minitron -n __fish_use_subcommand -f -a ", command.spec.name, " -d ",
                    Quote(command.spec.summary), "\n");
    const std::string seen =
        absl::StrCat("complete -c minitron -n '__fish_seen_subcommand_from ", command.spec.name, "'");
    if (TakesShell(command)) absl::StrAppend(&text, seen, " -a '", kShells, "'\n");
    for (const OptionSpec& option : command.spec.options) {
      absl::StrAppend(&text, seen, " -l ", option.name,
                      TakesFile(option)      ? " -r -F"
                      : option.value.empty() ? ""
                                             : " -x",
                      " -d ", Quote(option.help), "\n");
    }
  }
  return text;
}

// Text of a roff page: a dash is a minus, and a line may not start with a control character.
std::string Roff(const std::string& text) {
  std::string out = absl::StrReplaceAll(text, {{"\\", "\\e"}, {"-", "\\-"}});
  if (!out.empty() && (out[0] == '.' || out[0] == '\'')) out.insert(0, "\\&");
  return absl::StrReplaceAll(out, {{"\n.", "\n\\&."}, {"\n'", "\n\\&'"}});
}

}  // namespace

std::optional<std::string> CompletionScript(const std::string& shell, const std::vector<Command>& commands) {
  if (shell == "bash") return Bash(commands);
  if (shell == "zsh") return Zsh(commands);
  if (shell == "fish") return Fish(commands);
  return std::nullopt;
}

std::string ManPage(const std::vector<Command>& commands) {
  std::string page =
      absl::StrCat(".TH MINITRON 1 \"\" \"minitron " MINITRON_VERSION
                   "\"\n.SH NAME\nminitron \\- command\\-line client of "
                   "minitron\\-server\n.SH SYNOPSIS\n.B minitron\n.I COMMAND\n[options]\n.SH COMMANDS\n");
  for (const Command& command : commands) {
    absl::StrAppend(&page, ".SS ", Roff(command.spec.name), command.spec.arguments.empty() ? "" : " ",
                    Roff(command.spec.arguments), "\n", Roff(command.spec.summary), "\n");
    for (const OptionSpec& option : command.spec.options) {
      absl::StrAppend(&page, ".TP\n.BR \\-\\-", Roff(option.name),
                      option.value.empty() ? "" : absl::StrCat(" \" \" ", Roff(option.value)), "\n", Roff(option.help),
                      "\n");
    }
  }
  return absl::StrCat(page,
                      ".SH ENVIRONMENT\n.TP\n.B MINITRON_SERVER\nThe server, when \\-\\-server does not name one.\n"
                      ".TP\n.B MINITRON_TLS_CA\nThe file of \\-\\-tls\\-ca, when it is not given.\n"
                      ".TP\n.B MINITRON_TOKEN_FILE\nThe file of \\-\\-token\\-file, when it is not given.\n",
                      ".SH EXIT STATUS\n", Roff(kExitCodesText),
                      ".SH SEE ALSO\nminitron\\-bench \\-\\-help, minitron\\-server "
                      "\\-\\-help\n");
}

int RunCompletion(const Session& session) {
  const auto& shells = session.arguments.positionals();
  const auto script = CompletionScript(shells.empty() ? "" : shells[0], Commands());
  if (!script.has_value()) return FailUsage(session, {"name a shell: bash, zsh or fish"});
  return Print(*script) ? kExitOk : kExitOutput;
}

int RunMan(const Session&) { return Print(ManPage(Commands())) ? kExitOk : kExitOutput; }

}  // namespace minitron::client
