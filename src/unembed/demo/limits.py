"""Limits of what one server does for anybody who asks, and a rate for each client."""

from __future__ import annotations

import ipaddress
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from unembed.errors import ConfigError

_UNITS = {"second": 1.0, "minute": 60.0, "hour": 3600.0}
TEXT_BYTES = 1 << 15  # of a body, from which on it counts as several texts
_CLIENTS = 10_000  # remembered; the one not seen for longest is forgotten


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        text_chars: Characters of a text.
        vectors: Texts or vectors of one ``POST /invert``.
        together: Vectors decoded in one batch.
        quick_passes: Denoiser passes over all vectors of a request, up to which it is a quick one.
        batch_passes: Of all quick requests of one batch, so that no batch keeps the next waiting.
        steps: Denoiser passes a text.
        encoder_calls: Encoder calls a text.
        queue: Requests that wait for a worker, beside those it is busy with.
        seconds: From a request's arrival to its end, waiting included.
        body_bytes: Bytes of a request's body.
        body_seconds: Time in which a body must have come.
        rate: Vectors or texts a client may send in a unit of time, as ``120/minute``; None: any.
    """

    text_chars: int = 2000
    vectors: int = 32
    together: int = 64
    quick_passes: int = 64
    batch_passes: int = 128
    steps: int = 128
    encoder_calls: int = 1000
    queue: int = 64
    seconds: float = 60.0
    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    rate: str | None = "120/minute"


def parse_rate(rate: str) -> tuple[int, float]:
    """``120/minute`` → 120 in 60 seconds.

    Raises:
        ConfigError: It is not of that form.
    """
    match = re.fullmatch(r"([1-9]\d{0,8})/(second|minute|hour)", rate)
    if match is None:
        raise ConfigError("a rate such as 120/minute", repr(rate), "Correct --rate")
    return int(match[1]), _UNITS[match[2]]


class RateLimiter:
    """A bucket of tokens for each client: full at first, refilled evenly, a token for each text.

    Args:
        count: Tokens of a full bucket.
        seconds: Time in which an empty one is full again.
        clock: Seconds, ever rising.
    """

    def __init__(
        self, count: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.count, self.rate, self.clock = count, count / seconds, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, cost: int = 1, paid: int = 0) -> int:
        """Take tokens; returns 0, or, having taken none, the whole seconds until it is worth it.

        Args:
            client: From `client_of`.
            cost: Tokens; above a full bucket it is a full bucket, so that it can be paid at all.
            paid: Tokens already taken for the same request; they go back if it is refused, so that
                asking again after the seconds returned succeeds.
        """
        now, cost = self.clock(), min(cost, self.count)
        tokens, then = self._buckets.pop(client, (float(self.count), now))
        tokens = min(self.count, tokens + (now - then) * self.rate + paid)
        wait = 0 if tokens >= cost else max(1, math.ceil((cost - tokens) / self.rate))
        self._buckets[client] = (tokens if wait else tokens - cost, now)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        return wait


def client_of(address: str) -> str:
    """Name the client to count: an IPv4 address, or the /64 network of an IPv6 subscriber."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
