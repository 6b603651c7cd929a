"""vLLM's gRPC protocols against the real server: the engine protocol with the stubs that gateways use, unmodified;
vllm.Inference and vllm.Control by reflection. What they say is what the native API says."""

import hashlib
import io
import json
import re
import unittest
import zipfile

import grpc
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto import vllm_engine_pb2
from smg_grpc_proto import vllm_engine_pb2_grpc

import server_fixture

MODEL = "minitron-tiny"
PROMPTS = ("To be or not to be,", "Grüße, 你好 🙂")
# Fields that this server declares as bytes because it only refuses them.
REFUSED = {"kv_transfer_params", "mm_inputs"}
CASES = ({}, {"stop": ["\n"]}, {"n": 2}, {"stop": ["e"], "n": 3}, {"temperature": 1.3, "n": 2})


def kind(field):
    is_repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
    return field.number, field.type, is_repeated, field.has_presence


class VllmEngineTest(server_fixture.ServerTestCase):

    def setUp(self):
        channel = grpc.insecure_channel(self.server.address)
        self.addCleanup(channel.close)
        self.stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)

    def generate(self, text, max_tokens, stream, *, by_ids=False, **params):
        request = vllm_engine_pb2.GenerateRequest(stream=stream, sampling_params=vllm_engine_pb2.SamplingParams(
            max_tokens=max_tokens, skip_special_tokens=True, **params))
        if by_ids:
            tokenize = self.native.message("minitron.v1.TokenizeRequest")(text=text)
            answer = self.native.call("minitron.v1.GenerationService", "Tokenize", tokenize)
            request.tokenized.input_ids.extend(answer.token_ids)
        else:
            request.text = text
        return list(self.stub.Generate(request))

    def test_every_field_is_what_the_gateway_says(self):
        ours = self.native.pool.FindFileContainingSymbol("vllm.grpc.engine.VllmEngine")
        theirs = vllm_engine_pb2.DESCRIPTOR
        for message in ours.message_types_by_name.values():
            other = theirs.message_types_by_name[message.name]
            for field in message.fields:
                if field.name not in REFUSED:
                    self.assertEqual(kind(field), kind(other.fields_by_name[field.name]), field.full_name)
                self.assertEqual(field.number, other.fields_by_name[field.name].number)
        for method in ours.services_by_name["VllmEngine"].methods:
            other = theirs.services_by_name["VllmEngine"].methods_by_name[method.name]
            self.assertEqual((method.input_type.full_name, method.output_type.full_name),
                             (other.input_type.full_name, other.output_type.full_name))
        shared = self.native.pool.FindFileContainingSymbol("smg.grpc.common.GetTokenizerChunk")
        for message in shared.message_types_by_name.values():
            self.assertEqual([kind(field) for field in message.fields],
                             [kind(field) for field in common_pb2.DESCRIPTOR.message_types_by_name[message.name].fields])

    def test_the_tokenizer_that_comes_is_the_one_that_serves(self):
        chunks = list(self.stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
        archive = b"".join(chunk.data for chunk in chunks)
        self.assertTrue(all(0 < len(chunk.data) <= 65536 for chunk in chunks))
        self.assertEqual([chunk.sha256 for chunk in chunks],
                         [""] * (len(chunks) - 1) + [hashlib.sha256(archive).hexdigest()])
        folder = server_fixture.ROOT / "deploy/models" / MODEL
        with zipfile.ZipFile(io.BytesIO(archive)) as bundle:
            self.assertIsNone(bundle.testzip())
            self.assertEqual({name: bundle.read(name) for name in bundle.namelist()},
                             {name: (folder / name).read_bytes() for name in
                              ("tokenizer.model", "config.json", "generation_config.json")})

    def test_tokens_are_the_native_ones_streamed_and_whole(self):
        for prompt in PROMPTS:
            for case in CASES:
                n = case.get("n", 1)
                native = self.native.generate(prompt, 40, seed=3, n=n, stop=case.get("stop", ()),
                                              temperature=case.get("temperature"))
                wanted = [list(sequence.token_ids) for sequence in native.sequences]
                for by_ids in (False, True):
                    whole = self.generate(prompt, 40, False, by_ids=by_ids, seed=3, **case)
                    self.assertEqual({answer.complete.index: list(answer.complete.output_ids) for answer in whole},
                                     dict(enumerate(wanted)), case)
                pieces = [[] for _ in range(n)]
                for answer in self.generate(prompt, 40, True, seed=3, **case):
                    if answer.WhichOneof("response") == "chunk":
                        pieces[answer.chunk.index].extend(answer.chunk.token_ids)
                    else:
                        self.assertEqual(list(answer.complete.output_ids), wanted[answer.complete.index])
                self.assertEqual(pieces, wanted, case)

    def test_how_a_sequence_ended(self):
        [answer] = self.generate(PROMPTS[0], 5, False, seed=1)
        self.assertEqual(answer.complete.finish_reason, "length")
        [answer] = self.generate(PROMPTS[0], 200, False, seed=1, stop=["e"])
        self.assertEqual((answer.complete.finish_reason, answer.complete.matched_stop_str), ("stop", "e"))
        token = answer.complete.output_ids[0]
        [answer] = self.generate(PROMPTS[0], 200, False, seed=1, stop_token_ids=[token])
        self.assertEqual((answer.complete.finish_reason, answer.complete.matched_token_id), ("stop", token))

    def test_logprobs(self):
        native = self.native.generate(PROMPTS[0], 6, seed=5, temperature=0, logprobs=2)
        [answer] = self.generate(PROMPTS[0], 6, False, seed=5, temperature=0, logprobs=2, prompt_logprobs=1)
        positions = native.sequences[0].logprobs
        got = answer.complete.output_logprobs
        self.assertEqual(list(got.token_logprobs), [position.chosen.logprob for position in positions])
        self.assertEqual([list(top.token_ids) for top in got.top_logprobs],
                         [[token.token_id for token in position.top] for position in positions])
        prompt = answer.complete.input_logprobs
        self.assertEqual(len(prompt.token_logprobs), answer.complete.prompt_tokens)
        self.assertFalse(prompt.token_logprobs[0].HasField("value"))
        self.assertTrue(all(entry.HasField("value") for entry in prompt.token_logprobs[1:]))

    def test_structured_output(self):
        schema = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
        for seed in range(4):
            for constraint, matches in (
                    ({"regex": "[a-f]{3}-[0-9]{2}"}, lambda text: re.fullmatch("[a-f]{3}-[0-9]{2}", text)),
                    ({"choice": {"choices": ["yes", "no, never"]}}, lambda text: text in ("yes", "no, never")),
                    ({"grammar": 'root ::= "(" root ")" | [0-9]'}, lambda text: re.fullmatch(r"\(*[0-9]\)*", text)),
                    ({"json_schema": schema}, lambda text: isinstance(json.loads(text)["n"], int))):
                [answer] = self.generate(PROMPTS[0], 60, False, seed=seed, temperature=1.5, **constraint)
                self.assertEqual(answer.complete.finish_reason, "stop")
                request = self.native.message("minitron.v1.DetokenizeRequest")(token_ids=answer.complete.output_ids)
                text = self.native.call("minitron.v1.GenerationService", "Detokenize", request).text
                self.assertTrue(matches(text.strip()), (constraint, text))

    def test_management(self):
        self.assertTrue(self.stub.HealthCheck(vllm_engine_pb2.HealthCheckRequest()).healthy)
        model = self.stub.GetModelInfo(vllm_engine_pb2.GetModelInfoRequest())
        self.assertEqual((model.served_model_name, model.is_generation), (MODEL, True))
        self.assertGreater(model.vocab_size, 0)
        loads = self.stub.GetLoads(vllm_engine_pb2.GetLoadsRequest())
        self.assertEqual(loads.loads[0].num_waiting_reqs, 0)
        self.assertGreater(loads.loads[0].max_total_num_tokens, 0)
        self.stub.Abort(vllm_engine_pb2.AbortRequest(request_ids=["nobody"]))
        with self.assertRaises(grpc.RpcError) as raised:
            self.stub.Embed(vllm_engine_pb2.EmbedRequest())
        self.assertEqual(raised.exception.code(), grpc.StatusCode.UNIMPLEMENTED)


class VllmInferenceTest(server_fixture.ServerTestCase):

    def setUp(self):
        self.channel = grpc.insecure_channel(self.server.address)
        self.addCleanup(self.channel.close)
        self.request_type = self.native.message("vllm.GenerateRequest")
        self.response_type = self.native.message("vllm.GenerateResponse")

    def request(self, text, *, seed, max_tokens, n=1, stop=(), temperature=None):
        request = self.request_type(text=text)
        request.sampling.seed = seed
        request.sampling.num_sequences = n
        request.stopping.max_new_tokens = max_tokens
        request.stopping.stop_strings.extend(stop)
        request.response.output_token_ids = True
        if temperature is not None:
            request.temperature = temperature
        return request

    def stream(self, request):
        call = self.channel.unary_stream("/vllm.Inference/GenerateStream", self.request_type.SerializeToString,
                                         self.response_type.FromString)
        return list(call(request))

    def test_streams_concatenate_to_the_native_text(self):
        for prompt in PROMPTS:
            for case in CASES:
                native = self.native.generate(prompt, 40, seed=3, n=case.get("n", 1), stop=case.get("stop", ()),
                                              temperature=case.get("temperature", 0))
                wanted = [(sequence.text, list(sequence.token_ids)) for sequence in native.sequences]
                first, *pieces = self.stream(self.request(prompt, seed=3, max_tokens=40, **case))
                self.assertEqual(first.prompt_info.num_prompt_tokens, native.started.prompt_token_count)
                got = [("", []) for _ in wanted]
                for piece in pieces:
                    text, ids = got[piece.outputs.index]
                    got[piece.outputs.index] = text + piece.outputs.text, ids + list(piece.outputs.token_ids)
                self.assertEqual(got, wanted, case)
                if len(wanted) == 1:
                    whole = self.native.call("vllm.Inference", "Generate",
                                             self.request(prompt, seed=3, max_tokens=40, **case))
                    self.assertEqual((whole.outputs.text, list(whole.outputs.token_ids)), wanted[0])

    def test_the_text_is_what_the_tokens_decode_to(self):
        answer = self.native.call("vllm.Inference", "Generate", self.request(PROMPTS[1], seed=1, max_tokens=30,
                                                                             temperature=1.5))
        request = self.native.message("minitron.v1.DetokenizeRequest")(token_ids=answer.outputs.token_ids)
        decoded = self.native.call("minitron.v1.GenerationService", "Detokenize", request).text
        # Detokenize starts a text, which drops the space in front; an answer continues its prompt.
        self.assertEqual(answer.outputs.text.removeprefix(" "), decoded.removeprefix(" "))

    def test_control(self):
        info = self.native.call("vllm.Control", "GetServerInfo", self.native.message("vllm.GetServerInfoRequest")())
        self.assertGreater(info.total_kv_blocks, 0)
        model = self.native.call("vllm.Control", "GetModelInfo", self.native.message("vllm.GetModelInfoRequest")())
        self.assertEqual(model.served_model_name, MODEL)
        self.assertTrue(model.supports_text_input and model.supports_token_ids_input)

    def test_health_is_told_by_service(self):
        check = self.channel.unary_unary("/grpc.health.v1.Health/Check")
        for service in (b"vllm.Inference", b"vllm.Control", b"vllm.grpc.engine.VllmEngine"):
            serving = check(b"\x0a" + bytes([len(service)]) + service)  # service = 1; answered by status = 1
            self.assertEqual(serving, b"\x08\x01", service)


class SwitchedOffTest(server_fixture.ServerTestCase):

    flags = ("--vllm-grpc=false",)

    def test_nothing_of_vllm_is_there(self):
        with grpc.insecure_channel(self.server.address) as channel:
            with self.assertRaises(grpc.RpcError) as raised:
                vllm_engine_pb2_grpc.VllmEngineStub(channel).HealthCheck(vllm_engine_pb2.HealthCheckRequest())
        self.assertEqual(raised.exception.code(), grpc.StatusCode.UNIMPLEMENTED)


if __name__ == "__main__":
    unittest.main()
