"""The client for asyncio; the calls and meanings of `client`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc
import grpc.aio
from typing_extensions import Self

from minitron_client import calls, errors
from minitron_client.options import Attempts, ClientOptions

P = ParamSpec("P")
T = TypeVar("T")


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncStream(calls.StreamBase[T], AsyncIterator[T]):
    """As `client.Stream`, iterated with `async for` in one task. Cancelling that task cancels the request too."""

    def __init__(self, client: calls.ClientBase, call: calls.StreamingCall[T]) -> None:
        self._cancelled = asyncio.Event()
        super().__init__(client, call)

    async def __anext__(self) -> T:
        if self._is_over():
            raise StopAsyncIteration
        while True:
            try:
                message = await self._call.read()
            except grpc.RpcError as error:
                failure = errors.from_rpc_error(error)
            except asyncio.CancelledError:
                self._error = calls.cancelled_by_caller()
                if _task_is_cancelled():
                    raise
                raise self._error from None  # grpc.aio says so of a call that was cancelled, not the task
            else:
                if message is not grpc.aio.EOF:
                    return self._event(message)
                self._ended = True
                raise StopAsyncIteration
            await self._try_again_in(self._wait_after(failure, self._cancelled.is_set()))

    def cancel(self) -> None:
        """Ends the request; the server frees what it held. The iteration raises CancelledError, unless it has ended."""
        self._cancelled.set()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *unused: object) -> None:
        self.cancel()

    async def _try_again_in(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._cancelled.wait(), seconds)
        except TimeoutError:
            self._call = self._send()
            return
        self._fail(calls.cancelled_by_caller())


def _awaited(build: Callable[P, calls.Call[T]]) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    async def run(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(build(*args, **kwargs))

    return calls.describe(run, build)


def _streaming(build: Callable[P, calls.StreamingCall[T]]) -> Callable[Concatenate[AsyncClient, P], AsyncStream[T]]:
    def run(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncStream[T]:
        return AsyncStream(self, build(*args, **kwargs))

    return calls.describe(run, build)


class AsyncClient(calls.ClientBase):
    """As `client.Client`, each call to be awaited; for one event loop, from within which it must be made."""

    def __init__(self, target: str = "localhost:50051", options: ClientOptions = ClientOptions()) -> None:
        super().__init__(target, options, grpc.aio)

    generate = _awaited(calls.generate)
    stream = _streaming(calls.stream)
    score = _awaited(calls.score)
    tokenize = _awaited(calls.tokenize)
    detokenize = _awaited(calls.detokenize)
    models = _awaited(calls.models)
    load = _awaited(calls.load)
    server_info = _awaited(calls.server_info)
    cancel = _awaited(calls.cancel)
    drain = _awaited(calls.drain)
    health = _awaited(calls.health)
    watch_health = _streaming(calls.watch_health)

    async def close(self) -> None:
        """Ends the connection and the calls that run."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *unused: object) -> None:
        await self.close()

    async def _run(self, call: calls.Call[T]) -> T:
        attempts = Attempts(self._options, call.timeout)
        while True:
            try:
                return call.result(await self._send(call, attempts))
            except grpc.RpcError as error:
                failure = errors.from_rpc_error(error)
            await asyncio.sleep(attempts.wait_after(failure))
