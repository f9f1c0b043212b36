"""The live demo under load: what clients get, how long they wait, and what batching brings.

    python -m benchmarks.serving

A server process of its own on loopback, a free port and no limit of rate. First the same requests
by one client after another and by many at once, in turn: the ratio is what batching brings. Then
many clients at once for some time, each asking again as soon as it has an answer. Every request
must end with a result or with an honest 503 that says when to come back; memory is the server's
resident set over the second half of that time.

Last, on a server with its default limits, one client does its worst in several ways, from 20
connections at once, while another at 127.0.0.2 asks for its health and for plain inversions: health
has to be answered within 1 second and an inversion within 3.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

from benchmarks.machine import median_ratio, print_table
from unembed.demo.schemas import EXAMPLES

_LONGEST_PAUSE = 2.0  # seconds before asking again, whatever a 503 says
_PATIENCE = 90.0  # seconds for one request
_CROWD = 20  # connections of the hostile client
_HEALTH, _PLAIN = 1.0, 3.0  # seconds in which others have to be answered

_TEXTS = [f"The patient number {i} was admitted on Monday with a broken arm." for i in range(32)]
_FULL = {"texts": _TEXTS, "encoder_calls": 1000}
# What one client asks for again and again: a body, or a path to read
ATTACKS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "faults": ("/decode", {"text": "a", "options": {str(key): [] for key in range(80_000)}}),
    "vectors": ("/invert", {"embeddings": [[1] * 8000] * 40}),
    "search": ("/invert", {**_FULL, "strategy": "guided-search", "options": {"proposals": 1000}}),
    "beam": ("/invert", {**_FULL, "strategy": "guided-search", "options": {"beam": 64}}),
    "samples": ("/invert", {**_FULL, "strategy": "best-of", "steps": 128}),
    "passes": ("/invert", {"texts": _TEXTS, "strategy": "euler", "steps": 128}),
    "many": ("/invert", {"texts": _TEXTS[:1], "steps": 64}),
    "pages": ("/docs", None),
}


@dataclass
class Outcomes:
    """How the requests ended.

    Attributes:
        ends: Number of each end: ``done``, ``503``, or what went wrong.
        first: Seconds to the first step of each that got one.
        complete: Seconds to the result.
        memory: Resident bytes of the server, about twice a second.
    """

    ends: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    complete: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    @property
    def unanswered(self) -> int:
        """Requests that got neither a result nor a 503 with a time."""
        return sum(self.ends.values()) - self.ends["done"] - self.ends["503"]


async def ask(client: httpx.AsyncClient, text: str, seed: int, outcomes: Outcomes) -> float:
    """One decoding, its end counted; returns the seconds after which to ask again."""
    began, end, pause = time.perf_counter(), "broken off", 0.0
    body = {"text": text, "seed": seed}
    try:
        async with client.stream("POST", "/decode", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                pause = float(answer.headers.get("retry-after", 0))
                honest = answer.status_code == httpx.codes.SERVICE_UNAVAILABLE and pause > 0
                outcomes.ends["503" if honest else str(answer.status_code)] += 1
                return pause
            async for line in answer.aiter_lines():
                seconds = time.perf_counter() - began
                if line == "event: step" and end != "step":
                    end = "step"
                    outcomes.first.append(seconds)
                elif line == "event: done":
                    end = "done"
                    outcomes.complete.append(seconds)
                elif line.startswith("data: ") and '"status":503' in line:
                    end, pause = "503", float(json.loads(line[6:]).get("retry_after", 0))
    except httpx.HTTPError as error:
        end = type(error).__name__
    outcomes.ends[end if end in ("done", "503") else f"lost: {end}"] += 1
    return pause


async def load(url: str, clients: int, seconds: float, pid: int) -> Outcomes:
    """Many clients that ask without a pause but for what a 503 says."""
    outcomes, end = Outcomes(), time.monotonic() + seconds

    async def visit(number: int, client: httpx.AsyncClient) -> None:
        turn = 0
        while time.monotonic() < end:
            text = EXAMPLES[(number + turn) % len(EXAMPLES)]
            pause = await ask(client, text, number, outcomes)
            turn += 1
            await asyncio.sleep(min(pause, _LONGEST_PAUSE, max(0.0, end - time.monotonic())))

    async def weigh() -> None:
        process = psutil.Process(pid)
        while time.monotonic() < end:
            outcomes.memory.append(process.memory_info().rss)
            await asyncio.sleep(0.5)

    async with _client(url, clients) as client:
        await asyncio.gather(weigh(), *(visit(number, client) for number in range(clients)))
    return outcomes


async def answer_all(url: str, count: int, together: int) -> float:
    """Seconds for a number of requests, so many of them at once."""
    outcomes, numbers = Outcomes(), iter(range(count))

    async def work(client: httpx.AsyncClient) -> None:
        for number in numbers:
            await ask(client, EXAMPLES[number % len(EXAMPLES)], number, outcomes)

    async with _client(url, together) as client:
        began = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(together)))
        seconds = time.perf_counter() - began
    assert outcomes.ends["done"] == count, f"not all were answered: {outcomes.ends}"
    return seconds


def compare(url: str, requests: int, together: int, rounds: int) -> float:
    """Print one at a time beside many at once; returns the ratio of their throughputs."""
    seconds: dict[int, list[float]] = {1: [], together: []}
    asyncio.run(answer_all(url, together, together))  # warm-up
    for _ in range(rounds):
        for side, times in seconds.items():
            times.append(asyncio.run(answer_all(url, requests, side)))
    ratio = median_ratio(seconds[1], seconds[together])
    rows = [
        [str(side), f"{requests / statistics.median(times):.1f}"] for side, times in seconds.items()
    ]
    print_table(["clients", "texts/s"], rows)
    print(f"\nbatching: {ratio:.2f} x (median of {rounds} rounds of {requests} requests)\n")
    return ratio


async def under_attack(
    url: str, attack: str, seconds: float, pause: float = 0.6
) -> tuple[list[float], list[float]]:
    """One client does its worst; returns what another waits for ``/health`` and for inversions.

    Args:
        url: Of the server.
        attack: A key of `ATTACKS`.
        seconds: For which it goes on.
        pause: Of the other between inversions, so that its rate allows them.
    """
    command = [sys.executable, "-m", "benchmarks.serving", "--harm", attack, "--url", url]
    # A process of its own: what it costs is not the other client's
    hostile = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert hostile.stdout is not None
    await hostile.stdout.readline()
    end = time.monotonic() + seconds

    async def measure(client: httpx.AsyncClient, path: str, wait: float) -> list[float]:
        times = []
        await asyncio.sleep(1.0)
        while time.monotonic() < end:
            began = time.perf_counter()
            if path == "/health":
                answer = await client.get(path)
            else:
                answer = await client.post(path, json={"texts": ["I lost my keys."]})
            answer.raise_for_status()
            times.append(time.perf_counter() - began)
            await asyncio.sleep(wait)
        return times

    try:
        async with _client(url, 2, address="127.0.0.2") as other, asyncio.TaskGroup() as group:
            health = group.create_task(measure(other, "/health", 0.1))
            plain = group.create_task(measure(other, "/invert", pause))
    finally:
        with suppress(ProcessLookupError):
            hostile.kill()
        await hostile.wait()
    return health.result(), plain.result()


async def harm(url: str, attack: str) -> None:
    """Do one's worst until killed, from many connections at once, each without a pause."""
    path, body = ATTACKS[attack]
    content = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}

    async def repeat(client: httpx.AsyncClient) -> None:
        while True:
            with suppress(httpx.HTTPError):
                method = "GET" if content is None else "POST"
                await client.request(method, path, content=content, headers=headers)

    print("ready", flush=True)
    async with _client(url, _CROWD) as client:
        await asyncio.gather(*(repeat(client) for _ in range(_CROWD)))


