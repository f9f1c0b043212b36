"""Running the application: its socket, its log, and how it stops."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import math
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import ip_network
from types import FrameType
from typing import Any, ClassVar, NoReturn

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from unembed.demo.limits import client_of
from unembed.demo.middleware import HEADERS
from unembed.demo.models import Demo
from unembed.demo.queue import describe
from unembed.demo.schemas import MEDIA_TYPE, ProblemError
from unembed.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_ANYWHERE = ("0.0.0.0", "::")
_CONNECTIONS = 1000  # at most
_OTHER_FILES = 64  # descriptors that are not connections
_BACKLOG = 128  # connections that the system holds before they are accepted
_HEAD_SECONDS = 10.0  # in which a connection must have sent a request's head
_SLICE = 1 << 12  # bytes that are parsed at once
_QUIET = 10.0  # seconds between lines of the log that say the same
_LINES = 100  # different ones that are remembered

log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet, so that a taken port is known at once.

    Args:
        host: Address or name of this machine.
        port: 0 takes a free one.

    Raises:
        ConfigError: The port is taken or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # where it would share a port that is taken
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(
            f"a free port {port} at {host}",
            str(error),
            "Choose another --port or --host",
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL at which a bound socket is reached from this machine."""
    host, port = bound.getsockname()[:2]
    if host in _ANYWHERE:
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def hosts_of(host: str, allowed: Sequence[str]) -> list[str]:
    """The Host headers that are answered: of this machine, the address bound, those allowed."""
    own = [] if host in _ANYWHERE else [f"[{host}]" if ":" in host else host]
    return [*LOOPBACK, *own, *allowed]


def write_log() -> None:
    """Log to standard error: one line a request, without the texts."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("unembed.demo").setLevel(logging.INFO)


def run(
    app: FastAPI,
    bound: socket.socket,
    *,
    ready: Callable[[], None],
    stopping: Callable[[], None] = lambda: None,
    proxies: Sequence[str] = (),
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what runs; a second signal ends the process.

    Work that has not ended once every client has its answer ends with the process.

    Args:
        app: From `create_app`.
        bound: From `bind`.
        ready: Called when it listens.
        stopping: Called at the first signal.
        proxies: Addresses whose X-Forwarded-For is believed.
    """
    demo: Demo = app.state.demo
    # What is loaded stays: a large body must not make the collector go through all of it
    gc.collect()
    gc.freeze()
    _Server(configure(app, proxies), ready, stopping, demo.drain).run(sockets=[bound])
    if not demo.close(0.0):
        log.warning("a batch did not end in time; it ends with the process")
        _exit(0)


def _exit(code: int) -> NoReturn:
    """End the process now, whatever its threads do."""
    with suppress(OSError, RuntimeError, ValueError):  # a signal may have come while writing
        logging.shutdown()
        sys.stdout.flush()
    os._exit(code)


def proxies_of(addresses: Sequence[str]) -> list[str]:
    """The addresses and networks (10.0.0.0/8) whose X-Forwarded-For is to be believed; * is any.

    Raises:
        ConfigError: One is neither: believed as a word, it would never match.
    """
    for address in addresses:
        try:
            if address != "*":
                ip_network(address)
        except ValueError as error:
            raise ConfigError(
                "an IP address or network for --trust-proxy", str(error), "Correct --trust-proxy"
            ) from error
    return list(addresses)


def configure(app: FastAPI, proxies: Sequence[str] = ()) -> uvicorn.Config:
    """Configure uvicorn.

    Args:
        app: From `create_app`.
        proxies: Addresses whose X-Forwarded-For is believed; uvicorn by itself believes loopback.
    """
    demo: Demo = app.state.demo
    state = {"most": connection_limit(), "clients": Counter[str]()}
    connection = type("Connection", (Connection,), state)
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        http=connection,
        backlog=_BACKLOG,
        loop="asyncio",
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
        timeout_graceful_shutdown=int(demo.limits.seconds) + 1,
    )


def connection_limit() -> int:
    """Count the connections that the process can hold, from its limit of descriptors."""
    if sys.platform == "win32":
        return _CONNECTIONS
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _CONNECTIONS if soft < 0 else max(4, min(_CONNECTIONS, soft - _OTHER_FILES))


class Connection(H11Protocol):
    """A connection; there are at most so many, and half of them of one client.

    One that sends no head of a request for some seconds is closed. A body in chunks, each of which
    costs the parser far more than its bytes, is not read (`Guard` refuses it).

    Attributes:
        most: Connections of the server.
        clients: Connections by client.
    """

    most: ClassVar[int]
    clients: ClassVar[Counter[str]]
    _name = ""  # of the client of a connection that counts
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, or close it where there are too many."""
        super().connection_made(transport)
        name = client_of((self.client or ("unknown", 0))[0])
        # Those sent away do not count, though they may not be gone yet
        if self.clients.total() >= self.most or 2 * (self.clients[name] + 1) > self.most:
            transport.abort()
            return
        self._name = name
        self.clients[name] += 1
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._cancel()
        if self._name:
            self.clients[self._name] -= 1
            if not self.clients[self._name]:
                del self.clients[self._name]

    def data_received(self, data: bytes) -> None:
        """Parse what has come, a little at a time."""
        for start in range(0, len(data), _SLICE):
            if self._in_chunks() or self.transport.is_closing():
                return
            super().data_received(data[start : start + _SLICE])
        if self.conn.their_state is not h11.IDLE:
            self._cancel()
        elif self._timer is None:
            self._await_head()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as everything else is answered."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = json.dumps(ProblemError(400, "expected an HTTP request").to_dict()).encode()
        headers = [("Content-Type", MEDIA_TYPE), ("Connection", "close"), *HEADERS.items()]
        headers.append(("Content-Length", str(len(body))))
        events = (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _in_chunks(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY and any(
            name == b"transfer-encoding" for name, _ in self.headers
        )

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(_HEAD_SECONDS, self.transport.abort)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Server(uvicorn.Server):
    """Tells when it listens and stops, and sends those who wait away when it is told to stop."""

    def __init__(
        self,
        config: uvicorn.Config,
        ready: Callable[[], None],
        stopping: Callable[[], None],
        drain: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._ready, self._stopping, self._drain = ready, stopping, drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_FaultLog())
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping()
        self._drain()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not what it does by itself: it would raise the signal again when all is done
        if self.should_exit:
            _exit(128 + sig)
        self.should_exit = True


class _FaultLog:
    """Logs faults of the event loop in a line each, the same one once in some seconds.

    Without descriptors asyncio tells of thousands at a time, each with a traceback.
    """

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        line = context["message"] if error is None else f"{context['message']}: {describe(error)}"
        if loop.time() - self._last.get(line, -math.inf) >= _QUIET:
            if len(self._last) >= _LINES:
                self._last.clear()
            self._last[line] = loop.time()
            log.error("%s", line)
