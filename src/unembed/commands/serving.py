"""`serve`: the live demo in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from unembed.commands.loading import encoder_settings, make_encoder, make_inverter
from unembed.options import DeviceOption, TrustOption


def serve(
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8080,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint",
            help="Shipped name, folder or Hub repository of an inverter. Repeatable.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="Another name it is reached by. Repeatable."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", help="A web site that may call the API. Repeatable."),
    ] = None,
    log_texts: Annotated[
        bool, typer.Option("--log-texts", help="Write texts and recoveries to the log.")
    ] = False,
) -> None:
    """Open the live demo: a page on which a vector turns back into text, and its API."""
    from unembed.demo import server
    from unembed.demo.app import create_app
    from unembed.demo.asking import Demo
    from unembed.demo.guard import Clients
    from unembed.demo.limits import Limits
    from unembed.demo.metrics import Metrics
    from unembed.demo.model import ServedModel, SharedEncoder

    bound = server.bind(host, port)
    limits, metrics = Limits(), Metrics()
    models = {}
    for name in checkpoint or ["minilm"]:
        inverter = make_inverter(name, None, device)
        encoder = SharedEncoder(make_encoder(encoder_settings(inverter), device, trust_remote_code))
        models[name] = ServedModel(name, inverter, encoder, limits, metrics)
    demo = Demo(models, limits, metrics, Clients(limits.rate, metrics), log_texts)
    address = server.address_of(bound)
    app = create_app(demo)
    server.run(
        app, bound, ready=lambda: typer.echo(f"open {address} (Ctrl+C stops it)"), seconds=30
    )
