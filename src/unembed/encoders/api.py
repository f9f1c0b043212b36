"""An encoder behind an OpenAI-compatible API: asked in batches, every answer kept on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import httpx2
import numpy as np
import openai
from numpy.typing import NDArray

from unembed.encoders import API_PREFIX
from unembed.encoders.base import EncoderIdentity, Progress, check_texts
from unembed.encoders.batching import VectorCache, plan_batches
from unembed.encoders.fingerprint import LEAST_COSINE, PROBES, least_cosine
from unembed.encoders.vectors import read_answer, row_peaks, to_unit_length
from unembed.errors import EncoderError
from unembed.tokenizer import TextTokenizer

OPENAI = "https://api.openai.com/v1"
KEY, OPENAI_KEY, OPENAI_BASE = "UNEMBED_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"
CACHE = "UNEMBED_CACHE"
_MOST_TEXTS = 2048  # OpenAI's limit of a request
_TEXTS, _BYTES = 64, 1 << 16  # of a request; a token has at least a byte, OpenAI's limit is 300,000
_AT_ONCE = 4  # requests under way, so that no server waits for us
_RETRIES = 5
# Seconds between bytes, and in all: a server on a CPU answers one request after the other
_SILENCE, _LONGEST = 600.0, 600.0
_ERROR_BYTES, _ERROR_SECONDS = 1 << 16, 120.0  # read of the page that comes with an error
_BYTES_OF_TEXT = 1 << 18  # of an answer, for each text: 8,192 dimensions as decimals take 200,000
_TOO_MUCH = (400, 413, 422)  # status of a server that takes fewer texts in a request
_CANARY = PROBES[1]


@dataclass
class Usage:
    """What an API was asked for.

    Attributes:
        price: Of a million tokens, in whatever currency; None where it is not known.
        calls: Requests sent; one refused as too large, or sent again, counts once.
        texts: Texts in the answers.
        cached: Texts whose vectors were on the disk.
        tokens: Tokens, by the answers' own count.
        uncounted: Answers without such a count.
    """

    price: float | None = None
    calls: int = 0
    texts: int = 0
    cached: int = 0
    tokens: int = 0
    uncounted: int = 0

    @property
    def cost(self) -> float | None:
        """Tokens times price."""
        return None if self.price is None else self.tokens * self.price / 1e6

    def describe(self) -> str:
        """One line for people."""
        uncounted = f" ({self.uncounted:,} answers counted none)" if self.uncounted else ""
        cost = "" if self.cost is None else f", {self.cost:.6f} at {self.price:g} a million tokens"
        return (
            f"{self.calls:,} calls, {self.texts:,} texts embedded, {self.cached:,} from the cache, "
            f"{self.tokens:,} tokens{uncounted}{cost}"
        )


class ApiEncoder:
    """An encoder that an OpenAI-compatible server runs; build it with `load_encoder`.

    Nobody sees its weights: it is known by the name of the model and by its vectors of the probe
    texts, within a tolerance, as its answers are not the same to the bit.

    Args:
        client: Of the server.
        name: Of the model there.
        cache: Where answers are kept.
        usage: Counts what is asked for.
        max_calls: Most requests; no limit when None.
        prompt: Text put before each text.
        dimensions: Asked of a Matryoshka model; what the model gives when None.
        batch_size: Most texts of a request.

    Raises:
        EncoderError: The server does not answer, or with something else than vectors.
    """

    def __init__(
        self,
        client: openai.OpenAI,
        name: str,
        cache: VectorCache,
        usage: Usage,
        *,
        max_calls: int | None = None,
        prompt: str = "",
        dimensions: int | None = None,
        batch_size: int = _TEXTS,
    ) -> None:
        weakref.finalize(self, client.close)
        self.usage = usage
        self._client, self._model, self._cache = client, name, cache
        self._max_calls, self._most_texts = max_calls, batch_size
        self._prompt, self._dimensions = prompt, dimensions
        self._dimension = dimensions
        self._lock = Lock()
        self._proved = False  # that the server is the one whose answers the cache holds
        probes = [prompt + text for text in PROBES]
        answers = self._cache.get(probes)
        vectors = answers if len(answers) == len(probes) else self._embed(probes)
        self.identity = EncoderIdentity(
            name=API_PREFIX + name,
            revision=None,
            dimension=len(vectors[probes[0]]),
            weights_digest="",
            prompt=prompt,
            truncate_dim=dimensions,
        )
        self._dimension = self.identity.dimension

    @property
    def tokenizer(self) -> TextTokenizer:
        """None is at hand.

        Raises:
            EncoderError: Always.
        """
        raise EncoderError(
            f"a tokenizer to cut texts for {self.identity.name}",
            "none: an API does not hand out its own",
            "Name one: --set data.vocabulary.tokenizer=FOLDER (or a Hub repository)",
        )

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> NDArray[np.float32]:
        """Embed texts that the cache does not hold; see `Encoder.encode`.

        Raises:
            EmbeddingError: A text is empty.
            EncoderError: No usable answer, or no calls are left. What was answered is kept.
        """
        prompted = [self._prompt + text for text in check_texts(texts)]
        repeats = Counter(prompted)
        answers = self._cache.get(list(repeats))
        vectors = {text: v for text, v in answers.items() if len(v) == self.identity.dimension}
        self.usage.cached += len(vectors)

        def report(done: Sequence[str]) -> None:
            if progress is not None and done:
                progress(sum(repeats[text] for text in done))

        report(list(vectors))
        for batch, rows in self._ask([text for text in repeats if text not in vectors]):
            vectors.update(zip(batch, rows, strict=True))
            report(batch)
        return _unit([vectors[text] for text in prompted], self.identity.dimension)

    def encode_anew(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts in one request, whatever the cache holds; unit vectors [B, D]."""
        rows = self._request([self._prompt + text for text in check_texts(texts)])
        return _unit(list(rows), self.identity.dimension)

    def word_embeddings(self) -> None:
        """None: an API does not hand them out."""

    def _embed(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        return {t: v for batch, rows in self._ask(texts) for t, v in zip(batch, rows, strict=True)}

    def _ask(self, texts: Sequence[str]) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
        """Send texts, some requests at a time; yields those of a request and their vectors."""
        if not texts:
            return
        self._prove()
        texts = sorted(texts, key=len)  # for servers that pad
        # No text counts less than its share of a full batch, which so has at most that many
        least = _BYTES // self._most_texts
        lengths = [max(least, len(text.encode())) for text in texts]
        batches = [[texts[row] for row in rows] for rows in plan_batches(lengths, _BYTES)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            running = [pool.submit(self._answer, batch) for batch in batches]
            try:
                for batch, answer in zip(batches, running, strict=True):
                    yield batch, answer.result()
            finally:  # those on the way are paid: they are waited for and kept
                pool.shutdown(cancel_futures=True)

    def _prove(self) -> None:
        """Compare one answer with the one kept, before answers of another model are put to them."""
        text = self._prompt + _CANARY
        answer = None if self._proved else self._cache.get([text]).get(text)
        if answer is not None:
            cosine = least_cosine(answer[None], self._request([text]))
            if cosine < LEAST_COSINE:
                raise EncoderError(
                    f"answers of {self._model} like those kept in {self._cache.path}",
                    f"a cosine of {cosine:.4f} between two vectors of one text",
                    "Another model answers under that name: delete this file, or correct the name",
                )
        self._proved = True

    def _answer(self, batch: list[str]) -> NDArray[np.float32]:
        """Vectors [B, D] of a batch, kept; in parts where the server takes fewer texts at once."""
        if len(batch) <= self._most_texts:
            try:
                vectors = self._request(batch)
            except _RefusedError:
                if len(batch) == 1:
                    raise
                self._most_texts = min(self._most_texts, len(batch) // 2)
            else:
                self._cache.put(batch, vectors)
                return vectors
        half = len(batch) // 2
        return np.concatenate([self._answer(batch[:half]), self._answer(batch[half:])])

    def _request(self, texts: list[str]) -> NDArray[np.float32]:
        """One request; returns vectors [B, D] as they were answered."""
        with self._lock:
            if self._max_calls is not None and self.usage.calls >= self._max_calls:
                raise EncoderError(
                    f"at most {self._max_calls} calls of {self._model}",
                    "another one is needed",
                    "Raise --max-calls and start again: what was answered is kept",
                )
            self.usage.calls += 1
        try:
            body = self._send(texts)
        except _RefusedError:
            with self._lock:
                self.usage.calls -= 1
            raise
        vectors, tokens = read_answer(body, len(texts), self._dimension)
        with self._lock:
            self._dimension = vectors.shape[1]
            self.usage.texts += len(texts)
            self.usage.tokens += tokens or 0
            self.usage.uncounted += tokens is None
        return vectors

    def _send(self, texts: list[str]) -> bytes:
        """The body of the server's answer.

        The errors of the library, whose text a server can choose, end here.
        """
        sizes = openai.omit if self._dimensions is None else self._dimensions
        limit = _BYTES_OF_TEXT * (len(texts) + 1)
        try:
            with self._client.embeddings.with_streaming_response.create(
                model=self._model, input=texts, dimensions=sizes, encoding_format="base64"
            ) as response:
                body, began = bytearray(), time.monotonic()
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > limit or time.monotonic() - began > _LONGEST:
                        break
                else:
                    return bytes(body)
            problem = EncoderError(
                f"at most {limit:,} bytes in {_LONGEST:g} s from {_base(self._client)}",
                f"a larger or slower answer for {len(texts)} texts",
                "Check --api-base and encoder.name",
            )
        except openai.APIStatusError as error:
            problem = _status_problem(error, self._client)
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            problem = EncoderError(
                f"an answer from {_base(self._client)}",
                _clean(f"{error.__cause__ or error}", self._client) or type(error).__name__,
                "Check --api-base, or wait, and start again: what was answered is kept",
            )
        raise problem


class _RefusedError(EncoderError):
    """The request may have been too large."""


def load_api_encoder(
    name: str,
    *,
    api_base: str | None = None,
    prompt: str | None = None,
    truncate_dim: int | None = None,
    max_calls: int | None = None,
    price: float | None = None,
    cache: Path | str | None = None,
    batch_size: int | None = None,
) -> ApiEncoder:
    """Set up an encoder that an OpenAI-compatible server runs.

    The key is taken from the environment: UNEMBED_API_KEY, or OPENAI_API_KEY, which goes to OpenAI
    and to the address in OPENAI_BASE_URL alone.

    Args:
        name: ``openai:MODEL``.
        api_base: Address of the API, up to ``/v1``; that of OPENAI_BASE_URL or OpenAI's when None.
        prompt: Text put before each text; none when None, as many servers put their own.
        truncate_dim: Dimensions asked of a Matryoshka model.
        max_calls: Most requests of this process.
        price: Of a million tokens, for the cost that is shown.
        cache: Folder of the answers; UNEMBED_CACHE or ``~/.cache/unembed`` when None.
        batch_size: Most texts of a request; 64 when None.

    Raises:
        EncoderError: The name or the address is none, a number is out of range, or the server gives
            no usable answer.
    """
    model = name.removeprefix(API_PREFIX)
    standard = os.environ.get(OPENAI_BASE) or OPENAI
    base = (api_base or standard).rstrip("/")
    if not model.strip():
        raise EncoderError("a model: openai:MODEL", repr(name), "Correct encoder.name")
    _check_base(base)
    theirs = os.environ.get(OPENAI_KEY) if base in (OPENAI, standard.rstrip("/")) else ""
    key = (os.environ.get(KEY) or theirs or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise EncoderError("a key of ASCII characters", "others", f"Correct {KEY} or {OPENAI_KEY}")
    if not key and base == OPENAI:
        raise EncoderError(
            f"a key for {OPENAI} in the environment", f"no {OPENAI_KEY}", f"export {OPENAI_KEY}=…"
        )
    client = openai.OpenAI(
        api_key=key or "none",
        base_url=base,
        max_retries=_RETRIES,
        timeout=httpx2.Timeout(_SILENCE, connect=10.0),
        http_client=openai.DefaultHttpxClient(
            follow_redirects=False,  # texts and key go where they are sent
            event_hooks={"response": [_cut_error]},
        ),
    )
    where = Path(cache or os.environ.get(CACHE) or Path.home() / ".cache" / "unembed")
    digest = hashlib.sha256(json.dumps([base, model, truncate_dim]).encode()).hexdigest()
    label = re.sub(r"[^\w.-]+", "-", model)[:60]
    return ApiEncoder(
        client,
        model,
        VectorCache(where.expanduser() / f"{label}-{digest[:12]}.sqlite"),
        Usage(price),
        max_calls=max_calls,
        prompt=prompt or "",
        dimensions=truncate_dim,
        batch_size=min(batch_size or _TEXTS, _MOST_TEXTS),
    )


def _check_base(base: str) -> None:
    """Refuse an address that is none, or that holds what must not be written down."""
    try:
        url = httpx2.URL(base)
    except (httpx2.InvalidURL, ValueError):
        url = httpx2.URL("")
    if url.userinfo or url.query or url.fragment:
        raise EncoderError(
            "the address of an API alone",
            "one with a name, a password or a query",
            f"A key belongs into the environment: {KEY}",
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise EncoderError(
            "the address of an API, such as http://127.0.0.1:8000/v1",
            repr(base[:80]),
            "Correct --api-base (encoder.api_base)",
        )


def _unit(vectors: Sequence[NDArray[np.float32]], dimension: int) -> NDArray[np.float32]:
    rows = np.array(vectors, dtype=np.float64).reshape(len(vectors), dimension)
    return to_unit_length(rows, row_peaks(rows))


def _status_problem(error: openai.APIStatusError, client: openai.OpenAI) -> EncoderError:
    """What an answer with a status of 300 or more means; its first words are shown."""
    status, text = error.status_code, error.response.text
    try:
        detail = json.loads(text)
        detail = detail.get("error", detail)
        text = detail["message"] if isinstance(detail, dict) else detail
    except (ValueError, AttributeError, KeyError, RecursionError):
        pass
    fixes = {
        401: f"Set {KEY} in the environment ({OPENAI_KEY} goes to OpenAI alone)",
        403: f"Set {KEY} in the environment ({OPENAI_KEY} goes to OpenAI alone)",
        404: "Check --api-base, which mostly ends in /v1, and encoder.name",
        429: "Wait, or look at the limits of the account: what was answered is kept",
    }
    wait = "Wait and start again: what was answered is kept"
    fix = fixes.get(status, wait if status >= 500 else "Check --api-base and encoder.name")  # noqa: PLR2004
    kind = _RefusedError if status in _TOO_MUCH else EncoderError
    return kind(
        f"vectors from {_base(client)}", f"status {status}, {_clean(str(text), client)!r}", fix
    )


def _clean(text: str, client: openai.OpenAI) -> str:
    """The first words of a stranger's text, without the key and without control characters."""
    if len(client.api_key) > len("none"):
        text = text.replace(client.api_key, "[key]")
    return " ".join("".join(c if c.isprintable() else " " for c in text[:2000]).split())[:200]


def _base(client: openai.OpenAI) -> str:
    return str(client.base_url).rstrip("/")


def _cut_error(response: httpx2.Response) -> None:
    """Read only the beginning of the page that comes with an error."""
    if response.is_error and isinstance(response.stream, httpx2.SyncByteStream):
        response.stream = _Beginning(response.stream)


class _Beginning(httpx2.SyncByteStream):
    """The first bytes of a stream, and not for long."""

    def __init__(self, stream: httpx2.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        size, began = 0, time.monotonic()
        for chunk in self._stream:
            yield chunk
            size += len(chunk)
            if size > _ERROR_BYTES or time.monotonic() - began > _ERROR_SECONDS:
                return

    def close(self) -> None:
        self._stream.close()
