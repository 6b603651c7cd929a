"""The command-line client against the real server, and the demo as it stands in the README."""

import json
import os
import pathlib
import pty
import signal
import subprocess
import unittest

import server_fixture

CLI = os.environ["MINITRON_TEST_CLI"]
PROMPT = "To be or not to be,"


class CliTest(server_fixture.ServerTestCase):

    def run_cli(self, command, *arguments, code=0):
        result = subprocess.run([CLI, command, "--server", self.server.address, *arguments], capture_output=True, text=True)
        self.assertEqual(result.returncode, code, result.stderr)
        return result

    def test_generate_streams_what_the_native_api_answers(self):
        native = self.native.generate(PROMPT, 24, seed=7).sequences[0].text
        streamed = self.run_cli("generate", PROMPT, "--max-tokens", "24", "--seed", "7")
        self.assertEqual(streamed.stdout, native + "\n")
        self.assertRegex(streamed.stderr, r"^prompt 7 tokens \| generated 24 tokens \| first token [\d.]+ ms")
        unary = self.run_cli("generate", PROMPT, "--max-tokens", "24", "--seed", "7", "--no-stream", "--quiet")
        self.assertEqual((unary.stdout, unary.stderr), (native + "\n", ""))

    def test_the_form_of_the_output_can_be_given(self):
        answer = self.run_cli("generate", PROMPT, "--choice", "yes", "--choice", "no", "--quiet").stdout.strip()
        self.assertIn(answer, ("yes", "no"))
        self.assertRegex(self.run_cli("generate", PROMPT, "--regex", "[0-9]{3}", "--quiet").stdout, r"^[0-9]{3}\n$")
        self.assertIn("constraint.regex", self.run_cli("generate", PROMPT, "--regex", "(", code=13).stderr)

    def test_json_has_an_event_per_line(self):
        lines = self.run_cli("generate", PROMPT, "--max-tokens", "5", "--json").stdout.splitlines()
        events = [json.loads(line) for line in lines]
        self.assertIn("started", events[0])
        self.assertIn("finished", events[-1])

    def test_every_other_command_answers(self):
        ids = self.run_cli("tokenize", PROMPT).stdout.split()
        self.assertEqual(len(ids), 7)
        self.assertEqual(self.run_cli("detokenize", ",".join(ids)).stdout.strip(), PROMPT)
        self.assertIn("total -", self.run_cli("score", " east", "--context", "The sun rises in the").stdout)
        self.assertIn("minitron-tiny", self.run_cli("models").stdout)
        self.assertEqual(self.run_cli("health").stdout, "SERVING\n")

    def test_refusals_say_which_field(self):
        self.assertIn("sampling.temperature", self.run_cli("generate", PROMPT, "--temperature", "9", code=13).stderr)
        self.assertIn("nobody", self.run_cli("generate", PROMPT, "--model", "nobody", code=15).stderr)

    def test_a_chat_longer_than_the_context_goes_on_and_says_what_it_forgot(self):
        lines = "".join(f"line {i}: {PROMPT * 24}\n" for i in range(8))
        result = subprocess.run([CLI, "chat", "--server", self.server.address, "--max-tokens", "8"], input=lines,
                                capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertNotIn("INVALID_ARGUMENT", result.stderr)
        self.assertRegex(result.stderr, r"minitron: the oldest \d+ turns? no longer fits? into the context of 1024 tokens\n")

    def test_lines_on_a_terminal_are_edited_and_remembered(self):
        process, terminal = pty.fork()
        if process == 0:
            os.environ["TERM"] = "xterm"
            os.execv(CLI, [CLI, "chat", "--server", self.server.address])
        seen = ""

        def after(keys, text):
            nonlocal seen
            os.write(terminal, keys)
            while text not in seen:
                seen += os.read(terminal, 4096).decode(errors="replace")
            seen = seen.split(text, 1)[1]

        after(b"", "> ")
        after(b"/nope\r", "no command /nope;")
        after(b"", "> ")
        after(b"\x1b[A\x01\x1b[C!\r", "no command /!nope;")  # up, to the start, right
        after(b"", "> ")
        after("/größe\r".encode(), "no command /größe;")
        after(b"", "> ")
        os.write(terminal, b"/quit\r")  # no Ctrl-D: between prompt and editor the terminal would take it
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), 0)
        os.close(terminal)

    def test_an_interrupt_ends_the_request_on_the_server(self):
        process = subprocess.Popen([CLI, "generate", "--server", self.server.address, PROMPT, "--max-tokens", "1000",
                                    "--ignore-eos", "--n", "16"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.communicate()
        self.assertIn(process.returncode, (130, 0), "0: it was finished before the signal came")


class DemoTest(unittest.TestCase):

    def test_the_demo_streams_a_completion_and_its_figures(self):
        result = subprocess.run([str(server_fixture.ROOT / "deploy/demo.sh"), "--bin", str(pathlib.Path(CLI).parent)],
                                capture_output=True, text=True, timeout=60)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertGreater(len(result.stdout.strip()), 100)
        self.assertRegex(result.stderr, r"prompt 7 tokens \| generated 96 tokens \| first token [\d.]+ ms \| \d+ tokens/s")


if __name__ == "__main__":
    unittest.main()
