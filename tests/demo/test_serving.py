"""A real server: events as they happen, clients that leave, load, signals."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from unittest.mock import MagicMock

import httpx2 as httpx
import pytest
from benchmarks.serving import ATTACKS, load, under_attack
from starlette.testclient import TestClient
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from unembed.demo.queue import Metrics
from unembed.demo.server import configure, proxies_of
from unembed.errors import ConfigError

from .conftest import parse_events

PAUSE = 0.05  # seconds of a step
TEXT = "the red dog sleeps."
LONG = {"strategy": "euler", "steps": 60}
PATIENCE = 60.0  # seconds; no test says how fast anything is, which is for `benchmarks.serving`


@contextmanager
def running(folder, *arguments):
    """A server process and a client of it."""
    command = [sys.executable, "-m", "tests.demo.tiny", str(folder), *map(str, arguments)]
    with TemporaryFile("w+", encoding="utf-8") as log:  # a pipe that nobody reads would fill
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8"
        )

        def read_log():
            log.seek(0)
            return log.read()

        process.read_log = read_log
        try:
            url = process.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), read_log()
            with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as client:
                yield process, client
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def folder(_saved):
    return _saved


@pytest.fixture
def gate(folder):
    """While its file is there, decodings stop after a step: those it names, or all."""
    path = folder.with_name("gate")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def one_by_one(folder):
    """Serves one at a time, with room for one that waits."""
    gated = "--gate", folder.with_name("gate")
    with running(folder, *gated, "--together", 1, "--queue", 1) as (_, client):
        yield client


@pytest.fixture(scope="module")
def attacked(folder):
    """One server for all attacks, each of which it must outlive."""
    with running(folder) as (_, client):
        yield client


@contextmanager
def decoding(client, **body):
    """An open event stream; yields an iterator over the names of its events."""
    with client.stream("POST", "/decode", json={"text": TEXT, **body}) as answer:
        assert answer.status_code == 200, answer.read()
        lines = answer.iter_lines()
        yield (line.removeprefix("event: ") for line in lines if line.startswith("event: "))


def figure(client, name, **labels):
    """A sample of /metrics, 0 where there is none yet."""
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(f"{name}{{{inside}}} "):
            return float(line.split()[-1])
    return 0.0


def figure_of(client, name):
    """A figure of /metrics without labels."""
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def passes(client):
    """Denoiser passes of the decodings that came to their end."""
    return figure(client, "unembed_work_total", model="inverter", kind="denoiser passes")


def until(condition):
    """Wait until it holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def answers(client, path):
    """Whether a path is served on a new connection, which may be cut for want of descriptors.

    One that is kept and always in use would outlive the stop: it has a request in flight.
    """
    with suppress(httpx.HTTPError):
        return client.get(path, headers={"Connection": "close"}).status_code == 200
    return False


def idle(client):
    return client.get("/queue").json()[0]["running"] == 0


@pytest.mark.slow
def test_steps_come_as_they_happen(one_by_one, gate):
    until(lambda: idle(one_by_one))
    gate.touch()
    with decoding(one_by_one, steps=12) as names:
        assert [next(names) for _ in range(3)] == ["queued", "start", "step"], "no pass was made"
        gate.unlink()
        assert list(names) == [*["step"] * 11, "done"]


def test_a_client_that_leaves_frees_its_slot_within_a_step(one_by_one, gate):
    until(lambda: idle(one_by_one))

    def left():
        return figure(one_by_one, "unembed_abandoned_total", worker="inverter")

    def ended():
        return figure(one_by_one, "unembed_batch_seconds_count", worker="inverter")

    before = left(), ended(), passes(one_by_one)
    gate.touch()
    with decoding(one_by_one, **LONG) as names:
        assert [next(names) for _ in range(3)] == ["queued", "start", "step"]
    until(lambda: left() == before[0] + 1)
    gate.unlink()
    until(lambda: ended() == before[1] + 1)
    assert passes(one_by_one) == before[2], "it did not go on to its end"
    assert one_by_one.get("/queue").json()[0]["running"] == 0


