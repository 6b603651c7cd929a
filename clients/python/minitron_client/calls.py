"""Every call of both clients, once: its arguments, what is sent to which method, what the answer becomes, and when it is
tried again. `client` and `aio` add only how one waits."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from minitron.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from typing_extensions import Unpack

from minitron_client import errors, requests
from minitron_client.options import Attempts, ClientOptions

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class HealthStatus(enum.Enum):
    """What a server, or one of its services, says of itself."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
    """Starting, draining or failed."""
    SERVICE_UNKNOWN = 3
    """Only from watch_health: there is no service of this name."""


class Stubs:
    """The services of one channel, of either kind."""

    def __init__(self, channel: Any) -> None:
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        self.models: Any = model_pb2_grpc.ModelServiceStub(channel)
        self.admin: Any = admin_pb2_grpc.AdminServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)


def _unchanged(message: Any) -> Any:
    return message


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request with one answer, ready to be sent. result: of the answer's message.  timeout: as in ClientOptions."""

    method: Callable[[Stubs], Any]
    request: Any
    timeout: float | None
    result: Callable[[Any], T] = _unchanged


@dataclass(frozen=True)
class StreamingCall(Generic[T]):
    """The same with a stream of answers; result: of each."""

    method: Callable[[Stubs], Any]
    request: Any
    timeout: float | None
    result: Callable[[Any], T] = _unchanged


class ClientBase:
    """A channel with its options. module: grpc or grpc.aio."""

    def __init__(self, target: str, options: ClientOptions, module: Any) -> None:
        self._options = options
        self._channel: Any = options.open_channel(target, module)
        self._stubs = Stubs(self._channel)

    def _send(self, call: Call[Any] | StreamingCall[Any], attempts: Attempts) -> Any:
        """One attempt: what gRPC gives for it, to be had or awaited."""
        return call.method(self._stubs)(call.request, timeout=attempts.remaining(),
                                        metadata=self._options.call_metadata())


def cancelled_by_caller() -> errors.MinitronError:
    """What a stream ends with when this side ended it."""
    return errors.error_of(grpc.StatusCode.CANCELLED, "cancelled by the caller")


class StreamBase(Generic[T]):
    """What both kinds of stream decide alike: how one begins, what it ends with and whether it is tried again."""

    def __init__(self, client: ClientBase, call: StreamingCall[T]) -> None:
        self._attempts = Attempts(client._options, call.timeout)
        self._send: Callable[[], Any] = lambda: client._send(call, self._attempts)
        self._result = call.result
        self._answered = False
        self._ended = False
        self._error: errors.MinitronError | None = None
        self._call = self._send()

    def _is_over(self) -> bool:
        """True after the last event; raises again what the stream ended with."""
        if self._error is not None:
            raise self._error
        return self._ended

    def _event(self, message: Any) -> T:
        self._answered = True
        return self._result(message)

    def _fail(self, error: errors.MinitronError) -> NoReturn:
        self._error = error
        raise error from None

    def _wait_after(self, error: errors.MinitronError, cancelled: bool) -> float:
        """Seconds until the next attempt, or raises what the stream ends with."""
        if cancelled:
            self._fail(cancelled_by_caller())
        if self._answered:
            self._fail(error)
        try:
            return self._attempts.wait_after(error)
        except errors.MinitronError as final:
            self._fail(final)


def describe(run: F, build: Callable[..., Any]) -> F:
    """`run` as a method with the name, text and arguments of `build`, for help() and editors."""
    functools.update_wrapper(run, build)
    arguments = inspect.signature(build)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    setattr(run, "__signature__", arguments.replace(parameters=[this, *arguments.parameters.values()],
                                                    return_annotation=inspect.Signature.empty))
    return run


def generate(prompt: requests.Text, *, timeout: float | None = None,
             **arguments: Unpack[requests.GenerateArguments]) -> Call[generation_pb2.GenerateResponse]:
    """A whole completion, as a GenerateResponse. prompt: text, or token ids."""
    request = generation_pb2.GenerateRequest(task=requests.generation_task(prompt, arguments))
    return Call(lambda stubs: stubs.generation.Generate, request, timeout)


