"""`serve`: the live demo, a page and its API."""

from __future__ import annotations

import os
import sys
import webbrowser
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

import unembed
from unembed.cli.align import MapsOption, warn
from unembed.cli.options import (
    ApiBaseOption,
    DeviceOption,
    EncoderOption,
    MaxCallsOption,
    PriceOption,
    QuietOption,
    TrustOption,
    VerboseOption,
    api_settings,
    encoder_settings,
    make_encoder,
    make_inverter,
    note,
    show_usage,
)

if TYPE_CHECKING:
    from unembed.encoders.base import Encoder

OpenOption = Annotated[
    bool, typer.Option("--open", help="Open the page in the browser of this machine.")
]
LogTextsOption = Annotated[
    bool, typer.Option("--log-texts", help="Write texts and recoveries to the log.")
]
CheckpointsOption = Annotated[
    list[str] | None,
    typer.Option("--checkpoint", help="Shipped name, folder or Hub repository. Repeatable."),
]
ProbesOption = Annotated[
    list[str] | None,
    typer.Option("--probe", help="Folder of `words --fit`, for its encoder. Repeatable."),
]
ProxiesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-proxy", help="Address (network) whose X-Forwarded-For is believed. Repeatable."
    ),
]


def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8080,
    checkpoint: CheckpointsOption = None,
    align: MapsOption = None,
    probe: ProbesOption = None,
    encoder: EncoderOption = None,
    api_base: ApiBaseOption = None,
    max_calls: MaxCallsOption = None,
    price: PriceOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    open_page: OpenOption = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="Another name that it is reached by. Repeatable."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin", help="Web site whose pages may call the API (CORS). Repeatable."
        ),
    ] = None,
    trust_proxy: ProxiesOption = None,
    rate: Annotated[
        str, typer.Option("--rate", help="Texts a client may send: 120/minute, …; or none.")
    ] = "120/minute",
    max_queue: Annotated[
        int, typer.Option("--max-queue", min=1, max=10_000, help="Requests that may wait.")
    ] = 64,
    max_seconds: Annotated[
        float, typer.Option("--max-seconds", min=1.0, max=3600.0, help="Time of a request.")
    ] = 60.0,
    max_encoder_calls: Annotated[
        int, typer.Option("--max-encoder-calls", min=1, help="Encoder calls of a text.")
    ] = 1000,
    log_texts: LogTextsOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Serve the live demo: a page on which a vector turns back into text, and its API."""
    from unembed.files import require_extra

    require_extra("demo", "the demo")
    from unembed.demo import server
    from unembed.demo.app import create_app
    from unembed.demo.limits import Limits
    from unembed.demo.models import load_demo
    from unembed.vectors.words import shipped_probes

    proxies = server.proxies_of(trust_proxy or [])
    bound = server.bind(host, port)
    limits = Limits(
        rate=None if rate == "none" else rate,
        queue=max_queue,
        seconds=max_seconds,
        encoder_calls=max_encoder_calls,
    )
    api = api_settings(api_base, max_calls, price)
    demo = load_demo(
        checkpoint or ["minilm"],
        limits,
        lambda name: make_inverter(name, None, device),
        partial(_load_encoder, context, encoder, api, device, trust_remote_code),
        log_texts,
        align or [],
        [*shipped_probes(), *(probe or [])],
    )
    for model in demo.models.values():
        warn(model.inverter.alignment)
    app = create_app(demo, server.hosts_of(host, allow_host or []), allow_origin or [])
    address = server.address_of(bound)
    opening = f"open {address} (models: {', '.join(demo.models)}; Ctrl+C stops)"
    closing = f"finishing what runs, at most {max_seconds:g} s; again (Ctrl+C) to stop at once"
    ready = partial(_announce, opening, address if open_page else None)
    server.write_log()
    server.run(app, bound, ready=ready, stopping=lambda: typer.echo(closing), proxies=proxies)


def _load_encoder(
    context: typer.Context,
    where: str | None,
    api: dict[str, Any],
    device: str,
    trust_remote_code: bool,
    inverter: unembed.Inverter,
) -> Encoder:
    """The encoder of an inverter."""
    settings = encoder_settings(inverter, where) | api
    encoder: Encoder = make_encoder(settings, device, trust_remote_code)
    show_usage(context, encoder)
    return encoder


def _announce(message: str, address: str | None) -> None:
    """Say that the server is ready, and open an address in a window.

    A browser inside the terminal would hide the server.
    """
    typer.echo(message)
    screens = ("DISPLAY", "WAYLAND_DISPLAY")
    windows = sys.platform in ("darwin", "win32") or any(map(os.environ.get, screens))
    if address is not None and windows:
        webbrowser.open(address)
    elif address is not None:
        note("--open has no effect: there is no screen")
