// LineReader: the user's lines. On a terminal, with editing and a history of this session, where libedit was there at
// build time; plainly otherwise. One thread.
#pragma once

#include <memory>
#include <string>

namespace minitron::client {

class LineReader {
 public:
  // `prompts`: ask with "> " on standard error.
  explicit LineReader(bool prompts);
  ~LineReader();

  // The next line of standard input, without its end. False when there is none.
  bool Read(std::string* line);

 private:
  struct Editor;

  const bool prompts_;
  std::unique_ptr<Editor> editor_;  // null: plain
};

}  // namespace minitron::client
