"""Redis: hashes with a vector as bytes in one of their fields."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from unembed.errors import StoreError
from unembed.vectors.records import NAMES
from unembed.vectors.stores.address import Address
from unembed.vectors.stores.store import (
    Store,
    StoreFacts,
    VectorBatch,
    choose,
    choose_fields,
    client_errors,
)

_PEEKED = 64
_SIZES = {"float32": 4, "float64": 8, "float16": 2}


class RedisStore(Store):
    """The hashes whose keys begin with a prefix (``?collection=doc:``); ids are the keys."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        import redis

        self._fail = (redis.RedisError, OSError)
        with self._errors():
            self._client = redis.Redis.from_url(
                address.place,
                password=address.secret,
                socket_timeout=30,
                socket_connect_timeout=10,
            )
            self._learn()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def ids(self, after: str | None = None) -> Iterator[str]:
        """Keys in the order of their bytes; a scan may give a key twice, and it counts once."""
        if not hasattr(self, "_keys"):
            with self._errors():
                keys: Any = self._client.scan_iter(match=self._pattern, count=1000, _type="hash")
                self._keys = sorted({_text(key) for key in keys})
        start = 0 if after is None else bisect_right(self._keys, after)
        yield from self._keys[start:]

    def fetch(self, ids: Sequence[str]) -> VectorBatch:
        """Hashes by key, in one pipeline; see `Store.fetch`."""
        with self._errors():
            pipeline = self._client.pipeline(transaction=False)
            for name in ids:
                key = name.encode("utf-8", "surrogateescape")
                pipeline.hmget(key, [self._column, *self.fields])
            rows = pipeline.execute()
        return self.batch(
            [
                (
                    name,
                    _numbers(vector, self.facts.stored_type),
                    *(None if value is None else _text(value, "replace") for value in values),
                )
                for name, (vector, *values) in zip(ids, rows, strict=True)
            ]
        )

    def _learn(self) -> None:
        prefix = self._address.collection or ""
        self._pattern = _escape(prefix) + "*"
        first = list(islice(self.ids(), _PEEKED))
        if not first:
            raise StoreError(
                f"hashes whose keys begin with {prefix!r} at {self._address.place}",
                "none",
                "Name their prefix with ?collection=doc:",
            )
        hashes: list[Any] = [
            self._client.hgetall(name.encode("utf-8", "surrogateescape")) for name in first
        ]
        fields = sorted({_text(field) for row in hashes for field in row})
        usual = [name for name in NAMES if name in fields][:1]
        self._column = choose(
            fields if self._address.column else usual,
            self._address.column,
            f"a field of vectors in the hashes {prefix}*",
            "?column=",
        )
        sizes = Counter(len(row.get(self._column.encode(), b"")) for row in hashes)
        sizes.pop(0, None)
        width = sizes.most_common(1)[0][0] if sizes else 0
        kind = self._address.options.get("dtype", "float32")
        if kind not in _SIZES:
            raise StoreError(f"?dtype= of {', '.join(_SIZES)}", kind, "Correct it")
        others = [name for name in fields if name != self._column]
        text, others = choose_fields(others, self._address.text, self._address.keep)
        tls = self._address.place.startswith("rediss")
        self.facts = StoreFacts(
            kind="redis",
            collection=f"{prefix}*",
            count=len(self._keys),
            dimension=width // _SIZES[kind],
            stored_type=kind,
            normalised=False,
            text=text,
            fields=others,
            authentication="a password" if self._address.secret else "none was needed",
            encryption=f"of the connection: {'TLS' if tls else 'none'}; of the dump: none",
            tested="against Redis without its Search module",
            notes=[f"numbers taken as {kind}, which a hash does not say; ?dtype= names another"],
        )

    def _errors(self) -> Any:
        return client_errors(
            f"a readable Redis at {self._address.place}",
            "Start the server, or correct the address and REDIS_PASSWORD",
            *self._fail,
            secret=self._address.secret,
        )


def _numbers(data: bytes | None, kind: str) -> Any:
    import numpy as np

    if not data:
        return None
    if len(data) % _SIZES[kind]:
        return data
    return np.frombuffer(data, np.dtype(kind).newbyteorder("<")).astype(np.float64)


def _text(data: bytes, errors: str = "surrogateescape") -> str:
    return data.decode("utf-8", errors)


def _escape(prefix: str) -> str:
    return "".join(f"\\{sign}" if sign in "*?[]\\^" else sign for sign in prefix)


def open_store(address: Address) -> RedisStore:
    """Open the hashes of a Redis."""
    return RedisStore(address)
