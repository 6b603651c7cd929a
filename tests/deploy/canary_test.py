#!/usr/bin/env python3
"""Marked prompts, answers, tokens and ids are sent down every path there is; logs, metrics, audit log and statuses are then
searched for the marks."""
import base64
import hashlib
import json
import os
import pathlib
import sys
import tempfile
import unittest

import grpc

sys.path.insert(0, os.path.dirname(__file__))
from harness import Server, ends_complete, field, generate_request, stream

PROMPT = "canaryprompt-4c1d the quality of mercy"
TOKEN = "canarytoken-77ab"
WRONG = "canarywrong-0e9f"
SALT = "canarysalt-5512"
STOP = "canarystop-31aa"


class CanaryTest(unittest.TestCase):
    def test_nothing_of_a_user_is_told(self):
        with tempfile.TemporaryDirectory(prefix="minitron_canary_") as folder:
            auth = pathlib.Path(folder) / "auth.json"
            audit = pathlib.Path(folder) / "audit.log"
            digest = hashlib.sha256(TOKEN.encode()).hexdigest()
            auth.write_text(json.dumps({"tokens": [{"id": "one", "sha256": digest, "tenant": "alice", "roles": ["user"]}],
                                        "tenants": {"alice": {"max_streams": 2}}}))
            with Server(f"--auth-file={auth}", f"--audit-log={audit}", "--log-format=json", "--metrics-compat=vllm") as server:
                told, answers = self.provoke(server)
                told += [server.metrics()]
                auth.write_text('{"tokens": [{"id": "' + WRONG + '", "sha256": "' + TOKEN + '"')  # a bad reload is logged, too
                self.wait_for_line(server, "reload failed")
                self.assertEqual(server.stop(), 0)
                told += [server.log(), audit.read_text()]
                for line in server.log().splitlines() + audit.read_text().splitlines():
                    with self.subTest(line):
                        json.loads(line)
            self.assertGreater(len(audit.read_text() if audit.exists() else told[-1]), 500)
            marks = [PROMPT, "canaryprompt", TOKEN, WRONG, SALT, STOP, digest, *answers]
            for text in told:
                for mark in marks:
                    for form in (mark, base64.b64encode(mark.encode()).decode()[:-4]):
                        self.assertNotIn(form, text)

    def wait_for_line(self, server, text):
        from harness import wait_for
        wait_for(text, lambda: text in server.log())

    def provoke(self, server):
        """What clients were told by failed calls, and pieces of the answers that succeeded."""
        told, answers = [], []
        right = (("authorization", f"Bearer {TOKEN}"),)
        task = field(3, PROMPT) + field(9, SALT)
        requests = {
            "good": generate_request(PROMPT, 40),
            "sampling out of range": field(1, task + field(5, b"\x0d\x00\x00\x80\xbf")),
            "too long": field(1, field(3, PROMPT * 9000)),
            "too many tokens": field(1, task + field(6, field(1, 100000))),
            "a stop string too long": field(1, task + field(6, field(4, STOP * 100))),
            "no UTF-8": field(1, field(3, PROMPT.encode() + b"\xff")),
            "another model": field(1, task + field(1, "gpt")),
            "a bad request id": field(1, task + field(2, "bad\x01id")),
        }
        with grpc.insecure_channel(server.address) as channel:
            for metadata in (right, (), (("authorization", f"Bearer {WRONG}"),), (("authorization", f"Basic {WRONG}"),)):
                for name, request in requests.items():
                    try:
                        messages = list(stream(channel, request, metadata))
                        self.assertEqual(name, "good")
                        self.assertTrue(ends_complete(messages))
                        text = b"".join(messages[1:-1]).decode("latin-1")
                        answers += [w for w in text.split() if len(w) > 6 and w.isalpha()][:3]
                    except grpc.RpcError as error:
                        self.assertFalse(name == "good" and metadata is right, error)
                        told.append(error.details() + repr(error.trailing_metadata()))
        self.assertGreater(len(told), 25)
        return told, answers


if __name__ == "__main__":
    unittest.main()
