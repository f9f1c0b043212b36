"""The live demo under load: what clients get, how long they wait, and what batching brings.

    python -m benchmarks.serving

A server process of its own on loopback, a free port and no limit of rate. First the same requests
by one client after another and by many at once, in turn: the ratio is what batching brings. Then
many clients at once for some time, each asking again as soon as it has an answer. Every request
must end with a result or with an honest 503 that says when to come back; memory is the server's
resident set over the second half of that time.
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
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx2 as httpx
import psutil

from benchmarks.machine import median_ratio, print_table
from unembed.demo.models import EXAMPLES

_LONGEST_PAUSE = 2.0  # seconds before asking again, whatever a 503 says
_PATIENCE = 90.0  # seconds for one request


@dataclass
class Outcomes:
    """How the requests ended.

    Attributes:
        ends: Number of each end: ``done``, ``503``, or what went wrong.
        first: Seconds to the first step of each that got one.
        whole: Seconds to the result.
        memory: Resident bytes of the server, about twice a second.
    """

    ends: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    @property
    def lost(self) -> int:
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
                    outcomes.whole.append(seconds)
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
    outcomes, left = Outcomes(), iter(range(count))

    async def work(client: httpx.AsyncClient) -> None:
        for number in left:
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


def report(outcomes: Outcomes, clients: int, seconds: float) -> None:
    """Print how a load ended."""
    ends = ", ".join(f"{count} {end}" for end, count in sorted(outcomes.ends.items()))
    print(f"{clients} clients, {seconds:g} s: {ends}; lost {outcomes.lost}")
    rows = [
        [name, *(f"{percentile(times, share):.2f} s" for share in (0.5, 0.99))]
        for name, times in (("first step", outcomes.first), ("result", outcomes.whole))
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
async def _client(url: str, connections: int) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    async with httpx.AsyncClient(
        base_url=url, limits=limits, timeout=_PATIENCE, trust_env=False
    ) as client:
        yield client


def main() -> None:
    """Parse, start a server, measure, print; exit code 1 if a request was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", default="minilm")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--together", type=int, default=32, help="clients of the comparison")
    parser.add_argument("--requests", type=int, default=64, help="of a round of the comparison")
    parser.add_argument("--rounds", type=int, default=3, help="0: no comparison")
    options = parser.parse_args()
    arguments = ["serve", "--port", "0", "--rate", "none", "--checkpoint", options.checkpoint]
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "unembed", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[1]
        if options.rounds:
            compare(url, options.requests, options.together, options.rounds)
        outcomes = asyncio.run(load(url, options.clients, options.seconds, server.pid))
        report(outcomes, options.clients, options.seconds)
    finally:
        server.terminate()
        server.wait(timeout=120)
    sys.exit(1 if outcomes.lost else 0)


if __name__ == "__main__":
    main()
