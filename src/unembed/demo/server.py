"""Running the application: its socket, its models, and how it stops."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from unembed.errors import ConfigError


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
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"a free port {port} at the address {host}",
            str(error),
            "Choose another --port or --host",
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Says when it listens, and sends those who wait away when it is told to stop."""

    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], None], stopping: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._ready, self._stopping = ready, stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal does not wait for what runs."""
        self.force_exit = self.should_exit
        self.should_exit = True


def run(
    app: FastAPI,
    bound: socket.socket,
    *,
    ready: Callable[[], None],
    seconds: float,
    proxies: Sequence[str] = (),
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what runs.

    Args:
        app: From `create_app`.
        bound: From `bind`.
        ready: Called when it listens.
        seconds: How long what runs may take to finish.
        proxies: Addresses whose X-Forwarded-For is believed.
    """
    demo = app.state.demo

    def stopping() -> None:
        for model in demo.models.values():
            model.drain()

    options: dict[str, Any] = {"proxy_headers": bool(proxies), "forwarded_allow_ips": list(proxies)}
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(seconds) + 1,
        ws="none",
        http="h11",
        loop="asyncio",
        **options,
    )
    _Server(config, ready, stopping).run(sockets=[bound])