def test_a_client_of_a_batch_answer_that_leaves_is_noticed(one_by_one, gate):
    until(lambda: idle(one_by_one))
    left = figure(one_by_one, "unembed_abandoned_total", worker="inverter")
    before = passes(one_by_one)
    gate.touch()
    with pytest.raises(httpx.ReadTimeout):
        leave = httpx.Timeout(PATIENCE, read=0.4)
        one_by_one.post("/invert", json={"texts": [TEXT], **LONG}, timeout=leave)
    until(lambda: figure(one_by_one, "unembed_abandoned_total", worker="inverter") == left + 1)
    gate.unlink()
    until(lambda: idle(one_by_one))
    assert passes(one_by_one) == before, "it did not go on to its end"
    with decoding(one_by_one, steps=1) as names:
        assert list(names)[-1] == "done"


@pytest.mark.slow
def test_the_queue_has_an_end_and_tells_the_place(one_by_one, gate):
    until(lambda: idle(one_by_one))
    heard = []

    def wait():
        answer = one_by_one.post("/decode", json={"text": TEXT})
        heard.extend(parse_events(answer.text))

    gate.touch()
    with decoding(one_by_one) as first:
        assert [next(first) for _ in range(2)] == ["queued", "start"]
        second = threading.Thread(target=wait)
        second.start()
        until(lambda: one_by_one.get("/queue").json()[0]["waiting"] == 1)
        third = one_by_one.post("/decode", json={"text": TEXT})
        assert third.status_code == 503
        assert int(third.headers["retry-after"]) == third.json()["retry_after"] >= 1
        gate.unlink()
        assert list(first)[-1] == "done"
    second.join()
    places = [data["position"] for name, data in heard if name == "queued"]
    assert places == [1, 0] and heard[-1][0] == "done"


def test_a_search_does_not_keep_the_others_waiting(one_by_one, gate):
    until(lambda: idle(one_by_one))
    settings = {"strategy": "guided-search", "encoder_calls": 500, "options": {"stop_cosine": 1.0}}
    gate.write_text("guided-search")
    with decoding(one_by_one, **settings) as search:
        assert [next(search) for _ in range(2)] == ["queued", "start"]
        with decoding(one_by_one, steps=1) as quick:
            assert list(quick)[-1] == "done"
        assert one_by_one.get("/queue").json()[2]["running"] == 1


def test_a_large_request_does_not_keep_the_others_waiting(one_by_one, gate):
    until(lambda: idle(one_by_one))
    gate.write_text("euler")
    with decoding(one_by_one, strategy="euler", steps=128) as large:
        assert [next(large) for _ in range(3)] == ["queued", "start", "step"]
        with decoding(one_by_one, steps=1) as quick:
            assert list(quick)[-1] == "done"
        assert one_by_one.get("/queue").json()[1]["running"] == 1


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_sends_the_others_away(folder, gate):
    with running(folder, "--gate", gate, "--together", 1) as (process, client):
        heard = []

        def wait():
            answer = client.post("/decode", json={"text": TEXT})
            heard.extend(parse_events(answer.text))

        gate.touch()
        with decoding(client) as first:
            assert [next(first) for _ in range(3)] == ["queued", "start", "step"]
            second = threading.Thread(target=wait)
            second.start()
            until(lambda: client.get("/queue").json()[0]["waiting"] == 1)
            process.send_signal(signal.SIGTERM)
            second.join()
            gate.unlink()
            assert list(first)[-1] == "done"
        name, problem = heard[-1]
        assert (name, problem["status"]) == ("error", 503)
        assert problem["detail"] == "the server is shutting down"
        assert process.wait(timeout=120) == 0, "unloading torch takes long on a busy machine"
        with pytest.raises(httpx.ConnectError):
            client.get("/health")
        log = process.read_log()
    assert "Traceback" not in log and "red dog" not in log


