"""What a defence costs the owner: rankings against labels and against the undefended ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.defences.defence import Defence, Vectors
from unembed.defences.records import Queries
from unembed.evaluation.bootstrap import Figure, draw_blocks
from unembed.files import require_extra

K = 10
OVERLAP, NDCG, RECALL = "top-10 overlap", "nDCG@10", "recall@10"
_CHUNK = 256  # queries scored at a time
_REPEATS = 3  # of a timing, of which the quickest counts
_LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Ranking:
    """The first results of each query.

    Attributes:
        rows: Indices of records, best first, [Q, K].
        milliseconds: A query took, the change of its vector included; one thread of requests.
    """

    rows: NDArray[np.int64]
    milliseconds: float


def rank(defence: Defence, queries: Queries, store: Vectors, exact: Vectors) -> Ranking:
    """Rank the records for each query as a store with this defence would, by exhaustive search.

    Args:
        defence: Fitted.
        queries: Of unit vectors [Q, D].
        store: What the store holds [N, D'].
        exact: The vectors as the encoder made them [N, D], which only a re-ranking reads.
    """
    seconds = []
    rows = np.empty(0, np.int64)
    for _ in range(_REPEATS):
        start_time = time.perf_counter()
        parts = [
            _search(defence, queries, slice(start, start + _CHUNK), store, exact)
            for start in range(0, len(queries.vectors), _CHUNK)
        ]
        seconds.append(time.perf_counter() - start_time)
        rows = np.concatenate(parts)
    return Ranking(rows, 1000.0 * min(seconds) / len(queries.vectors))


def _search(
    defence: Defence, queries: Queries, part: slice, store: Vectors, exact: Vectors
) -> NDArray[np.int64]:
    vectors = queries.vectors[part]
    scores = defence.query(vectors) @ store.T  # [q, N]
    if queries.own is not None:
        scores[np.arange(len(vectors)), queries.own[part]] = -np.inf
    if not defence.rerank:
        return _top(scores, K)
    candidates = _top(scores, max(K, defence.rerank))
    again = np.einsum("qd,qcd->qc", vectors, exact[candidates])
    order = np.argsort(-again, axis=1, kind="stable")[:, :K]
    return np.take_along_axis(candidates, order, axis=1)


def _top(scores: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Indices of the highest scores of each row, best first; of equal ones the first."""
    count = min(count, scores.shape[1])
    return np.argsort(-scores, axis=1, kind="stable")[:, :count].astype(np.int64)


def overlap(ranking: Ranking, plain: Ranking) -> list[float]:
    """Share of the undefended first ten that are still among the first ten, for each query."""
    return [
        len(set(a) & set(b)) / max(len(b), 1)
        for a, b in zip(ranking.rows.tolist(), plain.rows.tolist(), strict=True)
    ]


def labelled(ranking: Ranking, queries: Queries, ids: Sequence[str]) -> dict[str, list[float]]:
    """nDCG@10 and recall@10 of each query (`ir_measures`, which calls trec_eval).

    Raises:
        ConfigError: The extra is not installed.
    """
    require_extra("retrieval", "nDCG and recall", "leave the column `relevant` out of --queries")
    import ir_measures
    from ir_measures import Qrel, R, ScoredDoc, nDCG

    assert queries.relevant is not None
    qrels = [Qrel(str(q), d, 1) for q, each in enumerate(queries.relevant) for d in sorted(each)]
    run = [
        ScoredDoc(str(q), ids[row], float(K - place))
        for q, rows in enumerate(ranking.rows.tolist())
        for place, row in enumerate(rows)
    ]
    measures = {nDCG @ K: NDCG, R @ K: RECALL}
    values = {name: [0.0] * len(queries.relevant) for name in measures.values()}
    for metric in ir_measures.iter_calc(list(measures), qrels, run):
        values[measures[metric.measure]][int(metric.query_id)] = float(metric.value)
    return values


def utilities(
    ids: Sequence[str], queries: Queries, plain: Ranking
) -> Callable[[Ranking], dict[str, list[float]]]:
    """Make what measures a ranking: values a query, the metric that decides first.

    Args:
        ids: Of the records.
        queries: With labels, or without.
        plain: The undefended ranking.
    """

    def measure(ranking: Ranking) -> dict[str, list[float]]:
        values = {} if queries.relevant is None else labelled(ranking, queries, ids)
        return {**values, OVERLAP: overlap(ranking, plain)}

    return measure


def relative_loss(plain: Sequence[float], other: Sequence[float], seed: int) -> Figure | None:
    """Share of a metric that is lost, 1 - mean / undefended mean, the same queries in both.

    Returns:
        With the interval of queries drawn anew; None where the undefended mean is 0.
    """
    before, after = np.array(plain), np.array(other)
    if before.sum() == 0:
        return None
    weights = draw_blocks(len(before), seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        losses = 1.0 - (weights @ after) / (weights @ before)
    low, high = np.quantile(losses[np.isfinite(losses)], _LEVELS)
    return Figure(float(1.0 - after.sum() / before.sum()), float(low), float(high), len(before))
