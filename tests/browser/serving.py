"""A server in a process of its own, which can be killed.

As a command, the demo with the tiny encoder and denoiser of a folder, as the models ``tiny`` and
``slow``, a pass of which takes 0.4 seconds: python -m tests.browser.serving FOLDER [--align MAP]
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PATIENCE = 120  # seconds in which a server must have started
_PASS = 0.4  # seconds


def find_chromium():
    """Path of a browser; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


class Server:
    """Runs ``python -m MODULE ARGUMENTS --port PORT`` until the block ends.

    Attributes:
        address: Of the page.
    """

    def __init__(self, module, *arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}/"
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the server
        self.command = [sys.executable, "-m", module, *map(str, arguments), "--port", str(port)]

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.kill()
        self.log.close()

    def start(self):
        """Start it and wait until it answers; after `kill`, on the same port."""
        self.log.truncate(0)
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT
        )
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.address}health", timeout=2).close()
                return
            except OSError:
                time.sleep(0.1)
        self.kill()
        self.log.seek(0)
        raise RuntimeError(f"the server does not answer: {self.log.read()[-2000:]}")

    def kill(self):
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()


def main():
    from tests.fakes import word_probe
    from unembed.demo import server
    from unembed.demo.app import create_app
    from unembed.demo.limits import Limits
    from unembed.demo.models import load_demo
    from unembed.encoders.base import FakeEncoder
    from unembed.inverter import Inverter

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--align", action="append", default=[])
    given = parser.parse_args()

    def load(name):
        inverter = Inverter.from_pretrained(given.folder)
        if name == "slow":
            inverter.denoiser.norm_out.register_forward_hook(lambda *_: time.sleep(_PASS))
        return inverter

    word_probe(FakeEncoder()).save(given.folder / "words")
    demo = load_demo(
        ("tiny", "slow"),
        Limits(rate=None),
        load,
        lambda _: FakeEncoder(),
        alignments=given.align,
        probes=[str(given.folder / "words")],
    )
    server.run(create_app(demo), server.bind("127.0.0.1", given.port), ready=lambda: None)


if __name__ == "__main__":
    main()
