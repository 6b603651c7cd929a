"""How to reach a server: address, TLS, token, deadline, retries."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from minitron_client import errors

_MAX_MESSAGE_BYTES = 64 << 20  # log-probabilities of a long prompt do not fit gRPC's 4 MiB


@dataclass(frozen=True)
class Tls:
    """An encrypted channel; contents of PEM files.

    root_certificates: who may sign the server's certificate; None: the authorities gRPC ships.
    private_key and certificate_chain: this client's own, for a server with --tls-client-ca; both or none.
    server_name: expected in the certificate when it is not the host of the target.
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    certificate_chain: bytes | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ValueError("Tls: private_key and certificate_chain go together")


@dataclass(frozen=True)
class RetryPolicy:
    """When a refused call is tried again: only UNAVAILABLE, and never once anything of the answer has come.

    attempts: calls at most, the first included; 1 never retries.  initial_delay, max_delay: seconds of the exponential
    wait, of which a random half to whole is taken.  A delay the server names is taken instead, whatever max_delay is;
    a wait that would outlast the deadline is not begun.
    """

    attempts: int = 4
    initial_delay: float = 0.1
    max_delay: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"RetryPolicy.attempts: {self.attempts} is below 1")
        if self.initial_delay < 0 or self.max_delay < 0:
            raise ValueError("RetryPolicy: a delay is below 0")

    def wait(self, error: errors.MinitronError, attempt: int) -> float | None:
        """Seconds to wait after failed attempt number `attempt` (from 1), or None to give up."""
        if not isinstance(error, errors.UnavailableError) or attempt >= self.attempts:
            return None
        if error.pushback is not None:
            return error.pushback if error.pushback >= 0 else None
        if error.retry_delay is not None:
            return error.retry_delay
        longest = min(self.max_delay, self.initial_delay * 2.0 ** min(attempt - 1, 100))  # more would leave float's range
        return longest * random.uniform(0.5, 1)


@dataclass(frozen=True)
class ClientOptions:
    """Everything about a client but its target.

    tls: None for a channel that is not encrypted.  token: bearer token, sent with every call.  timeout: default deadline
    of a call in seconds, its retries included; None: none.  metadata: sent with every call, e.g. x-minitron-tenant.
    channel_options: of gRPC; they come after, and so replace, the client's own.
    """

    tls: Tls | None = None
    token: str | None = field(default=None, repr=False)
    timeout: float | None = None
    retry: RetryPolicy = RetryPolicy()
    metadata: Mapping[str, str] = field(default_factory=dict)
    channel_options: Sequence[tuple[str, Any]] = ()

    def call_metadata(self) -> tuple[tuple[str, str], ...]:
        pairs = tuple((key.lower(), value) for key, value in self.metadata.items())
        return pairs if self.token is None else (*pairs, ("authorization", f"Bearer {self.token}"))

    def open_channel(self, target: str, module: Any) -> Any:
        """A channel of `module`: grpc or grpc.aio. It connects at the first call."""
        options = {"grpc.max_receive_message_length": _MAX_MESSAGE_BYTES, **dict(self.channel_options)}
        if self.tls is None:
            return module.insecure_channel(target, options=list(options.items()))
        if self.tls.server_name is not None:
            options["grpc.ssl_target_name_override"] = self.tls.server_name
        credentials = grpc.ssl_channel_credentials(
            self.tls.root_certificates, self.tls.private_key, self.tls.certificate_chain)
        return module.secure_channel(target, credentials, options=list(options.items()))


class Attempts:
    """The tries of one call: what is left of its deadline, and whether and when to try again. For one thread or task."""

    def __init__(self, options: ClientOptions, timeout: float | None) -> None:
        timeout = options.timeout if timeout is None else timeout
        self._policy = options.retry
        self._end = None if timeout is None else time.monotonic() + timeout
        self._made = 0

    def remaining(self) -> float | None:
        """Seconds to the deadline, at least 0; None when there is none. Begins an attempt."""
        self._made += 1
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def wait_after(self, error: errors.MinitronError) -> float:
        """Seconds to wait before the next attempt. Raises `error` when there must be none."""
        wait = self._policy.wait(error, self._made)
        if wait is None or (self._end is not None and time.monotonic() + wait >= self._end):
            raise error
        return wait
