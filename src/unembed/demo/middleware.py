"""What stands before every request: host, rate, time for the body, headers, log, figures."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unembed.demo.limits import TEXT_BYTES, Limits, RateLimiter, client_of, parse_rate
from unembed.demo.queue import Metrics, describe, failure
from unembed.demo.schemas import ProblemError, too_large

log = logging.getLogger(__name__)

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:@/?#\[\]\\\s]+)(?::\d{1,5})?")
_METHODS = ("GET", "HEAD", "POST", "OPTIONS")
_DRAINED = 1 << 16  # bytes of a refused body that are read and dropped, to keep the connection
_COST = "unembed.cost"  # key of a scope: texts that its client was charged for

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Clients:
    """Rates of clients.

    Args:
        rate: As ``120/minute``; None: any.
        metrics: Where refusals are counted.
    """

    def __init__(self, rate: str | None, metrics: Metrics) -> None:
        self._limiter = None if rate is None else RateLimiter(*parse_rate(rate))
        self._metrics = metrics

    def charge(self, scope: Scope, cost: int) -> ProblemError | None:
        """Count texts of the client of a request; the refusal if there are too many.

        Args:
            scope: Of the request.
            cost: Texts of the whole request; those that were counted for it before are not again.
        """
        paid = scope.get(_COST, 0)
        if not self._limiter or cost <= paid:
            return None
        wait = self._limiter.take(client_name(scope), cost, paid)
        if not wait:
            scope[_COST] = cost
            return None
        self._metrics.refused("rate")
        return ProblemError(429, "too many requests from this address", wait)


def client_name(scope: Scope) -> str:
    """Name the client of a request: its address or network (`client_of`)."""
    return client_of((scope.get("client") or ("unknown", 0))[0])


class Guard:
    """An ASGI middleware.

    Args:
        app: What it guards.
        hosts: Names in the Host header that are served.
        limits: Of the server.
        clients: Counts what each sends.
        metrics: Where it counts.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Sequence[str],
        limits: Limits,
        clients: Clients,
        metrics: Metrics,
    ) -> None:
        self.app, self.limits, self.clients, self.metrics = app, limits, clients, metrics
        self.hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on; an error that nothing has caught ends here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        body = _Body(receive, self.limits)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(scope, message)
                if body.broken:  # what is still to come is not read
                    MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        try:
            problem = self._refusal(scope)
            if problem is not None:
                length = _length(Headers(scope=scope))
                body.broken = length is None or length > _DRAINED
                await problem.to_response()(scope, receive, answer)
            else:
                _drop_range(scope)
                await self.app(scope, body, answer)
        except Exception as error:
            log.error("%s %s: %s", scope["method"], _route(scope), describe(error))
            if not status:
                await failure().to_response()(scope, receive, answer)
        finally:
            self._record(scope, status, time.perf_counter() - began)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        method, route = scope["method"], _route(scope)
        self.metrics.answered(method if method in _METHODS else "other", route, status, seconds)
        log.info("%s %s %d %.0f ms", method, route, status, 1000 * seconds)

    def _refusal(self, scope: Scope) -> ProblemError | None:
        headers = Headers(scope=scope)
        if host_of(headers.get("host", "")) not in self.hosts:
            self.metrics.refused("host")
            return ProblemError(421, "this server does not answer to that host name")
        length = _length(headers)
        if length is None:
            return ProblemError(
                411, "expected a body with the header Content-Length, not in chunks"
            )
        if length > self.limits.body_bytes:
            return too_large()
        if scope["method"] != "POST":
            return None
        # Before it is read, so that reading much to refuse it is not a text's price
        return self.clients.charge(scope, max(1, math.ceil(length / TEXT_BYTES)))


def _length(headers: Headers) -> int | None:
    """Bytes of the body; None where they are not told, as in chunks."""
    length = headers.get("content-length", "0")
    valid = length.isascii() and length.isdecimal() and "transfer-encoding" not in headers
    return int(length) if valid else None


class _Body:
    """Receives a body, which has to come in time and must not be too large.

    The framework's own limit answers in plain text.
    """

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self.receive, self.remaining = receive, limits.body_bytes
        self.end = time.monotonic() + limits.body_seconds
        self.complete = self.broken = False

    async def __call__(self) -> Message:
        if self.complete:
            return await self.receive()
        try:
            async with asyncio.timeout(self.end - time.monotonic()):
                message = await self.receive()
        except TimeoutError as error:
            self.broken = True
            raise HTTPException(408, "the body took too long to come") from error
        self.remaining -= len(message.get("body", b""))
        if self.remaining < 0:
            self.broken = True
            raise HTTPException(413)
        self.complete = not message.get("more_body", False)
        return message


def _drop_range(scope: Scope) -> None:
    """Take out the header Range: the files are small, and an odd one is refused in plain text."""
    scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"range"]


def _add_headers(scope: Scope, message: Message) -> None:
    headers = MutableHeaders(scope=message)
    for name, value in HEADERS.items():
        headers[name] = value
    cached = scope["path"] == "/" or scope["path"].startswith("/static/")
    headers.setdefault("Cache-Control", "no-cache" if cached else "no-store")


def host_of(header: str) -> str | None:
    """The name in a Host header, without the port; None where it is no such header."""
    match = _HOST.fullmatch(header.lower())
    return None if match is None else match[1]


def _route(scope: Scope) -> str:
    """Name the path as it was declared, so that nobody can invent labels."""
    path = getattr(scope.get("route"), "path", "other")
    return "/static" if scope["path"].startswith("/static/") else str(path)
