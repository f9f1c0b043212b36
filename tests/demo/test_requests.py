import asyncio
import json

import pytest
from pydantic import ValidationError

from unembed.demo import requests
from unembed.demo.requests import EventStream, parse_body
from unembed.demo.schemas import DecodeRequest, InvertRequest, ProblemError, invalid

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
        async with asyncio.timeout(60):
            await response(SCOPE, receive, send)

    asyncio.run(answer())
    return demo.models["inverter"].workers["quick"]


async def forever(message=None):
    await asyncio.sleep(60)


def test_event_stream_a_client_that_does_not_read_is_cut_off(demo, monkeypatch, caplog):
    monkeypatch.setattr(requests, "_SLACK", 0.1)
    worker = stream(demo, forever, forever)
    assert "did not read its events in time" in caplog.text
    assert worker.close(60), "its batch ends at the next step"
    assert worker.counts == (0, 0)


def test_event_stream_a_client_that_was_gone_before_the_first_event_leaves_its_job(demo):
    async def gone():
        return {"type": "http.disconnect"}

    worker = stream(demo, forever, gone)
    assert worker.close(60)
    assert worker.counts == (0, 0)
    left = demo.metrics.registry.get_sample_value("unembed_abandoned_total", {"worker": "inverter"})
    assert left == 1


def test_event_stream_the_connection_is_kept_open_while_nothing_happens(demo, monkeypatch):
    monkeypatch.setattr(requests, "_PING", 0.01)
    sent = []

    async def send(message):
        sent.append(message.get("body", b"").decode())

    stream(demo, send, forever)
    assert ": ping\n\n" in sent
    assert sent[-2].startswith("event: error\ndata: {") and '"status":504' in sent[-2]


MANY = 90_000
HEAVY = {
    "unknown keys": {str(key): 0 for key in range(MANY)},
    "options": {"text": "a", "options": {str(key): [] for key in range(MANY)}},
    "wrong numbers": {"text": "a", "embedding": [{}] * MANY},
    "wrong texts": {"texts": [1] * MANY},
    "wrong rows": {"embeddings": [[{}] * 90] * 1000},
    "guidance": {"text": "a", "guidance": [{}] * MANY},
    "a list for a name": {"text": "a", "model": [{}] * MANY},
}


@pytest.mark.parametrize("kind", HEAVY)
@pytest.mark.parametrize("schema", [DecodeRequest, InvertRequest])
def test_parse_body_collects_few_of_many_faults(kind, schema, monkeypatch):
    """How long it takes is for `benchmarks.serving`; 350,000 faults were collected of some."""
    collected = [0]
    monkeypatch.setattr(
        requests, "invalid", lambda error: collected.append(error.error_count()) or invalid(error)
    )
    with pytest.raises(ProblemError) as caught:
        parse_body(json.dumps(HEAVY[kind]).encode(), schema)
    assert max(collected) <= 8, "of a body with few keys"
    assert caught.value.status == 422
    assert len(json.dumps(caught.value.to_dict())) < 5000


@pytest.mark.parametrize("schema", [DecodeRequest, InvertRequest])
def test_parse_body_collects_a_bounded_number_of_faults_of_the_keys_it_reads(schema):
    wrong = {str(key): [] for key in range(32)}
    worst = {**dict(list(wrong.items())[:20]), **{key: [{}] for key in schema.model_fields}}
    content = json.dumps({**worst, "options": wrong}).encode()
    with pytest.raises(ProblemError) as caught:
        parse_body(content, schema)
    assert isinstance(caught.value.__context__, ValidationError)
    assert 100 < caught.value.__context__.error_count() < 200, "four a value of `options`"
    assert len(caught.value.errors) == 8


def test_parse_body_repeats_little_of_a_long_key():
    with pytest.raises(ProblemError) as caught:
        parse_body(json.dumps({"text": "a", "x" * 100_000: 0}).encode(), DecodeRequest)
    assert len(json.dumps(caught.value.to_dict())) < 1000