@pytest.mark.slow
def test_a_second_signal_ends_the_process(folder, gate):
    gate.touch()
    with (
        running(folder, "--gate", gate) as (process, client),
        decoding(client, **LONG) as names,
    ):
        assert [next(names) for _ in range(3)] == ["queued", "start", "step"]
        process.send_signal(signal.SIGTERM)
        until(lambda: not answers(client, "/health"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 128 + signal.SIGTERM, "0 if it finishes what runs"


@pytest.mark.slow
def test_a_worker_that_does_not_end_does_not_keep_the_process(folder):
    with running(folder, "--hang") as (process, client):
        leave = httpx.Timeout(PATIENCE, read=1)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/invert", json={"texts": [TEXT], "steps": 1}, timeout=leave)
        assert client.get("/queue").json()[0]["running"] == 1, "it still takes the worker"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0


def exchange(client, *parts, wait=PATIENCE):
    """What the server sends to some bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", client.base_url.port), timeout=wait) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        with suppress(ConnectionError):
            while data := connection.recv(65536):
                answer += data
    return answer


def test_what_is_no_http_is_refused_as_everything_else(one_by_one):
    head, _, body = exchange(one_by_one, b"\x16\x03\x01 hello\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in head and b"Content-Security-Policy" in head
    assert json.loads(body)["status"] == 400


def test_tiny_chunks_are_not_parsed(one_by_one, serve, monkeypatch):
    head = b"POST /decode HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"1\r\na\r\n" * 40_000
    answer = exchange(one_by_one, head, chunks)
    assert answer.startswith(b"HTTP/1.1 411 ") or not answer, "or reset while it was sending"

    sizes, parse = [], H11Protocol.data_received

    def counted(connection, data):
        sizes.append(len(data))
        parse(connection, data)

    monkeypatch.setattr(H11Protocol, "data_received", counted)
    config = configure(serve().app)
    config.load()

    async def receive():
        connection = config.http_protocol_class(config, ServerState(), {})
        transport = MagicMock(spec=asyncio.Transport)
        transport.is_closing.return_value = False
        connection.connection_made(transport)
        connection.data_received(head + chunks)
        connection.connection_lost(None)

    asyncio.run(receive())
    assert 0 < sum(sizes) < len(chunks) / 50, "bytes that went through the parser"


@pytest.mark.slow
def test_half_a_head_is_not_waited_for(one_by_one):
    assert exchange(one_by_one, b"GET /health HTTP/1.1\r\nHost: loc", wait=2 * PATIENCE) == b""


@pytest.mark.slow
def test_without_descriptors_others_are_served_and_the_log_stays_short(folder):
    with running(folder, "--descriptors", 128) as (process, client):
        address = ("127.0.0.1", client.base_url.port)
        crowd = [socket.create_connection(address, timeout=PATIENCE) for _ in range(200)]
        for connection in crowd:
            with suppress(OSError):
                connection.sendall(b"GET / HTTP/1.1\r\nHost: x")
        source = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(transport=source, base_url=client.base_url, trust_env=False) as other:
            assert other.get("/health", timeout=PATIENCE).status_code == 200
        for connection in crowd:
            connection.close()
        until(lambda: answers(client, "/health"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
        assert len(process.read_log()) < 10_000


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_one_hostile_client_does_not_stop_the_others(attacked, attack):
    """Others are answered all the while; `benchmarks.serving` says whether in time.

    An answer that is no 200, or none in `benchmarks.serving`'s patience, is raised.
    """
    until(lambda: idle(attacked))
    health, plain = asyncio.run(under_attack(str(attacked.base_url), attack, 2.0))
    assert attacked.get("/health").status_code == 200
    assert health and plain


@pytest.mark.slow
def test_under_load_every_request_is_answered(folder):
    with running(folder, "--pause", PAUSE, "--together", 4, "--queue", 4) as (process, client):
        outcomes = asyncio.run(load(str(client.base_url), 16, 3.0, process.pid))
        assert outcomes.unanswered == 0, outcomes.ends
        assert outcomes.ends["done"] > 0 and outcomes.ends["503"] > 0
        assert len(outcomes.first) == len(outcomes.complete) == outcomes.ends["done"]
        assert idle(client)
        assert client.get("/queue").json()[0]["waiting"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("proxies", "status"), [(["127.0.0.1"], 200), ([], 429)])
def test_a_proxy_speaks_for_others_only_when_trusted(serve, proxies, status):
    config = configure(serve(rate="1/minute").app, proxies)
    config.load()
    client = TestClient(config.loaded_app, "http://localhost", client=("127.0.0.1", 9))
    answers = [
        client.post("/encode", json={"text": TEXT}, headers={"x-forwarded-for": address})
        for address in ("192.0.2.1", "192.0.2.2")
    ]
    assert [answer.status_code for answer in answers] == [200, status]


def test_what_is_no_address_is_not_taken_for_a_proxy():
    given = ["127.0.0.1", "10.0.0.0/8", "::1", "*"]
    assert proxies_of(given) == given
    with pytest.raises(ConfigError, match="network for --trust-proxy"):
        proxies_of(["nginx"])


def test_metrics_of_two_servers_are_apart():
    one, other = Metrics(), Metrics()
    one.refused("queue")
    assert b'unembed_refused_total{reason="queue"} 1.0' in one.page({})
    assert b'reason="queue"' not in other.page({})
