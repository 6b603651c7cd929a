"""The client for asyncio; the calls and meanings of `client`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from minitron.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from typing_extensions import Self, Unpack

from minitron_client import errors, requests
from minitron_client.options import Attempts, ClientOptions


def _cancelled_by_caller() -> errors.MinitronError:
    return errors.error_of(grpc.StatusCode.CANCELLED, "cancelled by the caller")


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncStream(AsyncIterator[generation_pb2.GenerateStreamResponse]):
    """As `client.Stream`, iterated with `async for` in one task. Cancelling that task cancels the request too."""

    def __init__(self, start: Callable[[float | None], Any], attempts: Attempts) -> None:
        self._start = start
        self._attempts = attempts
        self._cancelled = asyncio.Event()
        self._answered = False
        self._ended = False
        self._error: errors.MinitronError | None = None
        self._call = start(attempts.remaining())

    async def __anext__(self) -> generation_pb2.GenerateStreamResponse:
        if self._error is not None:
            raise self._error
        if self._ended:
            raise StopAsyncIteration
        while True:
            try:
                event = await self._call.read()
            except grpc.aio.AioRpcError as error:
                await self._try_again(errors.from_rpc_error(error))
                continue
            except asyncio.CancelledError:
                self._error = _cancelled_by_caller()
                if _task_is_cancelled():
                    raise
                raise self._error from None  # grpc.aio says so of a call that was cancelled, not the task
            if event is grpc.aio.EOF:
                self._ended = True
                raise StopAsyncIteration
            self._answered = True
            return event  # type: ignore[no-any-return]

    def cancel(self) -> None:
        """Ends the request; the server frees what it held. The iteration raises CancelledError, unless it has ended."""
        self._cancelled.set()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *unused: object) -> None:
        self.cancel()

    async def _try_again(self, error: errors.MinitronError) -> None:
        try:
            if self._cancelled.is_set():
                raise _cancelled_by_caller()
            if self._answered:
                raise error
            wait = self._attempts.wait_after(error)
            try:
                await asyncio.wait_for(self._cancelled.wait(), wait)
            except TimeoutError:
                self._call = self._start(self._attempts.remaining())
                return
            raise _cancelled_by_caller()
        except errors.MinitronError as final:
            self._error = final
            raise final from None


class AsyncClient:
    """As `client.Client`; for one event loop, from within which it must be made."""

    def __init__(self, target: str = "localhost:50051", options: ClientOptions = ClientOptions()) -> None:
        self._options = options
        self._channel = options.open_channel(target, grpc.aio)
        self._generation: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._models: Any = model_pb2_grpc.ModelServiceStub(self._channel)
        self._admin: Any = admin_pb2_grpc.AdminServiceStub(self._channel)

    async def close(self) -> None:
        """Ends the connection and the calls that run."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *unused: object) -> None:
        await self.close()

    async def generate(self, prompt: requests.Text, *, timeout: float | None = None,
                       **arguments: Unpack[requests.GenerateArguments]) -> generation_pb2.GenerateResponse:
        """A whole completion. prompt: text, or token ids."""
        request = generation_pb2.GenerateRequest(task=requests.generation_task(prompt, arguments))
        return await self._call(self._generation.Generate, request, timeout)

    def stream(self, prompt: requests.Text, *, timeout: float | None = None,
               **arguments: Unpack[requests.GenerateArguments]) -> AsyncStream:
        """The same completion, as it is made. Nothing to await; refusals come with the first event."""
        request = generation_pb2.GenerateStreamRequest(task=requests.generation_task(prompt, arguments))
        return AsyncStream(lambda left: self._generation.GenerateStream(
            request, timeout=left, metadata=self._options.call_metadata()), Attempts(self._options, timeout))

    async def score(self, context: requests.Text, target: requests.Text, *, timeout: float | None = None,
                    **arguments: Unpack[requests.ScoreArguments]) -> generation_pb2.ScoreResponse:
        """Log-probabilities of the target's tokens after the context."""
        return await self._call(self._generation.Score, requests.score_request(context, target, **arguments), timeout)

    async def tokenize(self, text: str, *, timeout: float | None = None,
                       **arguments: Unpack[requests.TokenizeArguments]) -> generation_pb2.TokenizeResponse:
        """Text to token ids, with the bytes of each."""
        return await self._call(self._generation.Tokenize, requests.tokenize_request(text, **arguments), timeout)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool | None = None,
                         timeout: float | None = None) -> str:
        """Token ids to text."""
        request = requests.detokenize_request(token_ids, model=model, skip_special_tokens=skip_special_tokens)
        return (await self._call(self._generation.Detokenize, request, timeout)).text

    async def models(self, *, timeout: float | None = None) -> list[model_pb2.Model]:
        """The served models, with their limits and defaults."""
        return list((await self._call(self._models.ListModels, model_pb2.ListModelsRequest(), timeout)).models)

    async def load(self, *, timeout: float | None = None) -> admin_pb2.GetLoadResponse:
        """How busy the server is; on a server with authentication for the role admin only."""
        return await self._call(self._admin.GetLoad, admin_pb2.GetLoadRequest(), timeout)

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        attempts = Attempts(self._options, timeout)
        while True:
            try:
                return await method(request, timeout=attempts.remaining(), metadata=self._options.call_metadata())
            except grpc.aio.AioRpcError as error:
                failure = errors.from_rpc_error(error)
            await asyncio.sleep(attempts.wait_after(failure))