def attack_all(url: str, attacks: Sequence[str], seconds: float) -> bool:
    """Print what others wait for under each attack; returns whether all were served in time."""
    rows, served = [], True
    for attack in attacks:
        health, plain = asyncio.run(under_attack(url, attack, seconds))
        served &= max(health) < _HEALTH and max(plain) < _PLAIN
        figures = [statistics.median(health), max(health), statistics.median(plain), max(plain)]
        rows.append([attack, *(f"{figure:.2f} s" for figure in figures)])
    head = ["attack", "health p50", "worst", "inversion p50", "worst"]
    print_table(head, rows)
    return served


def report(outcomes: Outcomes, clients: int, seconds: float) -> None:
    """Print how a load ended."""
    ends = ", ".join(f"{count} {end}" for end, count in sorted(outcomes.ends.items()))
    print(f"{clients} clients, {seconds:g} s: {ends}; lost {outcomes.unanswered}")
    rows = [
        [name, *(f"{percentile(times, share):.2f} s" for share in (0.5, 0.99))]
        for name, times in (("first step", outcomes.first), ("result", outcomes.complete))
        if times
    ]
    print_table(["", "p50", "p99"], rows)
    half = outcomes.memory[len(outcomes.memory) // 2 :]
    if half:
        growth = (half[-1] - half[0]) / 2**20
        print(f"\nmemory {half[-1] / 2**20:.0f} MiB, {growth:+.0f} MiB over the second half")


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of them lies."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


@asynccontextmanager
async def _client(
    url: str, connections: int, address: str | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    transport = httpx.AsyncHTTPTransport(limits=limits, local_address=address)
    async with httpx.AsyncClient(base_url=url, transport=transport, timeout=_PATIENCE) as client:
        yield client


def main() -> None:
    """Parse, start a server, measure, print; exit code 1 if a request was lost or late."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", default="minilm")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30.0, help="of the load; 0: none")
    parser.add_argument("--together", type=int, default=32, help="clients of the comparison")
    parser.add_argument("--requests", type=int, default=64, help="of a round of the comparison")
    parser.add_argument("--rounds", type=int, default=3, help="0: no comparison")
    parser.add_argument("--attack-seconds", type=float, default=15.0, help="0: no attacks")
    parser.add_argument("--attack", choices=ATTACKS, nargs="*", default=list(ATTACKS))
    parser.add_argument("--harm", choices=ATTACKS, help="be the hostile client of --url")
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.harm:
        asyncio.run(harm(options.url, options.harm))
    failed = False
    if options.seconds:
        with _server("--rate", "none", "--checkpoint", options.checkpoint) as (url, pid):
            if options.rounds:
                compare(url, options.requests, options.together, options.rounds)
            outcomes = asyncio.run(load(url, options.clients, options.seconds, pid))
            report(outcomes, options.clients, options.seconds)
            failed = outcomes.unanswered > 0
    if options.attack_seconds:
        with _server("--checkpoint", options.checkpoint) as (url, _):
            print(f"\none hostile client, {options.attack_seconds:g} s an attack\n")
            failed |= not attack_all(url, options.attack, options.attack_seconds)
    sys.exit(1 if failed else 0)


@contextmanager
def _server(*arguments: str) -> Iterator[tuple[str, int]]:
    """A server on a free port; its address and process."""
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "unembed", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        yield server.stdout.readline().split()[1], server.pid
    finally:
        server.terminate()
        server.wait(timeout=120)


if __name__ == "__main__":
    main()
