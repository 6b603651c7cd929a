"""Client of minitron-server. `Client` blocks, `AsyncClient` is for asyncio; messages are those of minitron.v1."""

from minitron_client.aio import AsyncClient, AsyncStream
from minitron_client.calls import HealthStatus
from minitron_client.client import Client, Stream
from minitron_client.errors import (AlreadyExistsError, CancelledError, DeadlineExceededError, FailedPreconditionError,
                                    FieldViolation, InternalError, InvalidArgumentError, MinitronError, NotFoundError,
                                    PermissionDeniedError, QuotaViolation, ResourceExhaustedError, UnauthenticatedError,
                                    UnavailableError, UnimplementedError)
from minitron_client.options import ClientOptions, RetryPolicy, Tls

__all__ = [
    "AlreadyExistsError", "AsyncClient", "AsyncStream", "CancelledError", "Client", "ClientOptions",
    "DeadlineExceededError", "FailedPreconditionError", "FieldViolation", "HealthStatus", "InternalError",
    "InvalidArgumentError", "MinitronError", "NotFoundError", "PermissionDeniedError", "QuotaViolation",
    "ResourceExhaustedError", "RetryPolicy", "Stream", "Tls", "UnauthenticatedError", "UnavailableError",
    "UnimplementedError",
]
