"""Requests: from a body to a job, and from what the job is told to the answer."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from pydantic import ValidationError
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from unembed.decoding import DEFAULT_STEPS, Decoding
from unembed.decoding.settings import make_strategy
from unembed.demo.limits import Limits
from unembed.demo.middleware import client_name
from unembed.demo.models import DEFAULT_CALLS, Demo, ServedModel
from unembed.demo.queue import Job
from unembed.demo.schemas import (
    DecodeRequest,
    EncodeRequest,
    InvertRequest,
    OneInput,
    ProbableWord,
    ProblemError,
    RequestBody,
    WordsOut,
    WordsRequest,
    invalid,
)
from unembed.encoders.base import is_blank
from unembed.vectors.words import words_of

_PING = 10.0  # seconds without an event after which the connection is kept open by a comment
_SLACK = 5.0  # seconds that a reader may be behind
_KEYS = 32  # of an object in a body
_MOST_COLONS = 8192  # texts may hold JSON themselves
_SMALL = 1 << 15  # bytes of a body that is read at once
_JSON = re.compile(r"application/([\w.+-]+\+)?json")
_STREAM_HEADERS = {"X-Accel-Buffering": "no"}  # nginx holds events back otherwise

log = logging.getLogger(__name__)

Body = TypeVar("Body", bound=RequestBody)


async def read_body(request: Request, demo: Demo, schema: type[Body]) -> Body:
    """Read a request's body and check it; a large one in a thread, for the loop serves everybody.

    Raises:
        ProblemError: Not JSON, compressed, not declared as JSON, or not what the schema says.
        HTTPException: It is too large, or did not come in time.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    content = await request.body()
    if not _JSON.fullmatch(kind):
        raise ProblemError(422, "expected a body declared with Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ProblemError(415, "expected a body without Content-Encoding")
    # Looked at without parsing, which would take long
    if content.count(b'":') > _MOST_COLONS:
        raise ProblemError(422, f"body: expected at most {_KEYS} keys; found thousands")
    if content.count(b",") > demo.most_commas:
        raise ProblemError(422, f"body: expected at most {demo.most_commas} values; found more")
    if len(content) <= _SMALL:
        return parse_body(content, schema)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(demo.parser, parse_body, content, schema)


def parse_body(content: bytes, schema: type[Body]) -> Body:
    """Read JSON and check it against a schema in a time that grows with its bytes alone.

    A validator that collects every fault of 90,000 unknown keys takes seconds: lists end at their
    first fault (`RequestBody`), and objects with too many keys are not looked into.

    Raises:
        ProblemError: Not JSON, or not what the schema says.
    """
    if not content:
        raise ProblemError(422, "body: expected JSON; found nothing")
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ProblemError(400, "expected a body of valid JSON") from error
    options = data.get("options") if isinstance(data, dict) else None
    for item, place in ((data, "body"), (options, "options")):
        if isinstance(item, dict) and len(item) > _KEYS:
            raise ProblemError(422, f"{place}: expected at most {_KEYS} keys; found {len(item)}")
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise invalid(error) from None


class PendingJob:
    """A job that was queued, and the events it is told.

    Args:
        demo: What the routes share.
        model: Which serves it.
        decoding: See `Job`.
        inputs: Texts, or unit vectors [N, D].
        client: See `Job`.
        seed: See `Job`.
        watched: See `Job`.

    Raises:
        ProblemError: The queue is full, or the server is shutting down.
    """

    def __init__(
        self,
        demo: Demo,
        model: ServedModel,
        decoding: Decoding | None,
        inputs: Sequence[str] | NDArray[np.float32],
        client: str,
        seed: int = 0,
        watched: bool = False,
    ) -> None:
        self._demo, self._end = demo, time.monotonic() + demo.limits.seconds
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._over = False
        self._job = Job(decoding, inputs, seed, watched, self._tell, client)
        self._worker = model.submit(self._job)

    def _tell(self, name: str, data: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, (name, data))

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """Yield the events, ``done`` or ``error`` last; ``ping`` when nothing comes for a while."""
        last = "done" if self._job.decoding is not None else "start"
        name = ""
        while name not in (last, "error"):
            remaining = self._end - time.monotonic()
            try:
                name, data = await asyncio.wait_for(
                    self._events.get(), max(0.0, min(remaining, _PING))
                )
            except TimeoutError:
                name, data = "ping", None
                if remaining <= _PING:
                    name, data = "error", _too_slow(self._demo.limits).to_dict()
            self._over = name in (last, "error")
            self._log(name, data)
            yield name, data

    def _log(self, name: str, data: Any) -> None:
        if self._demo.log_texts and name == "done":
            for text, result in zip(self._job.originals, data["results"], strict=True):
                log.info("%r was recovered as %r", text, result["text"])

    async def result(self, request: Request) -> dict[str, Any]:
        """The data of the last event.

        Raises:
            ProblemError: Of an ``error``; or the client has left.
        """
        answer = asyncio.ensure_future(self._last())
        disconnect = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({answer, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ProblemError(408, "the client has left")
            return answer.result()
        finally:
            answer.cancel()
            disconnect.cancel()
            self.leave()

    async def _last(self) -> dict[str, Any]:
        data: dict[str, Any] = {}
        async for name, data in self.events():  # noqa: B007 - the last one is wanted
            pass
        if name == "error":
            raise ProblemError(data["status"], data["detail"], data.get("retry_after"))
        return data

    def leave(self) -> None:
        """Nobody listens any more."""
        if not self._over:
            self._demo.metrics.abandoned(self._worker.name)
        self._worker.leave(self._job)


class EventStream(StreamingResponse):
    """Server-sent events of a job; when the client goes, the job is left."""

    media_type = "text/event-stream"

    def __init__(self, pending: PendingJob, seconds: float) -> None:
        super().__init__(self._lines(pending), headers=_STREAM_HEADERS)
        self._pending, self._seconds = pending, seconds + _SLACK

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, until the client goes, or until one that does not read is cut off."""
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a client did not read its events in time")
        finally:
            self._pending.leave()

    async def _lines(self, pending: PendingJob) -> AsyncIterator[str]:
        async for name, data in pending.events():
            if name == "ping":
                yield ": ping\n\n"
                continue
            if name == "done":
                (result,) = data.pop("results")
                data.update(result)
            text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
            yield f"event: {name}\ndata: {text}\n\n"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_slow(limits: Limits) -> ProblemError:
    return ProblemError(
        504, f"not finished within the {limits.seconds:g} seconds a request may take"
    )


def encode(demo: Demo, body: EncodeRequest, scope: Scope) -> PendingJob:
    """Queue a text to be embedded.

    Raises:
        ProblemError: No such model, no usable text, or no room.
    """
    _check_text(body.text, demo.limits)
    client = client_name(scope)
    return PendingJob(demo, demo.find(body.model), None, [body.text], client, watched=True)


def decode(demo: Demo, body: DecodeRequest, scope: Scope) -> PendingJob:
    """Queue a text or a vector to be inverted while somebody watches.

    Raises:
        ProblemError: No such model, no usable input, a setting above a limit, or no room.
        UnembedError: A setting or a vector is not usable.
    """
    model = demo.find(body.model)
    decoding = _decoding(body, demo.limits)
    inputs = _one_input(model, body, demo.limits)
    return PendingJob(demo, model, decoding, inputs, client_name(scope), body.seed, watched=True)


async def words(demo: Demo, body: WordsRequest, request: Request) -> WordsOut:
    """Find the most probable words of the text behind a vector.

    The vector is made in the model's queue, in turn with all that others ask for.

    Raises:
        ProblemError: As for `decode`; or nobody has learned the words of the model's encoder.
        UnembedError: The vector is not usable.
    """
    model = demo.find(body.model)
    probe = model.probe
    if probe is None:
        having = [name for name, each in demo.models.items() if each.probe is not None]
        raise ProblemError(
            422, f"expected a model with a word probe ({', '.join(having) or 'none here has one'})"
        )
    inputs = _one_input(model, body, demo.limits)
    pending = PendingJob(demo, model, None, inputs, client_name(request.scope), watched=True)
    start = await pending.result(request)
    find = partial(probe.most_probable, top=body.top, common=body.common, names=body.names)
    loop = asyncio.get_running_loop()
    (rows,) = await loop.run_in_executor(demo.parser, find, start["embedding"])
    there = None if body.text is None else words_of(body.text)
    entries = [
        ProbableWord(
            word=row.word,
            probability=round(row.probability, 4),
            base_rate=round(row.base_rate, 6),
            is_name=row.is_name,
            occurs=None if there is None else row.word.casefold() in there,
        )
        for row in rows
    ]
    doubt = start["doubt"]
    return WordsOut(model=model.name, encoder=start["encoder"], words=entries, doubt=doubt)


def invert(demo: Demo, body: InvertRequest, scope: Scope) -> PendingJob:
    """Queue texts or vectors to be inverted.

    Raises:
        ProblemError: As for `decode`; too many texts at once, or from this client.
        UnembedError: As for `decode`.
    """
    model = demo.find(body.model)
    decoding = _decoding(body, demo.limits)
    count = len(body.texts or body.embeddings or ())
    if count > demo.limits.vectors:
        raise ProblemError(422, f"expected at most {demo.limits.vectors} at once; found {count}")
    inputs: list[str] | NDArray[np.float32]
    if body.texts is not None:
        inputs = body.texts
        for text in inputs:
            _check_text(text, demo.limits)
    else:
        inputs = model.inverter.map_vectors(body.embeddings)
    problem = demo.clients.charge(scope, count)
    if problem is not None:
        raise problem
    return PendingJob(demo, model, decoding, inputs, client_name(scope), body.seed)


def _one_input(
    model: ServedModel, body: OneInput, limits: Limits
) -> list[str] | NDArray[np.float32]:
    """Read the text [1] of a body, or its vector [1, D] in the space of the model."""
    if body.text is None:
        return model.inverter.map_vectors(body.embedding)
    _check_text(body.text, limits)
    return [body.text]


def _check_text(text: str, limits: Limits) -> None:
    if is_blank(text):
        raise ProblemError(422, "expected a text with at least one visible character")
    if len(text) > limits.text_chars:
        raise ProblemError(
            422, f"expected a text of at most {limits.text_chars} characters; found {len(text)}"
        )


def _decoding(body: DecodeRequest | InvertRequest, limits: Limits) -> Decoding:
    """Read how to decode, within the server's limits."""
    strategy = make_strategy(body.strategy, body.options)
    guidance = None if body.guidance is None else (body.guidance[0], body.guidance[1])
    steps = min(DEFAULT_STEPS, limits.steps) if body.steps is None else body.steps
    calls = body.encoder_calls
    if calls is None:
        calls = min(DEFAULT_CALLS, limits.encoder_calls)
    for name, value, most in (
        ("steps", steps, limits.steps),
        ("encoder_calls", calls, limits.encoder_calls),
    ):
        if value > most:
            raise ProblemError(422, f"{name}: expected at most {most}; found {value}")
    if strategy.needs_encoder and calls < 1:
        raise ProblemError(422, f"encoder_calls: expected at least 1 for {body.strategy}; found 0")
    if body.encoder_calls and not strategy.needs_encoder:
        raise ProblemError(422, f"encoder_calls: {body.strategy} makes none; leave it out")
    calls = calls if strategy.needs_encoder else 0
    return Decoding(strategy, steps, guidance, encoder_calls=calls)
