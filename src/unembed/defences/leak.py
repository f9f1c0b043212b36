"""How much comes back from estimated vectors: decoded once, looked up, scored, kept on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.decoding import Decoding
from unembed.defences.defence import Vectors
from unembed.denoiser import weights_digest
from unembed.evaluation.bootstrap import Figure, summarise
from unembed.evaluation.cache import RowCache
from unembed.evaluation.metrics import (
    Recovery,
    exact_match,
    span_recalls,
    token_set_f1,
    windows_of,
)
from unembed.evaluation.rows import derangement
from unembed.files import atomic
from unembed.inverter import Inverter

F1, EXACT, DETAILS = "token F1", "exact match", "names and numbers"
METRICS = (F1, EXACT, DETAILS)
STAGE = "attacking"
_BATCH = 64

Scores = dict[str, list[float | None]]  # metric → a value a text
Progress = Callable[[str, int, int], None]


def array_digest(*arrays: NDArray[Any]) -> str:
    """SHA-256 of some arrays, their shapes included."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def cached_array(
    folder: Path | None, key: dict[str, Any], make: Callable[[], Vectors | None]
) -> Vectors | None:
    """An array that is made once and read from the folder when the same call goes on.

    Args:
        folder: Where it is kept; made every time when None.
        key: What it depends on, plain data.
        make: Makes it; what gives None is not kept.
    """
    if folder is None:
        return make()
    name = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:24]
    path = folder / "arrays" / f"{name}.npy"
    if path.is_file():
        cached: Vectors = np.load(path, allow_pickle=False)
        return cached
    array = make()
    if array is not None:
        path.parent.mkdir(exist_ok=True)
        with atomic(path) as file, file.open("wb") as stream:
            np.save(stream, array)
    return array


@dataclass
class LeakMeter:
    """Decodes estimates of the held-out vectors and compares the texts with what was embedded.

    Two attackers with the same estimates share one decoding. An inverter writes at most L - 1
    tokens: of a longer text the window that fits best counts, for floors too.

    Args:
        inverter: The attacker's.
        decoding: How.
        ids: Of the held-out records.
        texts: Of them.
        seed: Of strategies that sample.
        folder: Keeps recoveries, so that an interrupted run goes on; None keeps none.
        progress: Called with (stage, texts done, texts).
    """

    inverter: Inverter
    decoding: Decoding
    ids: list[str]
    texts: list[str]
    seed: int
    folder: Path | None
    progress: Progress

    def __post_init__(self) -> None:
        self.token_ids = self.inverter.tokenizer.encode(self.texts)
        self.recoveries: dict[str, list[Recovery]] = {}
        self.done = self.planned = 0  # texts, for progress

    @property
    def longer(self) -> int:
        """Held-out texts that are longer than the inverter writes."""
        return sum(len(ids) >= self.inverter.length for ids in self.token_ids)

    def decode(self, vectors: Vectors, inverter: Inverter | None = None) -> list[Recovery]:
        """Recover the texts of estimates [n, D], those done before from memory or the disk."""
        model = inverter or self.inverter
        settings = {
            "vectors": array_digest(vectors),
            "inverter": weights_digest(model.denoiser),
            "decoding": str(self.decoding),
            "seed": self.seed,
        }
        key = repr(settings)
        if key not in self.recoveries:
            with RowCache(self.folder, "decoded", settings) as cache:
                self.recoveries[key] = self._through(cache, model, vectors)
        return self.recoveries[key]

    def _through(self, cache: RowCache, model: Inverter, vectors: Vectors) -> list[Recovery]:
        recoveries: list[Recovery] = []
        for start in range(0, len(vectors), _BATCH):

            def recover(done: int, start: int = start) -> list[Recovery]:
                inversions = model.invert(
                    vectors[start + done : start + _BATCH],
                    decoding=self.decoding,
                    seed=self.seed,
                    first_index=start + done,
                )
                return [Recovery(item.text, item.token_ids) for item in inversions]

            recoveries += cache.complete(self.ids[start : start + _BATCH], recover)
            self.progress(STAGE, self.done + len(recoveries), self.planned)
        self.done += len(recoveries)
        return recoveries

    def look_up(self, estimates: Vectors, texts: Sequence[str], vectors: Vectors) -> list[Recovery]:
        """The nearest text of a corpus to each estimate [n, D], its vectors [M, D]."""
        nearest = [texts[row] for row in (estimates @ vectors.T).argmax(axis=1).tolist()]
        return [
            Recovery(text, ids)
            for text, ids in zip(nearest, self.inverter.tokenizer.encode(nearest), strict=True)
        ]

    def score(self, recoveries: Sequence[Recovery]) -> Scores:
        """Token F1, exact match, and the share of a text's names and numbers that came back."""
        scores: Scores = {name: [] for name in METRICS}
        for text, ids, recovery in zip(self.texts, self.token_ids, recoveries, strict=True):
            windows = windows_of(ids, self.inverter.length - 1)
            scores[F1].append(max(token_set_f1(w, recovery.token_ids) for w in windows))
            scores[EXACT].append(exact_match(ids, recovery.token_ids))
            shares = span_recalls(text, recovery.text, self.inverter.tokenizer).values()
            scores[DETAILS].append(float(np.mean(list(shares))) if shares else None)
        return scores

    def shuffled(self, recoveries: Sequence[Recovery]) -> Scores:
        """The same of the recovery of another text: what knowing nothing of the vector gives."""
        return self.score([recoveries[row] for row in derangement(len(recoveries)).tolist()])


def identify(
    estimates: dict[str, Vectors], vectors: Vectors, rows: NDArray[np.int64], seed: int
) -> tuple[Figure | None, str]:
    """How many records are told from all others by their own text, by the best of attackers.

    Args:
        estimates: Attacker → estimates of the attacked records' vectors [n, D].
        vectors: The encoder's of all records [N, D].
        rows: Indices of the attacked ones [n].
        seed: Of the interval.

    Returns:
        The share whose own vector is the nearest to its estimate, and the attacker's name.
    """
    hits = {name: (each @ vectors.T).argmax(axis=1) == rows for name, each in estimates.items()}
    best = max(hits, key=lambda name: hits[name].sum())
    return summarise(hits[best].astype(float).tolist(), seed), best
