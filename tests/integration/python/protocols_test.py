"""One request, every protocol, whole and streamed: the same text and tokens, and the text is what the tokens decode to."""

import json
import queue
import unittest

import grpc
import numpy as np
import openai
import tritonclient.grpc as triton
from smg_grpc_proto import vllm_engine_pb2
from smg_grpc_proto import vllm_engine_pb2_grpc

import server_fixture

MODEL = "minitron-tiny"
BYTE_TOKENS = (252, 171, 165, 142, 240, 201, 172, 207, 181)  # of 🙂, 你 and ä
CASES = {
    "one": {"text": "To be or not to be,", "seed": 1, "temperature": 0.8},
    "stop strings": {"text": "To be or not to be,", "seed": 2, "temperature": 0.8, "stop": ["e b", "of a", "\n"]},
    "several": {"text": "Once upon a time", "seed": 7, "temperature": 1.0, "n": 3},
    "several bytes, some cut": {"text": "Grüße, 你好 🙂", "seed": 4, "temperature": 1.0, "n": 2,
                                "logit_bias": dict.fromkeys(BYTE_TOKENS, 19.0)},
    "several bytes in a stop string": {"text": "東京", "seed": 5, "temperature": 1.5, "stop": ["好你", "🙂é"],
                                       "regex": "[é你好🙂]{40}"},
    "several bytes and stop strings": {"text": "Grüße, 你好 🙂", "seed": 1, "temperature": 1.5, "stop": ["é你好", "🙂🙂"],
                                       "n": 4, "regex": "[é你好🙂]{9,12}"},
}
MAX_TOKENS = 40


def texts_of(pieces, n):
    """Texts by index from (index, text) pairs."""
    texts = [""] * n
    for index, text in pieces:
        texts[index] += text
    return texts


