import gzip
import json
import logging
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from unembed.decoding import STRATEGIES, strategy_fields
from unembed.demo.limits import TEXT_BYTES
from unembed.demo.schemas import EXAMPLES
from unembed.encoders.vectors import VectorStatistics
from unembed.evaluation.metrics import token_accuracy

from .conftest import parse_events

TEXT = "the red dog sleeps."
PROBLEM = "application/problem+json"


def refused(answer, status):
    """The problem details of an answer."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    problem = answer.json()
    assert (problem["type"], problem["status"]) == ("about:blank", status)
    assert problem["detail"]
    return problem


# What there is


def test_models_tells_what_can_be_asked(client, inverter):
    told = client.get("/models").json()
    (model,) = told["models"]
    assert told["default"] == model["name"] == "inverter"
    assert (model["encoder"], model["dimension"], model["length"]) == ("fake", 32, 12)
    assert model["default_steps"] == 8 and model["guidance"] is False
    assert set(model["strategies"]) == set(STRATEGIES)
    for name, strategy in model["strategies"].items():
        assert strategy["needs_encoder"] is STRATEGIES[name].needs_encoder
        options = strategy["options"]
        fields = strategy_fields(name)
        assert {k: v["default"] for k, v in options.items()} == {f.name: f.default for f in fields}
        numbers = [option for option in options.values() if option["type"] in ("int", "float")]
        assert all("maximum" in option for option in numbers), "a server bounds what it is asked"
        assert all(option["description"] for option in options.values()), name
    assert model["strategies"]["greedy"]["options"]["order"]["choices"][0] == "confidence"
    remask = model["strategies"]["euler-remask"]["options"]
    assert remask["top_p"] == {
        "default": 1.0,
        "type": "float",
        "description": "Draw among the most probable tokens with this probability together.",
        "maximum": 1.0,
    }


def test_guidance_is_offered_for_weights_trained_for_it(serve, inverter, tmp_path):
    trained = inverter.trained
    inverter.trained = {"config": {"training": {"condition_dropout": 0.1}}}
    try:
        inverter.save_pretrained(tmp_path / "guided")
    finally:
        inverter.trained = trained
    model = serve(folders=[tmp_path / "guided"]).get("/models").json()["models"][0]
    assert (model["name"], model["guidance"]) == ("guided", True)


def test_random_health_and_queue(client):
    assert client.get("/random").json()["text"] in EXAMPLES
    assert client.get("/health").json() == {"status": "ok", "models": ["inverter"]}
    first, second, third = client.get("/queue").json()
    assert first == {
        "model": "inverter",
        "serves": "quick",
        "asks_encoder": False,
        "waiting": 0,
        "running": 0,
        "limit": 64,
    }
    assert (second["serves"], second["asks_encoder"]) == ("bulk", False)
    assert (third["serves"], third["asks_encoder"]) == ("search", True)


def test_there_are_enough_examples_and_they_fit():
    assert len(set(EXAMPLES)) == len(EXAMPLES) >= 40
    assert all(10 <= len(text) <= 80 and "@" not in text for text in EXAMPLES)


@pytest.mark.slow
def test_the_page_and_its_parts_are_served(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "unembed" in page.text
    script = client.get("/static/app.js")
    assert "javascript" in script.headers["content-type"]
    assert script.headers["cache-control"] == page.headers["cache-control"] == "no-cache"
    assert client.get("/static/../app.py").status_code == 404
    assert client.get("/static/%2e%2e/app.py").status_code == 404


# What is asked


def test_encode(client, encoder):
    told = client.post("/encode", json={"text": TEXT}).json()
    assert (
        np.array(told["embedding"], dtype=np.float32).tolist() == encoder.encode([TEXT])[0].tolist()
    )
    assert told["tokens"] == ["the", "red", "dog", "sleeps", "."]
    assert told["truncated"] is False
    long = client.post("/encode", json={"text": "dog " * 12}).json()
    assert long["truncated"] is True and len(long["tokens"]) == 12


def test_decode_tells_the_steps_and_the_result(client, decode, encoder, served):
    events = decode(client, text=TEXT, steps=4)
    names = [name for name, _ in events]
    assert names == ["queued", "start", *["step"] * (len(names) - 3), "done"]
    assert events[0][1] == {"position": 0}
    start, steps, done = (
        events[1][1],
        [data for name, data in events if name == "step"],
        events[-1][1],
    )
    assert start["tokens"] == ["the", "red", "dog", "sleeps", "."]
    assert len(start["embedding"]) == start["dimension"] == 32
    assert [step["index"] for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["index"] == steps[-1]["total"] and steps[-1]["mask_ratio"] == 0
    assert [len(step["tokens"]) for step in steps] == [12] * len(steps)
    assert any(t["state"] == "guessed" and t["text"] for t in steps[0]["tokens"])
    (expected,) = served.invert(encoder.encode([TEXT]), steps=4)
    assert done["text"] == expected.text
    assert done["passes"] == expected.passes and done["encoder_calls"] == 0
    original = served.tokenizer.encode([TEXT])[0]
    assert done["token_accuracy"] == token_accuracy(original, expected.token_ids)
    again = encoder.encode([expected.text])[0] @ encoder.encode([TEXT])[0]
    assert done["cosine"] == pytest.approx(float(again), abs=1e-5)
    settled = [t["text"] for t in steps[-1]["tokens"] if t["state"] == "settled"]
    assert settled == [t["text"] for t in done["tokens"]]


def test_decode_takes_a_vector(client, decode, encoder):
    vector = 3.0 * encoder.encode([TEXT])[0]
    events = dict(decode(client, embedding=vector.tolist()))
    assert events["start"]["tokens"] is None
    same = dict(decode(client, text=TEXT))
    assert events["done"]["text"] == same["done"]["text"]
    assert events["done"]["alignment"] is None and events["done"]["cosine"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_can_be_asked_for(client, decode, served, encoder, strategy):
    calls = {"encoder_calls": 12} if STRATEGIES[strategy].needs_encoder else {}
    events = decode(client, text=TEXT, strategy=strategy, steps=4, seed=3, **calls)
    done = events[-1][1]
    (expected,) = served.invert(
        encoder.encode([TEXT]),
        strategy=strategy,
        steps=4,
        seed=3,
        encoder=encoder,
        **calls,
    )
    assert (done["text"], done["passes"], done["encoder_calls"], done["seed"]) == (
        expected.text,
        expected.passes,
        expected.encoder_calls,
        3,
    )
    if STRATEGIES[strategy].needs_encoder:
        last = [data for name, data in events if name == "step"][-1]
        assert last["cosine"] == pytest.approx(done["cosine"], abs=1e-3)
        assert 0 < last["encoder_calls"] <= 12


def test_settings_reach_the_inverter(client, decode, served, encoder):
    settings = {"strategy": "euler", "options": {"temperature": 2, "top_p": "0.9"}, "steps": 6}
    guided = dict(decode(client, text=TEXT, guidance=[0, 1.5], seed=8, **settings))["done"]
    (expected,) = served.invert(encoder.encode([TEXT]), guidance=(0.0, 1.5), seed=8, **settings)
    assert (guided["text"], guided["passes"]) == (expected.text, expected.passes)


def test_invert_answers_for_several_in_order(client, served, encoder):
    texts = [TEXT, "the cat eats the fish.", "rain"]
    told = client.post("/invert", json={"texts": texts, "strategy": "euler", "seed": 5}).json()
    expected = served.invert(encoder.encode(texts), strategy="euler", seed=5, steps=8)
    assert [item["text"] for item in told["results"]] == [item.text for item in expected]
    assert told["model"] == "inverter" and told["seed"] == 5
    vectors = encoder.encode(texts).tolist()
    again = client.post("/invert", json={"embeddings": vectors, "strategy": "euler", "seed": 5})
    assert [item["text"] for item in again.json()["results"]] == [i.text for i in expected]


@pytest.mark.slow
def test_requests_in_one_batch_get_the_text_they_get_alone(serve, decode, monkeypatch):
    client = serve(pause=0.01)
    asked = [
        {"text": text, "strategy": "euler", "options": {"temperature": 1.5}, "seed": seed}
        for seed, text in enumerate([TEXT, "the cat", "rain and snow.", TEXT, "my key"] * 2)
    ]
    alone = [decode(client, **body)[-1][1] for body in asked]
    sizes, together = [], [None] * len(asked)
    invert = client.demo.models["inverter"].inverter.invert

    def counted(vectors, **options):
        sizes.append(len(vectors))
        return invert(vectors, **options)

    client.demo.models["inverter"].inverter.invert = counted

    def ask(place):
        together[place] = decode(client, **asked[place])[-1][1]

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(sizes) == len(asked) and max(sizes) > 1
    assert [each["text"] for each in together] == [each["text"] for each in alone]
    assert len({each["text"] for each in alone}) > 3


def test_several_checkpoints_are_served_and_share_their_encoder(serve, inverter, tmp_path, decode):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        inverter.save_pretrained(folder)
    client = serve(folders=folders)
    told = client.get("/models").json()
    assert ([m["name"] for m in told["models"]], told["default"]) == (["first", "second"], "first")
    models = client.demo.models
    assert models["first"].encoder is models["second"].encoder
    assert decode(client, text=TEXT, model="second")[1][1]["model"] == "second"
    problem = refused(client.post("/decode", json={"text": TEXT, "model": "third"}), 422)
    assert "first, second" in problem["detail"]


# What is refused


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "expected either text or embedding"),
        ({"text": "a", "embedding": [1.0]}, "expected either text or embedding"),
        ({"text": ""}, "text"),
        ({"text": " \n "}, "visible character"),
        ({"text": "x" * 2001}, "at most 2000 characters"),
        ({"text": 7}, "text"),
        ({"embedding": []}, "embedding"),
        ({"embedding": [1.0] * 31}, "embeddings of 32 dimensions"),
        ({"embedding": [[1.0] * 32]}, "embedding"),
        ({"embedding": [0.0] * 32}, "only zeros"),
        ({"embedding": ["1.0"] * 32}, "embedding"),
        ({"embedding": [True] * 32}, "embedding"),
        ({"embedding": [None] * 32}, "embedding"),
        ({"embedding": [10**400] * 32}, "embedding"),
        ({"embedding": "1, 2"}, "embedding"),
        ({"text": "a", "strategy": "magic"}, "a strategy among greedy"),
        ({"text": "a", "options": {"heat": 1}}, "an option of the strategy greedy"),
        ({"text": "a", "options": {"name": "x"}}, "an option of the strategy greedy"),
        ({"text": "a", "options": {"steps": 4}}, "an option of the strategy greedy"),
        ({"text": "a", "options": {"lengths": 10**9}}, "lengths"),
        ({"text": "a", "strategy": "guided-search", "options": {"beam": 10**6}}, "beam"),
        ({"text": "a", "options": {"lengths": 1.5}}, "lengths of type int"),
        ({"text": "a", "strategy": "euler", "options": {"temperature": "inf"}}, "temperature"),
        ({"text": "a", "strategy": "euler", "options": {"temperature": "nan"}}, "temperature"),
        ({"text": "a", "steps": 0}, "steps"),
        ({"text": "a", "steps": 129}, "steps: expected at most 128"),
        ({"text": "a", "steps": 2.5}, "steps"),
        ({"text": "a", "encoder_calls": 1001}, "encoder_calls: expected at most 1000"),
        ({"text": "a", "strategy": "best-of", "encoder_calls": 0}, "at least 1 for best-of"),
        ({"text": "a", "encoder_calls": 5}, "greedy makes none; leave it out"),
        ({"text": "\u200b\ufeff \x07"}, "at least one visible character"),
        ({"text": "a", "guidance": [1.0]}, "guidance"),
        ({"text": "a", "guidance": [0.0, 99.0]}, "guidance"),
        ({"text": "a", "seed": -1}, "seed"),
        ({"text": "a", "seed": 2**53}, "seed"),
        ({"text": "a", "colour": "red"}, "colour"),
        ([], "body"),
    ],
)
def test_a_request_that_cannot_be_served_is_a_problem(client, body, said):
    problem = refused(client.post("/decode", json=body), 422)
    assert said in problem["detail"]
    assert "--" not in problem["detail"], "nobody who asks the API has a command line"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(client, number):
    content = f'{{"embedding": [{", ".join([number] * 32)}]}}'
    answer = client.post("/decode", content=content, headers={"content-type": "application/json"})
    assert "finite number" in refused(answer, 422)["detail"]


def test_a_compressed_body_is_a_problem(client):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = client.post("/decode", content=gzip.compress(b'{"text": "a"}'), headers=headers)
    assert "without Content-Encoding" in refused(answer, 415)["detail"]


def test_health_answers_head(client):
    answer = client.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")


def test_vectors_of_another_encoder_are_doubted(client, decode):
    model = client.demo.find(None)
    draws = np.random.default_rng(0).normal(size=(600, 32)) / np.arange(1, 33)
    own = draws / np.linalg.norm(draws, axis=1, keepdims=True)
    statistics = VectorStatistics.measure(own)
    model.inverter.fingerprint = SimpleNamespace(statistics=statistics)
    for vectors, there in ((own[:8], False), (own[:8, ::-1], True)):
        answer = client.post("/invert", json={"embeddings": vectors.tolist(), "steps": 1})
        assert (answer.json()["doubt"] is not None) == there
    strange = own[0, ::-1].tolist()
    events = dict(decode(client, embedding=strange, steps=1))
    assert "do not look like fake's" in events["start"]["doubt"]
    assert dict(decode(client, text=TEXT, steps=1))["start"]["doubt"] is None


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b""])
def test_a_body_that_is_no_json_is_a_problem(client, content):
    answer = client.post("/decode", content=content, headers={"content-type": "application/json"})
    refused(answer, 422 if content == b"" else 400)


def test_a_lone_surrogate_is_refused(client):
    answer = client.post(
        "/decode", content='{"text": "\\ud800"}', headers={"content-type": "application/json"}
    )
    refused(answer, 422)


def test_forms_of_other_sites_are_not_read_as_json(client):
    answer = client.post(
        "/decode", content=json.dumps({"text": "a"}), headers={"content-type": "text/plain"}
    )
    refused(answer, 422)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"texts": ["a"] * 33}, "at most 32 at once"),
        ({"texts": []}, "texts"),
        ({"texts": ["a", " "]}, "visible character"),
        ({"embeddings": [[1.0] * 32, [1.0] * 31]}, "[N, 32]"),
        ({"embeddings": [[1.0] * 32, [0.0] * 32]}, "only zeros in vector 1"),
        ({"texts": ["a"], "embeddings": [[1.0] * 32]}, "expected either texts or embeddings"),
    ],
)
def test_a_batch_that_cannot_be_served_is_a_problem(client, body, said):
    assert said in refused(client.post("/invert", json=body), 422)["detail"]


def test_a_large_body_is_refused_unread(serve):
    client = serve(body_bytes=1000)
    refused(client.post("/decode", json={"text": "a" * 1000}), 413)

    def chunks():
        for _ in range(100):
            yield b" " * 100

    headers = {"content-type": "application/json", "content-length": "900"}
    answer = client.post("/decode", content=chunks(), headers=headers)
    refused(answer, 413)
    assert answer.headers["connection"] == "close", "the rest is not read"


def test_a_body_in_chunks_is_refused_unread(client):
    answer = client.post("/decode", content=iter([b"{}"]))
    assert "Content-Length" in refused(answer, 411)["detail"]
    assert answer.headers["connection"] == "close"


def test_a_large_body_that_is_refused_ends_the_connection(serve):
    client = serve(rate="1/minute", body_bytes=100_000)
    small, large, huge = (
        client.post("/decode", content=b"x" * size, headers={"content-type": "text/plain"})
        for size in (10, 70_000, 200_000)
    )
    assert (small.status_code, large.status_code, huge.status_code) == (422, 429, 413)
    assert large.headers["connection"] == huge.headers["connection"] == "close", "not read at all"
    assert "connection" not in client.post("/decode", json={}).headers


def test_a_body_of_too_many_values_is_not_parsed(client, monkeypatch):
    monkeypatch.setattr("unembed.demo.requests.parse_body", lambda *_: pytest.fail("parsed"))
    for path in ("/encode", "/decode", "/invert"):
        answer = client.post(path, json={"embeddings": [[1] * 2000] * 40})
        assert "at most 65" in refused(answer, 422)["detail"]


def test_a_body_within_the_limits_is_never_one_of_too_many_values(client):
    texts = {"texts": [",a" * 1000] * 32, "steps": 1}
    assert client.post("/invert", json=texts).status_code == 200


def test_a_large_body_counts_as_several_texts(serve):
    client = serve(rate="4/minute")
    content = json.dumps({"texts": [TEXT] * 2, "steps": 1}).encode() + b" " * 2 * TEXT_BYTES
    headers = {"content-type": "application/json"}
    assert client.post("/invert", content=content, headers=headers).status_code == 200
    refused(client.post("/invert", json={"texts": [TEXT] * 2}), 429)
    assert client.post("/invert", json={"texts": [TEXT]}).status_code == 200, "three of four"


def test_paths_and_methods_that_are_not_there(client):
    refused(client.get("/nothing"), 404)
    refused(client.get("/static/nothing.js"), 404)
    answer = client.get("/decode")
    refused(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_too_much_from_one_address_is_refused_with_a_time(serve):
    client = serve(rate="4/minute")
    assert client.post("/encode", json={"text": TEXT}).status_code == 200
    assert client.post("/invert", json={"texts": [TEXT] * 3}).status_code == 200
    answer = client.post("/encode", json={"text": TEXT})
    assert refused(answer, 429)["retry_after"] == int(answer.headers["retry-after"]) == 15
    refused(client.post("/invert", json={"texts": [TEXT]}), 429)
    assert client.get("/models").status_code == 200, "looking is free"


def test_what_takes_too_long_is_ended(serve, decode):
    client = serve(pause=0.2, seconds=0.5)
    name, problem = decode(client, text=TEXT)[-1]
    assert (name, problem["status"]) == ("error", 504)
    refused(client.post("/invert", json={"texts": [TEXT]}), 504)


def test_a_batch_above_the_rate_is_served_after_the_time_it_was_told(serve, monkeypatch):
    now = 0.0
    monkeypatch.setattr("unembed.demo.limits.time.monotonic", lambda: now)
    client = serve(rate="4/minute")
    limiter = client.demo.clients._limiter
    limiter.clock = lambda: now
    many = {"texts": [TEXT] * 8, "steps": 1}
    assert client.post("/invert", json=many).status_code == 200, "a full bucket pays for it"
    now = 30.0
    answer = client.post("/invert", json=many)
    assert refused(answer, 429)["retry_after"] == 30, "asking in vain costs nothing"
    now = 60.0
    assert client.post("/invert", json=many).status_code == 200


def test_other_paths_are_not_led_to_by_an_address_of_this_server(client):
    refused(client.get("/docs/", follow_redirects=False), 404)


def test_a_range_is_not_looked_at(client):
    whole = client.get("/static/app.js")
    for odd in ("bytes=0-10", "bytes=9-1", "lines=1-2", "bytes=" + "0-1," * 1000):
        answer = client.get("/static/app.js", headers={"range": odd})
        assert (answer.status_code, answer.content) == (200, whole.content)


def test_events_are_not_to_be_held_back_by_a_proxy(client):
    answer = client.post("/decode", json={"text": TEXT, "steps": 1})
    assert answer.headers["x-accel-buffering"] == "no"


# What surrounds it


def test_every_answer_has_the_headers(client):
    for answer in (
        client.get("/"),
        client.get("/models"),
        client.get("/nothing"),
        client.post("/decode", json={}),
        client.post("/decode", json={"text": TEXT}),
        client.get("/docs"),
    ):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'")
        assert "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in answer.headers
    assert client.get("/models").headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8080", 200),
        ("[::1]:8080", 200),
        ("demo.example", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("evil.example@localhost", 421),
        ("localhost:", 421),
        ("", 421),
    ],
)
def test_the_host_is_checked(serve, host, status):
    client = serve(hosts=["localhost", "[::1]", "demo.example"])
    assert client.get("/health", headers={"host": host}).status_code == status


def test_other_origins_are_let_in_only_when_asked(serve):
    client = serve(origins=["https://friend.example"])
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    friend, other = {"origin": "https://friend.example"}, {"origin": "https://evil.example"}
    answer = client.options("/decode", headers={**friend, **asked})
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    assert client.options("/decode", headers={**other, **asked}).status_code == 400
    answer = client.post("/encode", json={"text": TEXT}, headers=friend)
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    answer = client.get("/health", headers=other)
    assert "access-control-allow-origin" not in answer.headers


def test_the_log_has_no_texts_unless_asked(serve, decode, caplog):
    caplog.set_level(logging.INFO, logger="unembed.demo")
    quiet = serve()
    decode(quiet, text=TEXT)
    quiet.post("/decode", json={"text": "moon", "steps": "moon"})
    quiet.post("/invert", json={"texts": [TEXT]})
    assert "POST /decode 200" in caplog.text
    assert "red" not in caplog.text and "moon" not in caplog.text
    decode(serve(log_texts=True), text=TEXT)
    assert repr(TEXT) in caplog.text


def test_an_error_nobody_caught_is_one_line_and_a_problem(client, monkeypatch, caplog):
    def fail(*arguments):
        raise ValueError("the patient's name")

    monkeypatch.setattr("unembed.demo.requests.decode", fail)
    answer = client.post("/decode", json={"text": TEXT})
    assert "patient" not in str(refused(answer, 500))
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.getMessage().startswith("POST /decode: ValueError in test_app.py, line ")
    assert record.exc_info is None


def test_a_fault_while_decoding_is_told_as_an_event(client, decode, caplog):
    def fail(*arguments, **options):
        raise ValueError("the patient's name")

    client.demo.models["inverter"].inverter.invert = fail
    events = decode(client, text=TEXT)
    assert events[-1][0] == "error" and events[-1][1]["status"] == 500
    refused(client.post("/invert", json={"texts": [TEXT]}), 500)
    assert "patient" not in caplog.text + str(events)


def test_metrics_count(client, decode):
    decode(client, text=TEXT, steps=4)
    client.get("/invented/path")
    told = client.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain; version=")
    lines = told.text.splitlines()
    assert 'unembed_requests_total{method="POST",path="/decode",status="200"} 1.0' in lines
    assert 'unembed_requests_total{method="GET",path="other",status="404"} 1.0' in lines
    assert 'unembed_work_total{kind="denoiser passes",model="inverter"} 4.0' in lines
    assert 'unembed_jobs{state="waiting",worker="inverter"} 0.0' in lines
    assert 'unembed_batch_vectors_count{worker="inverter"} 1.0' in lines
    assert any(line.startswith("process_resident_memory_bytes") for line in lines)


def test_markup_in_a_text_is_data(client):
    answer = client.post("/decode", json={"text": "<script>alert(1)</script>"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    start = dict(parse_events(answer.text))["start"]
    assert all(isinstance(token, str) for token in start["tokens"])
