"""Attackers who know of a defence: what each of them makes of the stored vectors.

Whatever an attacker has, he ends with estimates of the encoder's own vectors, which the inverter
then decodes, or a corpus is searched with. The estimates are this file; none of them uses the
secret part of a defence, nor a held-out vector as the encoder made it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from unembed.defences.defence import Defence, Vectors, unit
from unembed.defences.product import ProductQuantisation
from unembed.defences.rotate import Permutation
from unembed.encoders.alignment import Alignment, PairSums, fit_alignment
from unembed.encoders.base import EncoderIdentity
from unembed.errors import ConfigError, require_whole

Floats = NDArray[np.float64]
Estimate = Callable[[Vectors], Vectors]

ATTACKERS = ("U", "A1", "R", "L")  # those of `all`; A2 is named
_LEAST_CHECKED = 8  # pairs from which a method is checked on a quarter of them
_GAIN = 0.001  # cosine that a fitted map must gain to replace an inverse that is known
_ROUNDS = 30  # of the unpaired matching


@dataclass(frozen=True)
class Case:
    """A defended store as it lies before an attacker.

    Attributes:
        defence: As it was fitted by the owner; its public part alone is used.
        recipe: The same, not fitted: what an attacker fits to vectors of his own.
        store: All stored vectors [N, D'].
        held_out: Those of them that are attacked [n, D'].
        public: The encoder's vectors of the attacker's own texts [m, D].
        pairs_stored: Stored vectors of leaked pairs [p, D'].
        pairs_clean: The encoder's vectors of their texts [p, D], in the same order.
        encoder: Whose space it is.
        seed: Of what attackers draw.
    """

    defence: Defence
    recipe: Defence
    store: Vectors
    held_out: Vectors
    public: Vectors
    pairs_stored: Vectors
    pairs_clean: Vectors
    encoder: EncoderIdentity
    seed: int

    @property
    def dimension(self) -> int:
        """D of the encoder."""
        return int(self.public.shape[1])

    @cached_property
    def own(self) -> Defence:
        """The defence in the attacker's hands: without its secrets, which he draws himself."""
        if not self.defence.secret:
            return self.defence
        own = copy.deepcopy(self.recipe)
        own.fit(self.public, np.random.default_rng([self.seed, 1]))
        return own

    @cached_property
    def undo(self) -> Estimate:
        """What undoes the public part of the defence without a pair (A1)."""
        return _undo(self)

    def simulate(self, round_: int = 0) -> Vectors:
        """The attacker's own vectors, defended by himself [m, D']."""
        return self.own.apply(self.public, np.random.default_rng([self.seed, 2, round_]))


class Attacker(Protocol):
    """Somebody who reads stored vectors."""

    @property
    def name(self) -> str:
        """For tables."""
        ...

    @property
    def access(self) -> str:
        """What he has."""
        ...

    def estimate(self, case: Case) -> Vectors | None:
        """Unit vectors [n, D] in the encoder's space; None where he does what U does."""
        ...


def parse_attackers(text: str | Sequence[str]) -> list[str]:
    """Names of attackers, with commas or in a list, ``all`` for those of ``ATTACKERS``.

    Raises:
        ConfigError: An unknown one, or none.
    """
    words = text.split(",") if isinstance(text, str) else text
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        fix = "Correct --attackers"
        raise ConfigError("attackers of U, A1, A2, R, L or all", f"{text!r:.80}", fix)
    names = [n for w in words for n in (ATTACKERS if w.strip() == "all" else [w.strip()])]
    unknown = [name for name in names if name not in (*ATTACKERS, "A2")]
    if unknown or not names:
        raise ConfigError("attackers of U, A1, A2, R, L or all", repr(text), "Correct --attackers")
    if names == ["L"]:
        names = ["U", "L"]
    return list(dict.fromkeys(names))


def parse_pairs(pairs: Any) -> list[int]:
    """Counts of leaked pairs, each once, ascending; raises ConfigError for what is none."""
    if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes)):
        raise ConfigError("pairs as some whole numbers", f"{pairs!r:.80}", "Correct pairs")
    counts = require_whole(**{f"pairs[{i}]": (count, 1) for i, count in enumerate(pairs)})
    if not counts:
        raise ConfigError("pairs as some whole numbers", "none", "Correct pairs")
    return sorted(set(counts))


def fit_width(vectors: Vectors, dimension: int) -> Vectors:
    """Vectors cut or filled up with zeros to D numbers, of unit length."""
    width = min(vectors.shape[1], dimension)
    rows = np.zeros((len(vectors), dimension), np.float32)
    rows[:, :width] = vectors[:, :width]
    rows[~rows.any(axis=1), 0] = 1.0
    return unit(rows)


@dataclass(frozen=True)
class Unaware:
    """Feeds the inverter what is stored."""

    name: str = "U"
    access: str = "the stored vectors; does not know of the defence"

    def estimate(self, case: Case) -> Vectors:
        """The stored vectors."""
        return fit_width(case.held_out, case.dimension)


@dataclass(frozen=True)
class Denoising:
    """Undoes what can be undone without a pair: knows the defence, and not its secrets."""

    name: str = "A1"
    access: str = "the stored vectors, the defence without its secrets, texts of his own"

    def estimate(self, case: Case) -> Vectors | None:
        """Estimates by what vectors of his own show."""
        return None if case.defence.identity else case.undo(case.held_out)


def _undo(case: Case) -> Estimate:
    """Shrinkage of noise, the order of a permutation, else an inverse or a map fitted to it."""
    sigma = case.defence.sigma(case.dimension)
    if sigma is not None:
        return wiener(case.public, sigma)
    if isinstance(case.defence, Permutation):
        order = match_unpaired(case.store, case.public)
        return lambda vectors: unit(vectors[:, order])
    simulated = case.simulate()
    alignment = _align(simulated, case.public, case)
    inverse = case.own.invert(simulated)
    if inverse is None or mean_cosine(inverse, case.public) + _GAIN < alignment.cosine:
        return alignment
    return lambda vectors: unit(_not_none(case.own.invert(vectors)))


def _not_none(vectors: Vectors | None) -> Vectors:
    assert vectors is not None
    return vectors


def wiener(public: Vectors, sigma: float) -> Estimate:
    """Make what shrinks noisy unit vectors towards an encoder's: μ + Σ(Σ + σ²I)⁻¹(y - μ).

    The linear estimate of least mean square error (Wiener, 1949), mean and covariance those of
    public vectors.

    Args:
        public: Unit vectors of other texts [m, D].
        sigma: Standard deviation of the noise in each number.

    Returns:
        y / |y| [n, D], y a unit vector with noise → unit vectors [n, D].
    """
    dimension = public.shape[1]
    rows = public.astype(np.float64)
    mean = rows.mean(axis=0)
    covariance = np.cov(rows, rowvar=False)
    gain = np.linalg.solve(covariance + sigma**2 * np.eye(dimension), covariance)
    length = np.sqrt(1.0 + sigma**2 * dimension)  # of y, about
    return lambda vectors: unit(mean + (vectors.astype(np.float64) * length - mean) @ gain)


def match_unpaired(store: Vectors, public: Vectors) -> NDArray[np.int64]:
    """Find the secret order of dimensions without a pair: the one with the public statistics.

    Dimensions are first matched by mean, standard deviation and their sorted correlations, which
    no order changes, each difference in units of its sampling error; then by their correlations
    with the dimensions matched so far, until nothing changes.

    Args:
        store: Vectors [N, D] in a secret order.
        public: Vectors of other texts [m, D] in the encoder's.

    Returns:
        For each dimension of the encoder its place in the store, [D].
    """
    from scipy.optimize import linear_sum_assignment

    (there, mean_there, scale_there), (here, mean, scale) = map(_moments, (store, public))
    rows = 1.0 / (1.0 / len(store) + 1.0 / len(public))
    moments = rows * ((mean[:, None] - mean_there) / scale[:, None]) ** 2
    moments += 2.0 * rows * (np.log(scale)[:, None] - np.log(scale_there)) ** 2
    profiles = _distances(np.sort(here, axis=1), np.sort(there, axis=1))
    _, order = linear_sum_assignment(moments + rows * profiles)
    for _ in range(_ROUNDS):
        distances = _distances(here, there[:, order])  # columns in the order so far
        _, better = linear_sum_assignment(moments + rows * distances)
        if (better == order).all():
            break
        order = better
    places: NDArray[np.int64] = order.astype(np.int64)
    return places


def _distances(one: Floats, other: Floats) -> Floats:
    """Squared, of each row [n, D] to each other row [m, D], [n, m]."""
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)
    distances: Floats = squares - 2.0 * one @ other.T
    return distances


