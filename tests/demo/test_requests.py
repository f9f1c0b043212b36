import asyncio

import pytest

from unembed.demo import requests
from unembed.demo.requests import EventStream
from unembed.demo.schemas import DecodeRequest

from .tiny import tiny_demo

SCOPE = {"type": "http", "asgi": {"spec_version": "2.3"}}


@pytest.fixture
def demo(inverter_folder):
    made = tiny_demo([inverter_folder], pause=0.05, seconds=0.3)
    yield made
    made.models["inverter"].close()


def stream(demo, send, receive):
    """Send a decoding's events; returns the job's worker."""

    async def answer():
        asked = requests.decode(demo, DecodeRequest(text="the red dog sleeps.", steps=12), SCOPE)
        response = EventStream(asked, demo.limits.seconds)
        async with asyncio.timeout(10):
            await response(SCOPE, receive, send)

    asyncio.run(answer())
    return demo.models["inverter"].workers["quick"]


async def forever(message=None):
    await asyncio.sleep(60)


def test_a_client_that_does_not_read_is_cut_off(demo, monkeypatch, caplog):
    monkeypatch.setattr(requests, "_SLACK", 0.1)
    worker = stream(demo, forever, forever)
    assert "did not read its events in time" in caplog.text
    assert worker.close(20), "its batch ends at the next step"
    assert worker.counts == (0, 0)


def test_a_client_that_was_gone_before_the_first_event_leaves_its_job(demo):
    async def gone():
        return {"type": "http.disconnect"}

    worker = stream(demo, forever, gone)
    assert worker.close(20)
    assert worker.counts == (0, 0)
    left = demo.metrics.registry.get_sample_value("unembed_abandoned_total", {"worker": "inverter"})
    assert left == 1


def test_the_connection_is_kept_open_while_nothing_happens(demo, monkeypatch):
    monkeypatch.setattr(requests, "_PING", 0.01)
    sent = []

    async def send(message):
        sent.append(message.get("body", b"").decode())

    stream(demo, send, forever)
    assert ": ping\n\n" in sent
    assert sent[-2].startswith("event: error\ndata: {") and '"status":504' in sent[-2]