def stream(prompt: requests.Text, *, timeout: float | None = None, **arguments: Unpack[requests.GenerateArguments],
           ) -> StreamingCall[generation_pb2.GenerateStreamResponse]:
    """The same completion as it is made: `started`, deltas, one `finished` per sequence, each a GenerateStreamResponse.

    Returns at once; a refusal comes with the first event. The text is complete only when the stream ends without an
    exception.
    """
    request = generation_pb2.GenerateStreamRequest(task=requests.generation_task(prompt, arguments))
    return StreamingCall(lambda stubs: stubs.generation.GenerateStream, request, timeout)


def score(context: requests.Text, target: requests.Text, *, timeout: float | None = None,
          **arguments: Unpack[requests.ScoreArguments]) -> Call[generation_pb2.ScoreResponse]:
    """Log-probabilities of the target's tokens after the context, as a ScoreResponse."""
    return Call(lambda stubs: stubs.generation.Score, requests.score_request(context, target, **arguments), timeout)


def tokenize(text: str, *, timeout: float | None = None,
             **arguments: Unpack[requests.TokenizeArguments]) -> Call[generation_pb2.TokenizeResponse]:
    """Text to token ids, with the bytes of each, as a TokenizeResponse."""
    return Call(lambda stubs: stubs.generation.Tokenize, requests.tokenize_request(text, **arguments), timeout)


def detokenize(token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool | None = None,
               timeout: float | None = None) -> Call[str]:
    """Token ids to text."""
    request = requests.detokenize_request(token_ids, model=model, skip_special_tokens=skip_special_tokens)
    return Call(lambda stubs: stubs.generation.Detokenize, request, timeout, lambda answer: str(answer.text))


def models(*, timeout: float | None = None) -> Call[list[model_pb2.Model]]:
    """The served models, with their limits and defaults."""
    return Call(lambda stubs: stubs.models.ListModels, model_pb2.ListModelsRequest(), timeout,
                lambda answer: list(answer.models))


def load(*, timeout: float | None = None) -> Call[admin_pb2.GetLoadResponse]:
    """How busy the server is, as a GetLoadResponse. On a server with authentication for the role admin only."""
    return Call(lambda stubs: stubs.admin.GetLoad, admin_pb2.GetLoadRequest(), timeout)


def server_info(*, timeout: float | None = None) -> Call[admin_pb2.GetServerInfoResponse]:
    """Version, limits and settings, as a GetServerInfoResponse. For the role admin only, like load."""
    return Call(lambda stubs: stubs.admin.GetServerInfo, admin_pb2.GetServerInfoRequest(), timeout)


def cancel(request_ids: str | Sequence[str], *, timeout: float | None = None) -> Call[int]:
    """Ends the live requests of these names (request_id), whoever made them; returns how many were live.

    Their callers see CancelledError. For the role admin only; a stream of one's own has `cancel`.
    """
    names = [request_ids] if isinstance(request_ids, str) else request_ids
    return Call(lambda stubs: stubs.admin.CancelRequests, admin_pb2.CancelRequestsRequest(request_ids=names), timeout,
                lambda answer: int(answer.cancelled))


def drain(*, timeout: float | None = None) -> Call[None]:
    """Starts a drain, as SIGTERM does, and returns: the server refuses new requests, finishes what runs, and exits.

    For the role admin only.
    """
    return Call(lambda stubs: stubs.admin.Drain, admin_pb2.DrainRequest(), timeout, lambda answer: None)


def health(service: str = "", *, timeout: float | None = None) -> Call[HealthStatus]:
    """Whether requests are taken, as a HealthStatus; asks for no token. service: e.g. "minitron.v1.GenerationService";
    "" means the whole server, and an unknown one raises NotFoundError."""
    return Call(lambda stubs: stubs.health.Check, health_pb2.HealthCheckRequest(service=service), timeout,
                _health_status)


def watch_health(service: str = "", *, timeout: float | None = None) -> StreamingCall[HealthStatus]:
    """The HealthStatus now and at every change, until cancelled. An unknown service is SERVICE_UNKNOWN."""
    return StreamingCall(lambda stubs: stubs.health.Watch, health_pb2.HealthCheckRequest(service=service), timeout,
                         _health_status)


def _health_status(answer: Any) -> HealthStatus:
    try:
        return HealthStatus(answer.status)
    except ValueError:  # of a later protocol
        return HealthStatus.UNKNOWN