def _moments(vectors: Vectors) -> tuple[Floats, Floats, Floats]:
    """Correlations [D, D] with a diagonal of zeros, means [D], standard deviations [D]."""
    rows = vectors.astype(np.float64)
    scale = np.maximum(rows.std(axis=0), 1e-12)
    correlations = np.cov(rows, rowvar=False, bias=True) / np.outer(scale, scale)
    np.fill_diagonal(correlations, 0.0)
    return correlations, rows.mean(axis=0), scale


@dataclass(frozen=True)
class Realignment:
    """Learns from leaked pairs how the stored vectors lie to the encoder's own.

    Attributes:
        pairs: Texts whose stored vectors he knows.
    """

    pairs: int

    @property
    def name(self) -> str:
        """For tables."""
        return f"R{self.pairs}"

    @property
    def access(self) -> str:
        """What he has."""
        return f"what A1 has, and {self.pairs:,} of the texts with their stored vectors"

    def estimate(self, case: Case) -> Vectors | None:
        """Estimates by what predicts left-out pairs best: A1's, or a map that the pairs show."""
        if case.defence.identity:
            return None
        x, y = case.pairs_stored[: self.pairs], case.pairs_clean[: self.pairs]
        best, cosine = case.undo, mean_cosine(case.undo(x), y) + _GAIN
        alignment = _align(x, y, case)
        if alignment.cosine > cosine:
            best, cosine = alignment, alignment.cosine
        for fit in self._methods(case):
            if len(x) < _LEAST_CHECKED:
                break
            count = 3 * len(x) // 4
            score = mean_cosine(fit(x[:count], y[:count])(x[count:]), y[count:])
            if score > cosine:
                best, cosine = fit(x, y), score
        return best(case.held_out)

    def _methods(self, case: Case) -> list[Callable[[Vectors, Vectors], Estimate]]:
        methods: list[Callable[[Vectors, Vectors], Estimate]] = []
        if case.pairs_stored.shape[1] == case.dimension and not isinstance(
            case.defence, ProductQuantisation
        ):
            methods.append(match_dimensions)
        if isinstance(case.defence, ProductQuantisation):
            quantiser = case.defence
            methods.append(lambda x, y: code_centroids(quantiser, x, y))
        return methods


