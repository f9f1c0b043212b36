"""Running the application: its socket, its log, and how it stops."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from types import FrameType

import uvicorn
from fastapi import FastAPI

from unembed.demo.models import Demo
from unembed.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_ANYWHERE = ("0.0.0.0", "::")


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
    proxies: Sequence[str] = (),
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what runs; a second signal does not wait.

    Args:
        app: From `create_app`.
        bound: From `bind`.
        ready: Called when it listens.
        proxies: Addresses whose X-Forwarded-For is believed.
    """
    demo: Demo = app.state.demo
    _Server(configure(app, proxies), ready, demo.drain).run(sockets=[bound])


def proxies_of(given: Sequence[str]) -> list[str]:
    """The addresses and networks (10.0.0.0/8) whose X-Forwarded-For is to be believed; * is any.

    Raises:
        ConfigError: One is neither: believed as a word, it would never match.
    """
    for address in given:
        try:
            if address != "*":
                ip_network(address)
        except ValueError as error:
            raise ConfigError(
                "an IP address or network for --trust-proxy", str(error), "Correct --trust-proxy"
            ) from error
    return list(given)


def configure(app: FastAPI, proxies: Sequence[str] = ()) -> uvicorn.Config:
    """What uvicorn is told.

    Args:
        app: From `create_app`.
        proxies: Addresses whose X-Forwarded-For is believed; uvicorn by itself believes loopback.
    """
    demo: Demo = app.state.demo
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        http="h11",
        loop="asyncio",
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
        timeout_graceful_shutdown=int(demo.limits.seconds) + 1,
    )


class _Server(uvicorn.Server):
    """Says when it listens, and sends those who wait away when it is told to stop."""

    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], None], drain: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._ready, self._drain = ready, drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not what it does by itself: it would raise the signal again when all is done
        self.force_exit = self.should_exit
        self.should_exit = True
