"""tritonclient, unmodified, against the real server: synchronous, streaming and asyncio."""

import asyncio
import json
import queue
import unittest

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

import server_fixture

MODEL = "minitron-tiny"
PROMPT = "To be or not to be,"


def tensor(name, values, datatype):
    array = np.array(values, dtype=triton_dtype(datatype))
    result = triton.InferInput(name, list(array.shape), datatype)
    result.set_data_from_numpy(array)
    return result


def triton_dtype(datatype):
    return {"BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64}[datatype]


def vllm_inputs(text=PROMPT, stream=False, exclude=True, flags=(), **sampling):
    inputs = [tensor("text_input", [text.encode()], "BYTES"), tensor("stream", [stream], "BOOL"),
              tensor("sampling_parameters", [json.dumps(sampling).encode()], "BYTES")]
    if exclude is not None:
        inputs.append(tensor("exclude_input_in_output", [exclude], "BOOL"))
    return inputs + [tensor(flag, [True], "BOOL") for flag in flags]


def texts(result, name="text_output"):
    return [value.decode() for value in result.as_numpy(name).tolist()]


def is_final(result):
    return result.get_response().parameters["triton_final_response"].bool_param


class TritonClientTest(server_fixture.ServerTestCase):

    def setUp(self):
        self.client = triton.InferenceServerClient(self.server.address)
        self.addCleanup(self.client.close)

    def stream(self, requests, **stream_options):
        """All (result, error) of a stream that sends `requests`, each a dict of async_stream_infer arguments."""
        answers = queue.Queue()
        self.client.start_stream(callback=lambda result, error: answers.put((result, error)), **stream_options)
        for request in requests:
            self.client.async_stream_infer(MODEL, **request)
        self.client.stop_stream()
        return list(answers.queue)

    def test_health_and_metadata(self):
        self.assertTrue(self.client.is_server_live())
        self.assertTrue(self.client.is_server_ready())
        self.assertTrue(self.client.is_model_ready(MODEL))
        self.assertFalse(self.client.is_model_ready("another"))
        self.assertIn("statistics", self.client.get_server_metadata().extensions)
        metadata = self.client.get_model_metadata(MODEL)
        self.assertEqual(metadata.inputs[0].name, "text_input")
        config = self.client.get_model_config(MODEL).config
        self.assertTrue(config.model_transaction_policy.decoupled)
        self.assertEqual(config.max_batch_size, 0)
        required = [entry.name for entry in config.input if not entry.optional]
        self.assertEqual(required, ["text_input"])
        self.assertEqual([entry.name for entry in config.input], [entry.name for entry in metadata.inputs])
        with self.assertRaises(InferenceServerException) as raised:
            self.client.get_model_metadata("another")
        self.assertEqual(raised.exception.status(), "StatusCode.NOT_FOUND")

    def test_infer_gives_the_native_text(self):
        for sampling in ({}, {"stop": ["\n"]}, {"n": 2}, {"stop": [" ", "e"], "n": 3}):
            native = self.native.generate(PROMPT, 24, seed=7, n=sampling.get("n", 1), stop=sampling.get("stop", ()))
            result = self.client.infer(MODEL, vllm_inputs(seed=7, max_tokens=24, **sampling))
            self.assertEqual(texts(result), [sequence.text for sequence in native.sequences], sampling)

    def test_streams_concatenate_to_the_native_text(self):
        for sampling in ({}, {"stop": ["\n"]}, {"n": 2}, {"stop": ["e"], "n": 2}):
            n = sampling.get("n", 1)
            native = self.native.generate("Grüße, 你好 🙂", 40, seed=3, n=n, stop=sampling.get("stop", ()))
            for empty_final in (False, True):
                answers = self.stream([{
                    "inputs": vllm_inputs("Grüße, 你好 🙂", stream=True, seed=3, max_tokens=40, **sampling),
                    "request_id": "a", "enable_empty_final_response": empty_final}])
                pieces = [""] * n
                for result, error in answers:
                    self.assertIsNone(error)
                    self.assertEqual(result.get_response().id, "a")
                    if result.as_numpy("text_output") is not None:
                        pieces = [piece + text for piece, text in zip(pieces, texts(result))]
                self.assertEqual(pieces, [sequence.text for sequence in native.sequences], sampling)
                self.assertEqual([is_final(result) for result, _ in answers], [False] * (len(answers) - 1) + [True])
                last = answers[-1][0].get_response()
                self.assertEqual(len(last.outputs) == 0, empty_final)

    def test_requests_of_one_stream_do_not_mix(self):
        requests = [{"inputs": vllm_inputs(f"{i} ", stream=i % 2 == 0, seed=i, max_tokens=10 + i),
                     "request_id": str(i)} for i in range(8)]
        got = {}
        for result, error in self.stream(requests):
            self.assertIsNone(error)
            answer_id = result.get_response().id
            got[answer_id] = got.get(answer_id, "") + texts(result)[0]
        self.assertEqual(got, {str(i): self.native.generate(f"{i} ", 10 + i, seed=i).sequences[0].text
                               for i in range(8)})

    def test_all_tensors_of_the_vllm_back_end(self):
        flags = ["return_finish_reason", "return_cumulative_logprob", "return_logprobs", "return_num_input_tokens",
                 "return_num_output_tokens"]
        native = self.native.generate(PROMPT, 6, seed=5, temperature=0, logprobs=2)
        # genai-perf writes numbers as strings.
        result = self.client.infer(MODEL, vllm_inputs(flags=flags, seed="5", max_tokens="6", temperature="0",
                                                      logprobs="2"))
        positions = native.sequences[0].logprobs
        self.assertEqual(texts(result, "finish_reason"), ["length"])
        self.assertEqual(result.as_numpy("num_input_tokens").tolist(), [native.started.prompt_token_count])
        self.assertEqual(result.as_numpy("num_output_tokens").tolist(), [6])
        total = sum(position.chosen.logprob for position in positions)
        self.assertAlmostEqual(result.as_numpy("cumulative_logprob")[0], total, places=4)
        logprobs = json.loads(texts(result, "logprobs")[0])
        self.assertEqual(len(logprobs), 6)
        for got, wanted in zip(logprobs, positions):
            for token in wanted.top:
                self.assertEqual(np.float32(got[str(token.token_id)]["logprob"]), np.float32(token.logprob))

    def test_all_tensors_of_the_tensorrt_llm_back_end(self):
        native = self.native.generate(PROMPT, 5, seed=9, temperature=0.5, logprobs=0)
        inputs = [tensor("text_input", [[PROMPT.encode()]], "BYTES"), tensor("max_tokens", [[5]], "INT32"),
                  tensor("bad_words", [[b""]], "BYTES"), tensor("stop_words", [[b""]], "BYTES"),
                  tensor("top_k", [[0]], "INT32"), tensor("top_p", [[1.0]], "FP32"),
                  tensor("temperature", [[0.5]], "FP32"), tensor("beam_width", [[1]], "INT32"),
                  tensor("random_seed", [[9]], "UINT64"), tensor("return_log_probs", [[True]], "BOOL"),
                  tensor("pad_id", [[0]], "INT32"), tensor("min_length", [[1]], "INT32"),
                  tensor("length_penalty", [[1.0]], "FP32")]
        result = self.client.infer(MODEL, inputs)
        self.assertEqual(texts(result), [PROMPT + native.sequences[0].text])
        wanted = [position.chosen.logprob for position in native.sequences[0].logprobs]
        self.assertEqual(result.as_numpy("output_log_probs").tolist(), [wanted])
        self.assertAlmostEqual(result.as_numpy("cum_log_probs")[0], sum(wanted), places=4)

    def test_only_requested_outputs_come(self):
        result = self.client.infer(MODEL, vllm_inputs(max_tokens=2, flags=["return_finish_reason"]),
                                   outputs=[triton.InferRequestedOutput("text_output"),
                                            triton.InferRequestedOutput("batch_index")])
        self.assertEqual([output.name for output in result.get_response().outputs], ["text_output", "batch_index"])

    def test_a_refused_request_names_field_value_and_limit_and_the_stream_goes_on(self):
        answers = self.stream([
            {"inputs": vllm_inputs(temperature=3.5), "request_id": "hot"},
            {"inputs": vllm_inputs(max_tokens="many"), "request_id": "many"},
            {"inputs": vllm_inputs(no_such=1), "request_id": "unknown"},
            {"inputs": vllm_inputs(max_tokens=3, seed=1), "request_id": "good"}])
        errors = {str(error) for _, error in answers if error is not None}
        self.assertEqual(len(errors), 3, errors)
        self.assertTrue(any("sampling.temperature: 3.5 outside [0, 2]" in error for error in errors), errors)
        self.assertTrue(any('max_tokens: "many" is not an integer' in error for error in errors), errors)
        self.assertTrue(any("sampling_parameters.no_such: is not a known field" in error for error in errors), errors)
        good = [result for result, error in answers if error is None]
        self.assertEqual([result.get_response().id for result in good], ["good"])

    def test_the_header_triton_grpc_error_ends_the_stream_with_a_status(self):
        answers = self.stream([{"inputs": vllm_inputs(temperature=3.5)}], headers={"triton_grpc_error": "true"})
        self.assertEqual(len(answers), 1)
        self.assertEqual(answers[0][1].status(), "StatusCode.INVALID_ARGUMENT")

    def test_unary_errors_have_the_code(self):
        for inputs, code in ((vllm_inputs(n=17), "INVALID_ARGUMENT"), (vllm_inputs(stream=True, exclude=False),
                                                                       "INVALID_ARGUMENT")):
            with self.assertRaises(InferenceServerException) as raised:
                self.client.infer(MODEL, inputs)
            self.assertEqual(raised.exception.status(), "StatusCode." + code)
        with self.assertRaises(InferenceServerException) as raised:
            self.client.infer(MODEL, vllm_inputs(max_tokens=900, ignore_eos=True), timeout=1)  # microseconds
        self.assertEqual(raised.exception.status(), "StatusCode.DEADLINE_EXCEEDED")

    def test_statistics_are_true(self):
        before = self.client.get_inference_statistics(MODEL).model_stats[0]
        for _ in range(3):
            self.client.infer(MODEL, vllm_inputs(max_tokens=4, ignore_eos=True))
        self.native.generate(PROMPT, 4)
        of_one = self.client.get_inference_statistics(MODEL).model_stats[0]
        self.client.infer(MODEL, vllm_inputs(max_tokens=4, n=3))
        self.stream([{"inputs": vllm_inputs(stream=True, max_tokens=4), "request_id": str(i),
                      "enable_empty_final_response": i == 1} for i in range(2)])
        with self.assertRaises(InferenceServerException):  # refused, so never begun: counted nowhere
            self.client.infer(MODEL, vllm_inputs(temperature=3.5))
        after = self.client.get_inference_statistics(MODEL).model_stats[0]
        self.assertEqual(after.inference_count - before.inference_count, 7)
        self.assertEqual(after.inference_stats.success.count - before.inference_stats.success.count, 7)
        self.assertEqual(after.inference_stats.fail.count, before.inference_stats.fail.count)
        for name in ("queue", "compute_input", "compute_infer", "compute_output"):  # sequences
            counts = [getattr(stats.inference_stats, name).count for stats in (before, after)]
            self.assertEqual(counts[1] - counts[0], 9, name)
        self.assertGreaterEqual(after.execution_count - before.execution_count, 4)
        # With one sequence per request, for several compute at the same time.
        spent = of_one.inference_stats.success.ns - before.inference_stats.success.ns
        inside = of_one.inference_stats.compute_infer.ns - before.inference_stats.compute_infer.ns
        self.assertGreater(inside, 0)
        self.assertGreaterEqual(spent, inside)
        self.assertGreaterEqual(after.last_inference, before.last_inference)

    def test_cancelling_a_stream_frees_its_requests(self):
        def stats():
            return self.client.get_inference_statistics(MODEL).model_stats[0].inference_stats

        answers = queue.Queue()
        before = stats()
        self.client.start_stream(callback=lambda result, error: answers.put(result))
        for i in range(4):
            self.client.async_stream_infer(MODEL, vllm_inputs(stream=True, max_tokens=1000, ignore_eos=True),
                                           request_id=str(i))
        running = set()
        while len(running) < 4:
            running.add(answers.get(timeout=60).get_response().id)
        self.client.stop_stream(cancel_requests=True)
        while (after := stats()).fail.count + after.success.count < before.fail.count + before.success.count + 4:
            pass
        self.assertEqual(after.fail.count, before.fail.count + 4)
        load = self.native.call("minitron.v1.AdminService", "GetLoad",
                                self.native.message("minitron.v1.GetLoadRequest")())
        self.assertEqual(load.active_calls, 0)

    def test_asyncio(self):
        before = self.client.get_inference_statistics(MODEL).model_stats[0].inference_stats.success.count

        async def run():
            async with triton_aio.InferenceServerClient(self.server.address) as client:
                self.assertTrue(await client.is_server_ready())

                async def requests():
                    yield {"model_name": MODEL, "inputs": vllm_inputs(stream=True, seed=2, max_tokens=12),
                           "request_id": "x"}
                text = ""
                async for result, error in client.stream_infer(requests()):
                    self.assertIsNone(error)
                    if result.as_numpy("text_output") is not None:
                        text += texts(result)[0]
                    if is_final(result):
                        break
                self.assertEqual(len(result.get_response().outputs), 1)  # this client cannot ask for an empty one
                stats = (await client.get_inference_statistics(MODEL)).model_stats[0].inference_stats
                self.assertEqual(stats.success.count - before, 1)
                unary = await client.infer(MODEL, vllm_inputs(seed=2, max_tokens=12))
                return text, texts(unary)[0]
        streamed, collected = asyncio.run(run())
        self.assertEqual(streamed, collected)
        self.assertEqual(streamed, self.native.generate(PROMPT, 12, seed=2).sequences[0].text)

    def test_every_field_is_the_real_client_s(self):
        real = {message.full_name: message for pb2 in (service_pb2, model_config_pb2)
                for message in walk(pb2.DESCRIPTOR.message_types_by_name.values())}
        ours = self.native.pool.FindFileByName("compat/open_inference.proto")
        compared = 0
        for message in walk(ours.message_types_by_name.values()):
            for field in message.fields:
                other = real[message.full_name].fields_by_name[field.name]
                self.assertEqual((field.number, field.type, field.is_repeated),
                                 (other.number, other.type, other.is_repeated), field.full_name)
                compared += 1
        self.assertGreater(compared, 70)
        real_methods = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
        for method in ours.services_by_name["GRPCInferenceService"].methods:
            other = real_methods[method.name]
            self.assertEqual(method.input_type.full_name, other.input_type.full_name)
            self.assertEqual(method.output_type.full_name, other.output_type.full_name)
        for value in ours.enum_types_by_name["DataType"].values:
            self.assertEqual(model_config_pb2.DataType.Value(value.name), value.number)


def walk(messages):
    for message in messages:
        yield message
        yield from walk(message.nested_types)


class ProtocolSwitchTest(server_fixture.ServerTestCase):

    flags = ("--no-open-inference",)

    def test_a_protocol_that_is_off_is_unimplemented(self):
        with triton.InferenceServerClient(self.server.address) as client:
            with self.assertRaises(InferenceServerException) as raised:
                client.is_server_live()
        self.assertEqual(raised.exception.status(), "StatusCode.UNIMPLEMENTED")


if __name__ == "__main__":
    unittest.main()