class ProtocolsTest(server_fixture.ServerTestCase):

    flags = ("--http-port", "0", "--chat-template", "nemotron-mini")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.answers = {name: cls.native.generate(max_tokens=MAX_TOKENS, **case).sequences
                       for name, case in CASES.items()}

    def setUp(self):
        self.channel = grpc.insecure_channel(self.server.address)
        self.addCleanup(self.channel.close)

    def each_case(self, check):
        """check(case, n, texts, token ids), the last two from the native unary call."""
        for name, case in CASES.items():
            with self.subTest(name):
                check(case, case.get("n", 1), [sequence.text for sequence in self.answers[name]],
                      [list(sequence.token_ids) for sequence in self.answers[name]])

    def decoded(self, prompt, token_ids):
        """What the tokens say after the prompt."""
        message = self.native.message
        tokens = self.native.call("minitron.v1.GenerationService", "Tokenize",
                                  message("minitron.v1.TokenizeRequest")(text=prompt)).token_ids
        request = message("minitron.v1.DetokenizeRequest")(token_ids=[*tokens, *token_ids])
        whole = self.native.call("minitron.v1.GenerationService", "Detokenize", request).text
        self.assertTrue(whole.startswith(prompt))
        return whole[len(prompt):]

    def test_the_cases_are_what_they_are_called(self):
        for name, sequences in self.answers.items():
            self.assertEqual(len({sequence.text for sequence in sequences}), CASES[name].get("n", 1), name)
            self.assertEqual(any(sequence.finished.stop_sequence for sequence in sequences), "stop" in name, name)
            self.assertEqual(any(not sequence.text.isascii() for sequence in sequences), "bytes" in name, name)
            self.assertEqual(any("\ufffd" in sequence.text for sequence in sequences), "cut" in name, name)

    def test_native(self):
        def check(case, n, texts, ids):
            events = self.native.stream(max_tokens=MAX_TOKENS, **case)
            deltas = [event.delta for event in events if event.HasField("delta")]
            self.assertEqual(texts_of([(delta.index, delta.text) for delta in deltas], n), texts)
            self.assertEqual([[token for delta in deltas if delta.index == index for token in delta.token_ids]
                              for index in range(n)], ids)
            ends = {event.finished.index: event.finished for event in events if event.HasField("finished")}
            for index, text in enumerate(texts):
                decoded, stop = self.decoded(case["text"], ids[index]), ends[index].stop_sequence
                self.assertEqual(decoded[:len(text)], text)
                self.assertTrue(decoded[len(text):].startswith(stop) if stop else decoded == text)
                self.assertEqual(min([decoded.find(s) for s in case.get("stop", ()) if s in decoded], default=-1),
                                 len(text) if stop else -1)

        self.each_case(check)

    def test_open_inference(self):
        client = triton.InferenceServerClient(self.server.address)
        self.addCleanup(client.close)

        def check(case, n, texts, _):
            whole = client.infer(MODEL, self.triton_inputs(case, False))
            self.assertEqual([text.decode() for text in whole.as_numpy("text_output")], texts)
            answers = queue.Queue()
            client.start_stream(callback=lambda result, error: answers.put((result, error)))
            client.async_stream_infer(MODEL, self.triton_inputs(case, True))
            client.stop_stream()
            pieces = []
            for result, error in answers.queue:
                self.assertIsNone(error)
                pieces.extend(enumerate(text.decode() for text in result.as_numpy("text_output")))
            self.assertEqual(texts_of(pieces, n), texts)

        self.each_case(check)

    def triton_inputs(self, case, stream):
        sampling = {{"regex": "guided_regex"}.get(key, key): value for key, value in case.items() if key != "text"}
        values = {"text_input": case["text"].encode(), "stream": stream, "exclude_input_in_output": True,
                  "sampling_parameters": json.dumps({**sampling, "max_tokens": MAX_TOKENS}).encode()}
        inputs = []
        for name, value in values.items():
            inputs.append(triton.InferInput(name, [1], "BOOL" if isinstance(value, bool) else "BYTES"))
            inputs[-1].set_data_from_numpy(np.array([value], dtype=bool if isinstance(value, bool) else object))
        return inputs

    def test_vllm_inference(self):
        request_type, response_type = (self.native.message(f"vllm.Generate{kind}") for kind in ("Request", "Response"))
        stream = self.channel.unary_stream("/vllm.Inference/GenerateStream", request_type.SerializeToString,
                                           response_type.FromString)

        def check(case, n, texts, ids):
            request = request_type(text=case["text"], temperature=case["temperature"])
            request.sampling.seed, request.sampling.num_sequences = case["seed"], n
            request.stopping.max_new_tokens = MAX_TOKENS
            request.stopping.stop_strings.extend(case.get("stop", ()))
            request.response.output_token_ids = True
            request.decoding.logit_bias.update(case.get("logit_bias", {}))
            if "regex" in case:
                request.decoding.regex = case["regex"]
            outputs = [response.outputs for response in stream(request)]
            self.assertEqual(texts_of([(output.index, output.text) for output in outputs], n), texts)
            self.assertEqual([[token for output in outputs if output.index == index for token in output.token_ids]
                              for index in range(n)], ids)
            if n == 1:  # its unary answer has room for one
                whole = self.native.call("vllm.Inference", "Generate", request).outputs
                self.assertEqual(([whole.text], [list(whole.token_ids)]), (texts, ids))
            else:
                with self.assertRaises(grpc.RpcError) as raised:
                    self.native.call("vllm.Inference", "Generate", request)
                self.assertEqual(raised.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)

        self.each_case(check)

    def test_vllm_engine(self):
        """Token ids only: its gateways decode."""
        stub = vllm_engine_pb2_grpc.VllmEngineStub(self.channel)

        def check(case, n, _, ids):
            params = vllm_engine_pb2.SamplingParams(max_tokens=MAX_TOKENS, skip_special_tokens=True, **{
                key: value for key, value in case.items() if key != "text"})
            for stream in (False, True):
                answers = list(stub.Generate(vllm_engine_pb2.GenerateRequest(
                    text=case["text"], stream=stream, sampling_params=params)))
                self.assertEqual({answer.complete.index: list(answer.complete.output_ids) for answer in answers
                                  if answer.WhichOneof("response") == "complete"}, dict(enumerate(ids)))
            chunks = [answer.chunk for answer in answers if answer.WhichOneof("response") == "chunk"]
            self.assertEqual([[token for chunk in chunks if chunk.index == index for token in chunk.token_ids]
                              for index in range(n)], ids)

        self.each_case(check)

    def openai_client(self):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.server.ports['http']}/v1", api_key="none",
                               max_retries=0)
        self.addCleanup(client.close)
        return client

    def openai_arguments(self, case):
        arguments = {key: value for key, value in case.items() if key not in ("text", "regex")}
        extra = {"guided_regex": case["regex"]} if "regex" in case else {}
        return {"model": MODEL, "max_tokens": MAX_TOKENS, "extra_body": extra, **arguments}

    def test_openai_completions(self):
        create = self.openai_client().completions.create

        def check(case, n, texts, ids):
            arguments = {"prompt": case["text"], **self.openai_arguments(case)}
            whole = create(**arguments)
            self.assertEqual([choice.text for choice in whole.choices], texts)
            self.assertEqual(whole.usage.completion_tokens, sum(map(len, ids)))
            pieces = [(choice.index, choice.text) for chunk in create(stream=True, **arguments)
                      for choice in chunk.choices]
            self.assertEqual(texts_of(pieces, n), texts)

        self.each_case(check)

    def test_openai_chat(self):
        create = self.openai_client().chat.completions.create

        def check(case, n, *_):
            template = f"<extra_id_0>System\n\n<extra_id_1>User\n{case['text']}\n<extra_id_1>Assistant\n"
            native = self.native.generate(max_tokens=MAX_TOKENS, parse_special=True, **{**case, "text": template})
            texts = [sequence.text for sequence in native.sequences]
            arguments = {"messages": [{"role": "user", "content": case["text"]}], **self.openai_arguments(case)}
            self.assertEqual([choice.message.content for choice in create(**arguments).choices], texts)
            pieces = [(choice.index, choice.delta.content or "") for chunk in create(stream=True, **arguments)
                      for choice in chunk.choices]
            self.assertEqual(texts_of(pieces, n), texts)

        self.each_case(check)


if __name__ == "__main__":
    unittest.main()
