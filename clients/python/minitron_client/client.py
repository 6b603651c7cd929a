"""The blocking client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, TypeVar

import grpc
from typing_extensions import Self

from minitron_client import calls, errors
from minitron_client.options import Attempts, ClientOptions

P = ParamSpec("P")
T = TypeVar("T")


class Stream(calls.StreamBase[T], Iterator[T]):
    """The events of one call.

    Iterate in one thread; `cancel` may be called from any. As a context manager it cancels what was not read to the end.
    An exception that ends the iteration is raised again by every later `next`. A refusal is retried (RetryPolicy) only
    until the first event.
    """

    def __init__(self, client: calls.ClientBase, call: calls.StreamingCall[T]) -> None:
        self._lock = threading.Lock()  # guards _call and the setting of _cancelled
        self._cancelled = threading.Event()
        super().__init__(client, call)

    def __next__(self) -> T:
        if self._is_over():
            raise StopIteration
        while True:
            try:
                return self._event(next(self._call))
            except StopIteration:
                self._ended = True
                raise
            except grpc.RpcError as error:
                failure = errors.from_rpc_error(error)
            self._cancelled.wait(self._wait_after(failure, self._cancelled.is_set()))
            self._try_again()

    def cancel(self) -> None:
        """Ends the request; the server frees what it held. The iteration raises CancelledError, unless it has ended."""
        with self._lock:
            self._cancelled.set()
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.cancel()

    def _try_again(self) -> None:
        with self._lock:
            if not self._cancelled.is_set():
                self._call = self._send()
                return
        self._fail(calls.cancelled_by_caller())


def _blocking(build: Callable[P, calls.Call[T]]) -> Callable[Concatenate[Client, P], T]:
    def run(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(build(*args, **kwargs))

    return calls.describe(run, build)


def _streaming(build: Callable[P, calls.StreamingCall[T]]) -> Callable[Concatenate[Client, P], Stream[T]]:
    def run(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Stream[T]:
        return Stream(self, build(*args, **kwargs))

    return calls.describe(run, build)


class Client(calls.ClientBase):
    """Calls to one server. Thread-safe. Connects at the first call; close it, or use it as a context manager.

    target: any gRPC target, e.g. "localhost:50051".
    Every call takes `timeout` in seconds (None: ClientOptions.timeout), retries as RetryPolicy says, and raises
    minitron_client.errors.MinitronError. What each takes and returns is in `calls`.
    """

    def __init__(self, target: str = "localhost:50051", options: ClientOptions = ClientOptions()) -> None:
        super().__init__(target, options, grpc)

    generate = _blocking(calls.generate)
    stream = _streaming(calls.stream)
    score = _blocking(calls.score)
    tokenize = _blocking(calls.tokenize)
    detokenize = _blocking(calls.detokenize)
    models = _blocking(calls.models)
    load = _blocking(calls.load)
    server_info = _blocking(calls.server_info)
    cancel = _blocking(calls.cancel)
    drain = _blocking(calls.drain)
    health = _blocking(calls.health)
    watch_health = _streaming(calls.watch_health)

    def close(self) -> None:
        """Ends the connection; calls that run end with CancelledError."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _run(self, call: calls.Call[T]) -> T:
        attempts = Attempts(self._options, call.timeout)
        while True:
            try:
                return call.result(self._send(call, attempts))
            except grpc.RpcError as error:
                failure = errors.from_rpc_error(error)
            time.sleep(attempts.wait_after(failure))
