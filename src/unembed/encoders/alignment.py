"""Map one encoder's vectors into the space of another, from texts whose vectors in both are known.

Both sides are unit vectors: x [D'] of the encoder nobody trained an inverter for, y [D] of the
encoder an inverter reads. Every map is affine, ŷ = ȳ + (x - x̄) W, and the result is scaled to unit
length. ALGEN (arXiv 2502.11308) takes W = pinv(XᵀX) XᵀY without means; a penalty and means repair
its dip where the number of pairs comes near the dimension (docs/alignment.md).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from unembed.encoders.base import EncoderIdentity
from unembed.encoders.vectors import VectorStatistics, as_unit_vectors
from unembed.errors import CheckpointError, EmbeddingError
from unembed.files import as_path, atomic, is_file, read_json, require_weights

Floats = NDArray[np.float64]

FORMAT = 1
SETTINGS, WEIGHTS = "alignment.json", "alignment.safetensors"
MEAN, SHIFT, PROCRUSTES, RIDGE = "mean", "shift", "procrustes", "ridge"
SCORED = 2048  # pairs on which maps are compared; the sums are those of all pairs
_FOLDS = 8  # of Procrustes, which has no closed form for leaving one out
_PENALTIES = np.logspace(-5, 2, 22)  # in units of the largest eigenvalue of the covariance
_ANCHORS = (0.0, 0.25, 0.5, 0.75, 1.0)
_LEAST_GAIN = 3.0  # standard errors above the constant output that a map must reach


@dataclass(frozen=True, repr=False, eq=False)
class Alignment:
    """A map into the space of an inverter's encoder, and what it expects.

    Attributes:
        method: ``ridge``, ``procrustes``, ``shift``, or ``mean``: a constant, which a single
            pair gives.
        matrix: W, float32 [D', D].
        source_mean: x̄, float32 [D'].
        target_mean: ȳ, float32 [D].
        pairs: How many it was made from, n.
        penalty: Of the ridge, λ, added to the eigenvalues of the sums; None for the others.
        anchor: Of the ridge, a: it draws W towards a times the identity; None for the others.
        cosines: Method → mean cosine between y and what the other pairs predict for it (leave one
            out; Procrustes leaves out an eighth at a time).
        error: Standard error of the gain of ``method`` over the constant.
        target: The encoder into whose space it leads.
        inverter: SHA-256 of the weights of the inverter it was made for, for the record.
        source: What is known of the encoder of the x: ``name``, ``fingerprint``.
        norms: Least, mean and largest length of the x as they came.
        left_out: Pairs that were not used, by reason.
        statistics: Of the x, where there were enough: vectors of another encoder are noticed.
    """

    method: str
    matrix: NDArray[np.float32]
    source_mean: NDArray[np.float32]
    target_mean: NDArray[np.float32]
    pairs: int
    penalty: float | None
    anchor: float | None
    cosines: dict[str, float]
    error: float
    target: EncoderIdentity
    inverter: str | None = None
    source: dict[str, Any] = field(default_factory=dict)
    norms: tuple[float, float, float] | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    statistics: VectorStatistics | None = None

    def __repr__(self) -> str:
        """Say what it maps, without the numbers."""
        return f"Alignment({self.describe()})"

    @property
    def dimension(self) -> int:
        """Numbers D' of the vectors it takes."""
        return len(self.source_mean)

    @property
    def name(self) -> str:
        """The encoder of the vectors it takes, as far as it is known."""
        return str(self.source.get("name") or "an encoder that was not named")

    @property
    def cosine(self) -> float:
        """Leave-one-out cosine of the map; not a number where a single pair made it."""
        return self.cosines.get(self.method, float("nan"))

    @property
    def floor(self) -> float:
        """Leave-one-out cosine of the constant output, which knows nothing of the vector."""
        return self.cosines.get(MEAN, float("nan"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the map."""
        parts = (self.matrix, self.source_mean, self.target_mean)
        return hashlib.sha256(
            b"".join(np.ascontiguousarray(p).tobytes() for p in parts)
        ).hexdigest()

    def __call__(self, vectors: Any) -> NDArray[np.float32]:
        """Map vectors [D'] or [N, D'] of any length to unit vectors float32 [N, D].

        Raises:
            EmbeddingError: Another dimension, not numbers, zero or not finite.
        """
        shape = getattr(vectors, "shape", None)
        if shape is not None and (len(shape) == 0 or shape[-1] != self.dimension):
            raise EmbeddingError(
                f"vectors of {self.dimension} dimensions, which this alignment maps ({self.name})",
                f"shape {list(shape)}",
                "Use vectors of that encoder, or another --align",
            )
        images = (as_unit_vectors(vectors, self.dimension) - self.source_mean) @ self.matrix
        return _unit(images + self.target_mean).astype(np.float32)

    def require_target(self, encoder: EncoderIdentity) -> None:
        """Refuse an inverter of another encoder than the one the map leads to.

        Raises:
            CheckpointError: It is.
        """
        if self.target.key != encoder.key:
            raise CheckpointError(
                f"an alignment into the space of {encoder.describe()}",
                f"one into that of {self.target.describe()}",
                "Make one with `unembed align PAIRS --to` that inverter",
            )

    def doubt(self) -> str | None:
        """Say with numbers why the map predicts nothing; None when it predicts something."""
        if self.method != MEAN and self.cosine - self.floor > _LEAST_GAIN * self.error:
            return None
        pairs = f"{self.pairs:,} pair{'s' if self.pairs > 1 else ''}"
        if not self.cosines:
            return f"{pairs} cannot be checked against others: every vector gives the same text"
        best = max(
            (n for n in self.cosines if n != MEAN), key=self.cosines.__getitem__, default=MEAN
        )
        return (
            f"the alignment predicts nothing: leave-one-out cosine {self.cosines[best]:.3f} from "
            f"{pairs} ({best}), {self.floor:.3f} of a constant output (standard error of the gain "
            f"{self.error:.3f}). Texts recovered through it mean nothing"
        )

    def describe(self) -> str:
        """One line for messages and tables."""
        score = f", leave-one-out cosine {self.cosine:.3f}, floor {self.floor:.3f}"
        return (
            f"{self.name} → {self.target.name}: {self.method} from {self.pairs:,} "
            f"pair{'s' if self.pairs > 1 else ''}{score if self.cosines else ''}"
        )

    def save(self, folder: str | Path) -> None:
        """Write the map and what it expects as safetensors and JSON.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        folder = as_path(folder)
        settings = {
            "format": FORMAT,
            "kind": "alignment",
            "method": self.method,
            "pairs": self.pairs,
            "penalty": self.penalty,
            "anchor": self.anchor,
            "leave_one_out_cosine": self.cosines,
            "standard_error": self.error,
            "dimension": self.dimension,
            "norms": self.norms,
            "source": self.source,
            "target": self.target.to_dict(),
            "inverter": self.inverter,
            "left_out": self.left_out,
            "digest": self.digest,
            "statistics": None if self.statistics is None else self.statistics.to_dict(),
        }
        tensors = {"matrix": self.matrix, "source_mean": self.source_mean}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic(folder / WEIGHTS) as temporary:
                save_file({**tensors, "target_mean": self.target_mean}, temporary)
            with atomic(folder / SETTINGS) as temporary:
                temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"a folder at {folder}", str(error), "Choose another --out"
            ) from error

    @classmethod
    def load(cls, folder: str | Path) -> Alignment:
        """Read what `save` wrote.

        Raises:
            CheckpointError: Nothing there, or the files are damaged or do not fit together.
        """
        folder = as_path(folder)
        if not is_file(folder / SETTINGS):
            raise CheckpointError(
                f"an alignment, a folder with {SETTINGS}", f"none at {folder}",
                "Make one with `unembed align PAIRS --to minilm --out FOLDER`",
            )  # fmt: skip
        try:
            data = read_json(folder / SETTINGS)
            tensors = load_file(require_weights(folder / WEIGHTS))
            statistics = data["statistics"]
            alignment = cls(
                method=str(data["method"]),
                matrix=tensors["matrix"].astype(np.float32),
                source_mean=tensors["source_mean"].astype(np.float32),
                target_mean=tensors["target_mean"].astype(np.float32),
                pairs=int(data["pairs"]),
                penalty=data["penalty"],
                anchor=data["anchor"],
                cosines={str(k): float(v) for k, v in data["leave_one_out_cosine"].items()},
                error=float(data["standard_error"]),
                target=EncoderIdentity.from_dict(data["target"]),
                inverter=data["inverter"],
                source=dict(data["source"]),
                norms=data["norms"] and tuple(data["norms"]),
                left_out=dict(data["left_out"]),
                statistics=statistics and VectorStatistics.from_dict(statistics),
            )
            alignment._check(data["digest"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise CheckpointError(
                f"the files of an alignment in {folder}", f"{error}", "Make it again"
            ) from error
        return alignment

    def _check(self, digest: str) -> None:
        shape = (self.dimension, self.target.dimension)
        if self.matrix.shape != shape or self.target_mean.shape != shape[1:]:
            raise ValueError(f"a map of shape {list(self.matrix.shape)} in place of {list(shape)}")
        if self.digest != digest:
            raise ValueError("a map with another digest than the one written beside it")


class PairSums:
    """Sums over pairs, float64, from which every map comes; pairs may be added a chunk at a time.

    The sums are those of all pairs; up to 2,048, drawn with the seed, are held for the comparison
    of maps.

    Args:
        seed: Of the draw.
    """

    def __init__(self, seed: int = 0) -> None:
        self.count = 0
        self._random = np.random.default_rng(seed)
        self._keys: Floats = np.empty(0)  # the pairs with the least random numbers are held
        self.x: Floats = np.empty((0, 0))
        self.y: Floats = np.empty((0, 0))
        self._x, self._y = np.empty(0), np.empty(0)
        self._xx, self._xy = np.empty(0), np.empty(0)

    def add(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Add unit vectors x [n, D'] and y [n, D] of the same texts."""
        x, y = x.astype(np.float64), y.astype(np.float64)
        if not self.count:
            (d, e), (self.x, self.y) = (x.shape[1], y.shape[1]), (x[:0], y[:0])
            self._x, self._y = np.zeros(d), np.zeros(e)
            self._xx, self._xy = np.zeros((d, d)), np.zeros((d, e))
        self.count += len(x)
        self._x += x.sum(axis=0)
        self._y += y.sum(axis=0)
        self._xx += x.T @ x
        self._xy += x.T @ y
        keys = np.concatenate([self._keys, self._random.random(len(x))])
        least = np.sort(np.argsort(keys, kind="stable")[:SCORED])
        self._keys = keys[least]
        self.x, self.y = np.concatenate([self.x, x])[least], np.concatenate([self.y, y])[least]

    @property
    def means(self) -> tuple[Floats, Floats]:
        """x̄ [D'] and ȳ [D]."""
        return self._x / self.count, self._y / self.count

    @property
    def products(self) -> tuple[Floats, Floats]:
        """Centred sums of products, [D', D'] and [D', D]."""
        x, y = self.means
        return self._xx - self.count * np.outer(x, x), self._xy - self.count * np.outer(x, y)


@dataclass(frozen=True)
class _Candidate:
    """A map, and for each pair compared the cosine of what the others predict, [m]."""

    matrix: Floats
    cosines: Floats
    penalty: float | None = None
    anchor: float | None = None


def fit_alignment(sums: PairSums, target: EncoderIdentity, **facts: Any) -> Alignment:
    """Choose the map that predicts left-out pairs best.

    Ridge with a penalty of its own, orthogonal Procrustes, and for equal dimensions a shift by
    the difference of the means; a constant where there is a single pair.

    Args:
        sums: Of at least one pair.
        target: The encoder of the y.
        **facts: Further attributes of the `Alignment`.

    Raises:
        EmbeddingError: No pairs.
    """
    if not sums.count:
        raise EmbeddingError("at least one pair of text and vector", "none", "Correct the pairs")
    x_mean, y_mean = sums.means
    zero = np.zeros((len(x_mean), len(y_mean)))
    candidates: dict[str, _Candidate] = {}
    if sums.count > 1:
        candidates = {MEAN: _Candidate(zero, _constant(sums)), RIDGE: _ridge(sums)}
        candidates[PROCRUSTES] = _procrustes(sums)
        if len(x_mean) == len(y_mean):
            candidates[SHIFT] = _shift(sums)
    scores = {name: float(each.cosines.mean()) for name, each in candidates.items()}
    method, error = MEAN, 0.0
    if candidates:
        method = max((name for name in scores if name != MEAN), key=scores.__getitem__)
        gains = candidates[method].cosines - candidates[MEAN].cosines
        error = float(gains.std(ddof=1) / np.sqrt(len(gains)))
    best = candidates.get(method, _Candidate(zero, np.empty(0)))
    return Alignment(
        method=method,
        matrix=best.matrix.astype(np.float32),
        source_mean=x_mean.astype(np.float32),
        target_mean=y_mean.astype(np.float32),
        pairs=sums.count,
        penalty=best.penalty,
        anchor=best.anchor,
        cosines=scores,
        error=error,
        target=target,
        **facts,
    )


def _ridge(sums: PairSums) -> _Candidate:
    """W = aI + (XᵀX + λI)⁻¹ Xᵀ(Y - aX) of centred pairs, λ and a by leave-one-out in closed form.

    A pair left out is predicted as y - (y - ŷ) / (1 - h), h its leverage (Allen's PRESS); with
    the eigenvectors Q of XᵀX, all penalties need one decomposition. Spaces of different dimension
    have a = 0; encoders of one family are near each other, and few pairs do best with a = 0.5.
    """
    (x_mean, y_mean), (xx, xy) = sums.means, sums.products
    rows, targets = sums.x - x_mean, sums.y - y_mean
    square = len(x_mean) == len(y_mean)
    if sums.count < min(len(x_mean), SCORED):  # all pairs are held, and fewer than eigenvectors
        _, s, right = np.linalg.svd(rows, full_matrices=False)
        values, q = s**2, right.T
    else:
        values, q = np.linalg.eigh(xx)
    keep = values > max(values.max(), 0.0) * 1e-12  # what no pair spans gets no weight
    values, q = values[keep], q[:, keep]
    scores, loadings = rows @ q, q.T @ xy  # [m, r], [r, D]
    best: tuple[float, float, float, Floats] | None = None
    for penalty in _PENALTIES * (values.max() if len(values) else 1.0):
        shrunk = scores / (values + penalty)
        leverage = 1 / sums.count + (shrunk * scores).sum(axis=1)
        misses = targets - shrunk @ loadings
        own = rows - (shrunk * values) @ q.T if square else rows  # of an identity in place of W
        for anchor in _ANCHORS if square else (0.0,):
            residual = misses - anchor * own if anchor else misses
            left_out = sums.y - residual / np.maximum(1 - leverage, 1e-9)[:, None]
            cosines = _row_cosines(left_out, sums.y)
            if best is None or cosines.mean() > best[0]:
                best = float(cosines.mean()), float(penalty), anchor, cosines
    assert best is not None
    _, penalty, anchor, cosines = best
    matrix = q @ (loadings / (values + penalty)[:, None])
    if anchor:
        matrix += anchor * (np.eye(len(x_mean)) - (q * (values / (values + penalty))) @ q.T)
    return _Candidate(matrix, cosines, penalty, anchor)


def _procrustes(sums: PairSums) -> _Candidate:
    """A rotation (of the larger space onto a part of it) and one scale; folds are left out."""
    x_mean, y_mean = sums.means
    xx, xy = sums.products
    folds = np.arange(len(sums.x)) % min(len(sums.x), _FOLDS)
    cosines = np.zeros(len(folds))
    for fold in range(folds.max() + 1):
        out = folds == fold
        x, y = sums.x[out], sums.y[out]
        rest = sums.count - len(x)
        means = [(sums.count * m - r.sum(axis=0)) / rest for m, r in ((x_mean, x), (y_mean, y))]
        # Centred sums of the rest: those of all, moved to the mean of all
        (dx, dy), (mx, my) = (x - x_mean, y - y_mean), (means[0] - x_mean, means[1] - y_mean)
        left_xy = xy - dx.T @ dy - rest * np.outer(mx, my)
        left_trace = np.trace(xx) - (dx**2).sum() - rest * (mx**2).sum()
        predicted = means[1] + (x - means[0]) @ _rotation(left_xy, float(left_trace))
        cosines[out] = _row_cosines(predicted, y)
    return _Candidate(_rotation(xy, float(np.trace(xx))), cosines)


def _rotation(xy: Floats, energy: float) -> Floats:
    """The scaled partial isometry nearest to centred sums XᵀY [D', D]; zero where they are."""
    tall = xy if xy.shape[0] >= xy.shape[1] else xy.T
    values, vectors = np.linalg.eigh(tall.T @ tall)  # of the smaller side: cheaper than an SVD
    keep = values > max(values.max(), 0.0) * 1e-10
    roots, vectors = np.sqrt(values[keep]), vectors[:, keep]
    matrix: Floats = (tall @ (vectors / roots)) @ vectors.T
    matrix *= roots.sum() / energy if energy > 0 else 0.0
    return matrix if tall is xy else matrix.T


def _shift(sums: PairSums) -> _Candidate:
    """The x moved by the difference of the means; the spaces have the same dimension."""
    (x_mean, y_mean), n = sums.means, sums.count
    others = (n * (y_mean - x_mean) - (sums.y - sums.x)) / (n - 1)
    return _Candidate(np.eye(len(x_mean)), _row_cosines(sums.x + others, sums.y))


def _constant(sums: PairSums) -> Floats:
    """Cosines [m] of the mean of the other y with each."""
    n = sums.count
    return _row_cosines((n * sums.means[1] - sums.y) / (n - 1), sums.y)


def _row_cosines(one: Floats, other: Floats) -> Floats:
    cosines: Floats = (_unit(one) * _unit(other)).sum(axis=1)
    return cosines


def _unit(rows: NDArray[Any]) -> NDArray[Any]:
    """Scale to unit length; a row of zeros stays zero."""
    unit: NDArray[Any] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return unit
