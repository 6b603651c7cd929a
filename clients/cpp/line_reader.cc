#include "clients/cpp/line_reader.h"

#include <unistd.h>

#include <cstdio>
#include <iostream>

#if MINITRON_LIBEDIT
#include <histedit.h>

#include <clocale>
#include <cstdlib>
#endif

namespace minitron::client {

#if MINITRON_LIBEDIT

struct LineReader::Editor {
  Editor() : line(el_init("minitron", stdin, stderr, stderr)), history(history_init()) {
    HistEvent event;
    ::history(history, &event, H_SETSIZE, 1000);
    ::history(history, &event, H_SETUNIQUE, 1);
    el_set(
        line, EL_PROMPT, +[](EditLine*) { return const_cast<char*>("> "); });
    el_set(line, EL_EDITOR, "emacs");
    el_set(line, EL_HIST, ::history, history);
  }
  ~Editor() {
    history_end(history);
    el_end(line);
  }
  Editor(const Editor&) = delete;
  Editor& operator=(const Editor&) = delete;

  bool Read(std::string* out) {
    int size = 0;
    const char* const text = el_gets(line, &size);
    if (text == nullptr || size <= 0) return false;
    out->assign(text, static_cast<size_t>(size));
    HistEvent event;
    if (*out != "\n") ::history(history, &event, H_ENTER, text);
    while (!out->empty() && (out->back() == '\n' || out->back() == '\r')) out->pop_back();
    return true;
  }

  EditLine* line;
  History* history;
};

LineReader::LineReader(bool prompts) : prompts_(prompts) {
  if (!prompts || isatty(STDERR_FILENO) == 0) return;
  // Before the editor is made, or every letter beyond ASCII is shown as its bytes. What is sent must be UTF-8 anyway.
  if (std::setlocale(LC_CTYPE, "") == nullptr || MB_CUR_MAX == 1) std::setlocale(LC_CTYPE, "C.UTF-8");
  editor_ = std::make_unique<Editor>();
}

#else

struct LineReader::Editor {
  bool Read(std::string*) { return false; }
};

LineReader::LineReader(bool prompts) : prompts_(prompts) {}

#endif

LineReader::~LineReader() = default;

bool LineReader::Read(std::string* line) {
  const bool more = [&] {
    if (editor_ != nullptr) return editor_->Read(line);
    if (prompts_) std::fputs("> ", stderr);
    return static_cast<bool>(std::getline(std::cin, *line));
  }();
  if (!more && prompts_) std::fputs("\n", stderr);
  return more;
}

}  // namespace minitron::client
