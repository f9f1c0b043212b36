"""A server of tiny models, in this process or as one: python -m tests.demo.tiny FOLDER."""

import argparse
import time
from contextlib import suppress
from pathlib import Path

import torch
import typer

from unembed.demo import server
from unembed.demo.app import create_app
from unembed.demo.limits import Limits
from unembed.demo.models import load_demo
from unembed.encoders.base import FakeEncoder
from unembed.inverter import Inverter


def slowed(inverter, seconds, gate=None):
    """The same inverter, whose every step takes some time.

    While there is a file ``gate``, decodings whose name begins with its content do not go on.
    """
    invert = inverter.invert

    def is_held(decoding):
        with suppress(OSError):
            return str(decoding).startswith(gate.read_text())
        return False

    def slow_invert(vectors, *, on_step, **options):
        def slow_step(step):
            time.sleep(seconds)
            on_step(step)
            while gate is not None and is_held(options["decoding"]):
                time.sleep(0.01)

        return invert(vectors, on_step=slow_step if seconds or gate else on_step, **options)

    inverter.invert = slow_invert
    return inverter


def hang(vectors, **options):
    """Never come to a point where anybody looks whether it is still wanted."""
    while True:
        time.sleep(0.01)


def tiny_demo(
    folders,
    pause=0.0,
    log_texts=False,
    encoder=None,
    gate=None,
    alignments=(),
    probes=(),
    **limits,
):
    """A demo of inverters on disk with the fake encoder."""
    return load_demo(
        [str(folder) for folder in folders],
        Limits(**{"rate": None, **limits}),
        lambda folder: slowed(Inverter.from_pretrained(folder), pause, gate),
        lambda inverter: encoder or FakeEncoder(),
        log_texts,
        alignments,
        probes,
    )


def main():
    """Serve until a signal; the first line printed is the address."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--gate", type=Path, help="see `slowed`")
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--together", type=int, default=64)
    parser.add_argument("--hang", action="store_true", help="decode for ever")
    parser.add_argument("--descriptors", type=int, help="files and connections of the process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.descriptors:
        import resource  # not on every system

        resource.setrlimit(resource.RLIMIT_NOFILE, (options.descriptors, options.descriptors))
    limits = {"queue": options.queue, "together": options.together}
    demo = tiny_demo([options.folder], options.pause, gate=options.gate, **limits)
    if options.hang:
        demo.models[Path(options.folder).name].inverter.invert = hang
    bound = server.bind("127.0.0.1", 0)
    server.write_log()
    app = create_app(demo)
    server.run(app, bound, ready=lambda: typer.echo(server.address_of(bound)))


if __name__ == "__main__":
    main()
