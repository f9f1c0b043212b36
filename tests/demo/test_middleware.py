import asyncio

import pytest

from unembed.demo.limits import Limits
from unembed.demo.middleware import Clients, Guard, host_of
from unembed.demo.queue import Metrics


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("localhost", "localhost"),
        ("Demo.Example:80", "demo.example"),
        ("[::1]:8080", "[::1]"),
        ("::1", None),
        ("a:b", None),
        ("user@localhost", None),
        ("localhost/..", None),
        ("", None),
    ],
)
def test_host_of_the_name_in_a_host_header(header, host):
    assert host_of(header) == host


def answers(app, receive, limits):
    """What a guarded application sends for a POST."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/decode",
        "client": ("192.0.2.7", 1),
        "headers": [(b"host", b"localhost")],
    }
    metrics = Metrics()
    guard = Guard(app, ["localhost"], limits, Clients(None, metrics), metrics)
    asyncio.run(guard(scope, receive, send))
    return sent


def test_a_body_that_does_not_come_is_not_waited_for():
    async def reading(scope, receive, send):
        try:
            while (await receive())["more_body"]:
                pass
        except Exception as error:
            await send({"type": "http.response.start", "status": error.status_code, "headers": []})

    async def never():
        await asyncio.sleep(60)

    (start,) = answers(reading, never, Limits(body_seconds=0.05))
    assert start["status"] == 408


def test_guard_an_error_after_the_head_was_sent_only_ends_the_answer(caplog):
    async def failing(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("secret")

    sent = answers(failing, None, Limits())
    assert [message["type"] for message in sent] == ["http.response.start"]
    assert "secret" not in caplog.text and "POST other: ValueError" in caplog.text
