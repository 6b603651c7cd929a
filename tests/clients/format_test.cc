#include "clients/cpp/format.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/clients/fake_server.h"

namespace minitron::client {
namespace {

using ::testing::HasSubstr;

TEST(FormatTest, FiguresAreOneLine) {
  Figures figures{.prompt_tokens = 9,
                  .cached_tokens = 0,
                  .generated_tokens = 64,
                  .first_token_s = 0.0123,
                  .decode_s = 0.0776,
                  .tokens_after_first = 63};
  EXPECT_EQ(FormatFigures(figures), "prompt 9 tokens | generated 64 tokens | first token 12.3 ms | 812 tokens/s");
  figures.cached_tokens = 8;
  figures.first_token_s.reset();
  figures.tokens_after_first = 0;
  EXPECT_EQ(FormatFigures(figures), "prompt 9 tokens (8 cached) | generated 64 tokens");
}

TEST(FormatTest, ErrorIsOneLineWithFieldsRetryAndNextStep) {
  const std::string line = FormatError(DecodeError(DetailedStatus()), "host:1");
  EXPECT_EQ(line,
            "INVALID_ARGUMENT: temperature 3.5 outside [0, 2] [OUT_OF_RANGE]; task.sampling.temperature: 3.5 outside "
            "[0, 2]; quota of tenant:blue: 9 streams, limit 8; retry after 1.50 s");
  Error down;
  down.code = grpc::StatusCode::UNAVAILABLE;
  down.message = "connect\nfailed \x1b[31m";
  EXPECT_EQ(FormatError(down, "host:1"),
            "UNAVAILABLE: connect failed \\x1b[31m; is a server running at host:1? start one, or name another with "
            "--server HOST:PORT");
  EXPECT_EQ(ExitCode(down), 24);
  for (const auto& [message, advice] : {std::pair("h:1: Socket closed", "--tls-ca FILE; if it asks for a certificate"),
                                        {"SSL routines::certificate verify failed", "its authority with --tls-ca FILE"},
                                        {"Peer name h is not in peer certificate", "with --tls-server-name NAME"},
                                        {"SSL routines::wrong version number", "leave the --tls options out"}}) {
    down.message = message;
    EXPECT_THAT(FormatError(down, "host:1"), testing::HasSubstr(advice)) << message;
  }
}

TEST(FormatTest, AFieldThatTheMessageNamesIsNotNamedAgain) {
  Error error;
  error.code = grpc::StatusCode::INVALID_ARGUMENT;
  error.message = "sampling.top_p: 2 outside (0, 1]";
  error.field_violations = {{"sampling.top_p", "2 outside (0, 1]"}};
  EXPECT_EQ(FormatError(error, "host:1"), "INVALID_ARGUMENT: sampling.top_p: 2 outside (0, 1]");
}

TEST(FormatTest, JsonIsOneLineWithProtoNames) {
  v1::GenerateStreamResponse event;
  event.mutable_started()->set_prompt_token_count(9);
  event.mutable_started()->set_model("a\nb");
  EXPECT_EQ(ToJsonLine(event), "{\"started\":{\"model\":\"a\\nb\",\"prompt_token_count\":9}}\n");
}

TEST(FormatTest, ControlCharactersReachNoTerminal) {
  EXPECT_EQ(ForTerminal("a\n\tb\x1b[2J\x7f\xC2\x9B é"), "a\n\tb\\x1b[2J\\x7f\\x9b é");
  EXPECT_EQ(Quoted(" a\"\\\n\xFF"), "\" a\\\"\\\\\\n\\xff\"");
}

TEST(FormatTest, LogprobTableHasOneLinePerPosition) {
  v1::GeneratedSequence sequence;
  sequence.add_logprobs();
  v1::PositionLogprobs* position = sequence.add_logprobs();
  position->mutable_chosen()->set_token_id(5);
  position->mutable_chosen()->set_token_bytes(" be");
  position->mutable_chosen()->set_logprob(-0.25f);
  position->mutable_chosen()->set_rank(1);
  v1::TokenLogprob* top = position->add_top();
  top->set_token_bytes(" is");
  top->set_logprob(-2.0f);
  const std::string table = FormatLogprobs(sequence.logprobs());
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 2);
  EXPECT_THAT(table, HasSubstr("nothing before it"));
  EXPECT_THAT(table, HasSubstr("\" be\""));
  EXPECT_THAT(table, HasSubstr("-0.2500  rank 1  \" is\" -2.0000\n"));
}

TEST(SequencePrinterTest, OneSequencePassesThrough) {
  SequencePrinter printer(0);
  EXPECT_EQ(printer.Add(0, "Hel"), "Hel");
  EXPECT_EQ(printer.Add(0, "lo"), "lo");
  EXPECT_EQ(printer.Finish(0), "\n");
  EXPECT_EQ(printer.Flush(), "");
}

TEST(SequencePrinterTest, InterleavedSequencesComeOutOneAfterTheOther) {
  SequencePrinter printer(3);
  std::string out = printer.Add(1, "one ");
  out += printer.Add(0, "zero ");
  out += printer.Finish(2);
  out += printer.Add(1, "two");
  out += printer.Finish(0);
  out += printer.Add(1, "!");
  out += printer.Finish(1);
  out += printer.Flush();
  EXPECT_EQ(out, "=== sequence 0 ===\nzero \n=== sequence 1 ===\none two!\n=== sequence 2 ===\n\n");
}

TEST(SequencePrinterTest, ABrokenStreamLosesNoText) {
  SequencePrinter printer(2);
  EXPECT_EQ(printer.Add(0, "zero"), "=== sequence 0 ===\nzero");
  EXPECT_EQ(printer.Add(1, "one"), "");
  EXPECT_EQ(printer.Flush(), "\n=== sequence 1 ===\none\n");
}

}  // namespace
}  // namespace minitron::client
