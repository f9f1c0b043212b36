"""A demo of the tiny inverter, and a client of it without a network."""

import json

import pytest
from starlette.testclient import TestClient

from unembed.demo.app import create_app
from unembed.inverter import Inverter

from .tiny import tiny_demo


def parse_events(text):
    """The (name, data) of an event stream."""
    events = []
    for block in text.strip().split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        if lines:
            fields = dict(line.split(": ", 1) for line in lines)
            events.append((fields["event"], json.loads(fields["data"])))
    return events


@pytest.fixture
def serve(inverter_folder):
    """Make a client of a demo with these limits; everything is stopped afterwards."""
    open_clients = []

    def make(hosts=("localhost",), origins=(), folders=None, **settings):
        demo = tiny_demo(folders or [inverter_folder], **settings)
        app = create_app(demo, hosts, origins)
        client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
        open_clients.append(client.__enter__())
        client.demo = demo
        return client

    yield make
    for client in open_clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(serve):
    return serve()


@pytest.fixture
def served(inverter_folder):
    """What the demo serves: the tiny inverter as it comes back from the disk, in float16."""
    return Inverter.from_pretrained(inverter_folder)


@pytest.fixture
def decode():
    """Ask a client for a decoding; returns its events."""

    def ask(client, **body):
        answer = client.post("/decode", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return parse_events(answer.text)

    return ask
