"""The blocking client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
from minitron.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from typing_extensions import Self, Unpack

from minitron_client import errors, requests
from minitron_client.options import Attempts, ClientOptions


class Stream(Iterator[generation_pb2.GenerateStreamResponse]):
    """The events of one completion: `started`, deltas, one `finished` per sequence.

    Iterate in one thread; `cancel` may be called from any. As a context manager it cancels what was not read to the end.
    The text is complete only when the iteration ends without an exception; an exception is raised again by every later
    `next`. A refusal is retried (RetryPolicy) only until the first event.
    """

    def __init__(self, start: Callable[[float | None], Any], attempts: Attempts) -> None:
        self._start = start
        self._attempts = attempts
        self._lock = threading.Lock()  # guards _call and the setting of _cancelled
        self._cancelled = threading.Event()
        self._answered = False
        self._ended = False
        self._error: errors.MinitronError | None = None
        self._call = start(attempts.remaining())

    def __next__(self) -> generation_pb2.GenerateStreamResponse:
        if self._error is not None:
            raise self._error
        if self._ended:
            raise StopIteration
        while True:
            try:
                event: generation_pb2.GenerateStreamResponse = next(self._call)
            except StopIteration:
                self._ended = True
                raise
            except grpc.RpcError as error:
                self._try_again(errors.from_rpc_error(error))
                continue
            self._answered = True
            return event

    def cancel(self) -> None:
        """Ends the request; the server frees what it held. The iteration raises CancelledError, unless it has ended."""
        with self._lock:
            self._cancelled.set()
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.cancel()

    def _try_again(self, error: errors.MinitronError) -> None:
        """Waits and calls anew, or raises and remembers what the stream ends with."""
        try:
            if not self._cancelled.is_set():
                if self._answered:
                    raise error
                self._cancelled.wait(self._attempts.wait_after(error))
            if self._cancelled.is_set():
                raise errors.error_of(grpc.StatusCode.CANCELLED, "cancelled by the caller")
        except errors.MinitronError as final:
            self._error = final
            raise final from None
        with self._lock:
            self._call = self._start(self._attempts.remaining())
            if self._cancelled.is_set():
                self._call.cancel()


class Client:
    """Calls to one server. Thread-safe. Connects at the first call; close it, or use it as a context manager.

    target: any gRPC target, e.g. "localhost:50051".
    Every call takes `timeout` in seconds (None: ClientOptions.timeout), retries as RetryPolicy says, and raises
    minitron_client.errors.MinitronError.
    """

    def __init__(self, target: str = "localhost:50051", options: ClientOptions = ClientOptions()) -> None:
        self._options = options
        self._channel = options.open_channel(target, grpc)
        self._generation: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._models: Any = model_pb2_grpc.ModelServiceStub(self._channel)
        self._admin: Any = admin_pb2_grpc.AdminServiceStub(self._channel)

    def close(self) -> None:
        """Ends the connection; calls that run end with CancelledError."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def generate(self, prompt: requests.Text, *, timeout: float | None = None,
                 **arguments: Unpack[requests.GenerateArguments]) -> generation_pb2.GenerateResponse:
        """A whole completion. prompt: text, or token ids."""
        request = generation_pb2.GenerateRequest(task=requests.generation_task(prompt, arguments))
        return self._call(self._generation.Generate, request, timeout)

    def stream(self, prompt: requests.Text, *, timeout: float | None = None,
               **arguments: Unpack[requests.GenerateArguments]) -> Stream:
        """The same completion, as it is made. Does not block; refusals come with the first event."""
        request = generation_pb2.GenerateStreamRequest(task=requests.generation_task(prompt, arguments))
        return Stream(lambda left: self._generation.GenerateStream(
            request, timeout=left, metadata=self._options.call_metadata()), Attempts(self._options, timeout))

    def score(self, context: requests.Text, target: requests.Text, *, timeout: float | None = None,
              **arguments: Unpack[requests.ScoreArguments]) -> generation_pb2.ScoreResponse:
        """Log-probabilities of the target's tokens after the context."""
        return self._call(self._generation.Score, requests.score_request(context, target, **arguments), timeout)

    def tokenize(self, text: str, *, timeout: float | None = None,
                 **arguments: Unpack[requests.TokenizeArguments]) -> generation_pb2.TokenizeResponse:
        """Text to token ids, with the bytes of each."""
        return self._call(self._generation.Tokenize, requests.tokenize_request(text, **arguments), timeout)

    def detokenize(self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool | None = None,
                   timeout: float | None = None) -> str:
        """Token ids to text."""
        request = requests.detokenize_request(token_ids, model=model, skip_special_tokens=skip_special_tokens)
        return self._call(self._generation.Detokenize, request, timeout).text

    def models(self, *, timeout: float | None = None) -> list[model_pb2.Model]:
        """The served models, with their limits and defaults."""
        return list(self._call(self._models.ListModels, model_pb2.ListModelsRequest(), timeout).models)

    def load(self, *, timeout: float | None = None) -> admin_pb2.GetLoadResponse:
        """How busy the server is; on a server with authentication for the role admin only."""
        return self._call(self._admin.GetLoad, admin_pb2.GetLoadRequest(), timeout)

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        attempts = Attempts(self._options, timeout)
        while True:
            try:
                return method(request, timeout=attempts.remaining(), metadata=self._options.call_metadata())
            except grpc.RpcError as error:
                failure = errors.from_rpc_error(error)
            time.sleep(attempts.wait_after(failure))
