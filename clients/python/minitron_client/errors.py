"""What a failed call raises: one class per status, with the google.rpc details as attributes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS_TRAILER = "grpc-status-details-bin"
_PUSHBACK_TRAILER = "grpc-retry-pushback-ms"


@dataclass(frozen=True)
class FieldViolation:
    """A field of the request that was refused."""

    field: str
    description: str


@dataclass(frozen=True)
class QuotaViolation:
    """A limit that was reached."""

    subject: str
    description: str


@dataclass(frozen=True)
class Details:
    """The google.rpc details of a status, decoded."""

    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    field_violations: tuple[FieldViolation, ...] = ()
    quota_violations: tuple[QuotaViolation, ...] = ()
    retry_delay: float | None = None
    pushback: float | None = None


class MinitronError(Exception):
    """A call that failed. `code` is the gRPC status, `message` its text.

    reason: machine-readable cause (ErrorInfo), "" when the server sent none.  metadata: its facts, e.g. field, value, limit.
    field_violations, quota_violations: BadRequest and QuotaFailure.  retry_delay: seconds to wait (RetryInfo), or None.
    pushback: seconds of grpc-retry-pushback-ms, negative for "do not retry", or None.
    """

    def __init__(self, code: grpc.StatusCode, message: str, details: Details = Details()) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.reason = details.reason
        self.metadata = dict(details.metadata)
        self.field_violations = details.field_violations
        self.quota_violations = details.quota_violations
        self.retry_delay = details.retry_delay
        self.pushback = details.pushback

    @property
    def field(self) -> str | None:
        """The refused field of the request, e.g. "sampling.temperature"."""
        if self.field_violations:
            return self.field_violations[0].field
        return self.metadata.get("field")


class CancelledError(MinitronError):
    """The call was cancelled, here or by an operator."""


class InvalidArgumentError(MinitronError):
    """The request is wrong and stays wrong: INVALID_ARGUMENT or OUT_OF_RANGE. `field` says where."""


class DeadlineExceededError(MinitronError):
    """The deadline passed before the call was done."""


class NotFoundError(MinitronError):
    """No such model, or service to ask the health of."""


class AlreadyExistsError(MinitronError):
    """A live request has this request_id."""


class PermissionDeniedError(MinitronError):
    """The token is known but not allowed to do this."""


class UnauthenticatedError(MinitronError):
    """No token, or an unknown one."""


class ResourceExhaustedError(MinitronError):
    """A limit or quota is reached; `retry_delay` says when to come back, where that is known."""


class FailedPreconditionError(MinitronError):
    """The server is not in a state for this call: FAILED_PRECONDITION or ABORTED."""


class UnimplementedError(MinitronError):
    """The server does not have this call."""


class UnavailableError(MinitronError):
    """Not reachable, draining or overloaded; the same request may succeed later or elsewhere."""


class InternalError(MinitronError):
    """The server failed: INTERNAL, UNKNOWN or DATA_LOSS."""


_CLASSES: dict[grpc.StatusCode, type[MinitronError]] = {
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.ABORTED: FailedPreconditionError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
}


def decode_details(trailers: Any) -> Details:
    """The details in trailing metadata: pairs of key and value. What cannot be decoded is left out."""
    values = dict(trailers or ())
    facts: dict[str, Any] = {"pushback": _pushback(values.get(_PUSHBACK_TRAILER))}
    try:
        anys = status_pb2.Status.FromString(values.get(_DETAILS_TRAILER, b"")).details
    except DecodeError:
        anys = []
    for any_message in anys:
        try:
            _decode_one(any_message, facts)
        except DecodeError:
            continue
    return Details(**facts)


def _decode_one(any_message: Any, facts: dict[str, Any]) -> None:
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    bad, quota = error_details_pb2.BadRequest(), error_details_pb2.QuotaFailure()
    if any_message.Unpack(info):
        facts["reason"], facts["metadata"] = info.reason, dict(info.metadata)
    elif any_message.Unpack(retry):
        facts["retry_delay"] = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    elif any_message.Unpack(bad):
        facts["field_violations"] = tuple(FieldViolation(v.field, v.description) for v in bad.field_violations)
    elif any_message.Unpack(quota):
        facts["quota_violations"] = tuple(QuotaViolation(v.subject, v.description) for v in quota.violations)


def _pushback(value: Any) -> float | None:
    """Seconds; what is not a number means "do not retry", as gRPC's retry design has it."""
    if value is None:
        return None
    try:
        return int(value) / 1000
    except ValueError:
        return -1.0


def error_of(code: grpc.StatusCode, message: str | None, trailers: Any = ()) -> MinitronError:
    """The exception of a status."""
    return _CLASSES.get(code, InternalError)(code, message or "", decode_details(trailers))


def from_rpc_error(error: Any) -> MinitronError:
    """The exception of a grpc.RpcError, of either kind of channel."""
    return error_of(error.code(), error.details(), error.trailing_metadata())