def _align(x: Vectors, y: Vectors, case: Case) -> Alignment:
    """Ridge, Procrustes or shift, whichever predicts left-out pairs best."""
    sums = PairSums(case.seed)
    sums.add(unit(x), y)
    return fit_alignment(sums, case.encoder)


def match_dimensions(x: Vectors, y: Vectors) -> Estimate:
    """Find the order of dimensions in which pairs x [n, D], y [n, D] agree best."""
    from scipy.optimize import linear_sum_assignment

    standard = [
        (rows - rows.mean(axis=0)) / np.maximum(rows.std(axis=0), 1e-9)
        for rows in (x.astype(np.float64), y.astype(np.float64))
    ]
    _, order = linear_sum_assignment(standard[1].T @ standard[0], maximize=True)
    return lambda vectors: unit(vectors[:, order])


def code_centroids(quantiser: ProductQuantisation, x: Vectors, y: Vectors) -> Estimate:
    """Replace each code's centroid by the mean of the clean parts that pairs show to have it.

    The published centroid counts as one more pair, so that a code no pair has keeps it.

    Args:
        quantiser: Whose codes they are.
        x: Stored vectors of the pairs [n, D].
        y: Their clean vectors [n, D].
    """
    tables = quantiser.centroids.astype(np.float64).copy()
    counts = np.ones(tables.shape[:2])
    codes, parts = quantiser.codes(x), np.split(y, quantiser.parts, axis=1)
    for m, part in enumerate(parts):
        np.add.at(tables[m], codes[:, m], part)
        np.add.at(counts[m], codes[:, m], 1.0)
    tables /= counts[:, :, None]

    def estimate(vectors: Vectors) -> Vectors:
        own = quantiser.codes(vectors)
        return unit(np.concatenate([t[own[:, m]] for m, t in enumerate(tables)], axis=1))

    return estimate


def mean_cosine(one: Vectors, other: Vectors) -> float:
    """Mean cosine of rows [n, D] with the rows of the same place."""
    return float((unit(one) * unit(other)).sum(axis=1).mean())
