"""Scores: accuracy and macro-F1 of the head, and what a search among reference vectors finds.

Recall@K is the hit rate, as the metric-learning literature has it: the share of queries with at least one row of their
label among the K nearest. A reference row with the text of the query is never among them, the query itself included.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from metric_parts.bank import Reference
from metric_parts.labels import NO_CLASS

log = logging.getLogger(__name__)

_QUERIES_AT_ONCE = 512


@dataclass(frozen=True)
class Queries:
    """Rows whose neighbours are asked for."""

    vectors: np.ndarray  # [q, d] float32
    codes: np.ndarray  # [q] int64; NO_CLASS for a label that training does not have
    text_keys: np.ndarray  # [q] int64


@dataclass(frozen=True)
class Hits:
    """The nearest reference rows of each query, nearest first; NO_CLASS and weight 0 where there are no more."""

    codes: np.ndarray  # [q, k] int64
    weights: np.ndarray  # [q, k] float64: 1 + cosine, or 1 / (1 + distance)


def classification_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy, and macro-F1 over the classes that occur in `truth`; NaN where there are no rows."""
    from sklearn.metrics import f1_score

    if not len(truth):
        return {"acc": float("nan"), "f1": float("nan")}
    present = np.unique(truth)
    macro = f1_score(truth, predicted, labels=present, average="macro", zero_division=0)
    return {"acc": float(np.mean(truth == predicted)), "f1": float(macro)}


def search(queries: Queries, reference: Reference, *, k: int, distance: Literal["cos", "l2"]) -> Hits:
    """Find the `k` nearest reference rows of each query, those with the query's own text left out."""
    k = min(k, len(reference.rows))
    codes = np.full((len(queries.codes), k), NO_CLASS, np.int64)
    weights = np.zeros((len(queries.codes), k))
    candidates = _prepare(reference.vectors, distance)
    asked = _prepare(queries.vectors, distance)
    for start in range(0, len(asked), _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        near = _nearness(asked[part], candidates, distance)  # [b, n], larger is nearer
        near[queries.text_keys[part, None] == reference.text_keys[None, :]] = -np.inf
        order = np.argsort(-near, axis=1, kind="stable")[:, :k]
        values = np.take_along_axis(near, order, axis=1)
        found = np.isfinite(values)
        codes[part] = np.where(found, reference.codes[order], NO_CLASS)
        shown = np.where(found, values, 0.0)
        weights[part] = np.where(found, 1.0 + shown if distance == "cos" else 1.0 / (1.0 - shown), 0.0)
    return Hits(codes, weights)


def _prepare(vectors: np.ndarray, distance: str) -> np.ndarray:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12) if distance == "cos" else wide


def _nearness(asked: np.ndarray, candidates: np.ndarray, distance: str) -> np.ndarray:
    products = asked @ candidates.T
    if distance == "cos":
        return products
    squares = np.sum(asked**2, axis=1)[:, None] + np.sum(candidates**2, axis=1)[None, :] - 2 * products
    return -np.sqrt(np.maximum(squares, 0.0))


def vote(hits: Hits) -> np.ndarray:
    """The label of each query by its neighbours, weighted by nearness; of equal sums the one with the nearest row."""
    same = hits.codes[:, :, None] == hits.codes[:, None, :]  # [q, k, k]
    sums = np.sum(same * hits.weights[:, None, :], axis=2)  # [q, k]: what the label of each neighbour has in all
    sums[hits.codes == NO_CLASS] = -1.0
    # Sums of the same weights in another order may differ in the last digit, which must not decide.
    best = np.argmax(np.round(sums, 12), axis=1)
    return np.take_along_axis(hits.codes, best[:, None], axis=1)[:, 0]


def recall_at(hits: Hits, codes: np.ndarray, *, k: int) -> float:
    """Share of queries with a row of their label among the first `k`; NaN where there are no queries."""
    if not len(codes):
        return float("nan")
    known = codes != NO_CLASS
    return float(np.mean((hits.codes[:, :k] == codes[:, None]).any(axis=1) & known))


def retrieval_scores(
    queries: Queries, reference: Reference, *, recall_at_k: Sequence[int], knn_k: int, distance: Literal["cos", "l2"]
) -> dict[str, float]:
    """Recall at each K, and accuracy and macro-F1 of the k-NN vote; a label that the reference lacks is missed."""
    hits = search(queries, reference, k=max(*recall_at_k, knn_k), distance=distance)
    n_found = hits.codes.shape[1]
    if n_found < max(*recall_at_k, knn_k):
        log.warning("K is larger than the %d vectors to search among; all of them are used", n_found)
    scores = {f"recall@{k}": recall_at(hits, queries.codes, k=k) for k in recall_at_k}
    voted = vote(Hits(hits.codes[:, :knn_k], hits.weights[:, :knn_k]))
    knn = classification_scores(queries.codes, voted)
    covered = np.isin(queries.codes, reference.codes)
    return {**scores, "knn_acc": knn["acc"], "knn_f1": knn["f1"], "covered": float(np.mean(covered))}


def is_better(value: float, best: float | None, *, by: str) -> bool:
    """Whether a validation metric beats the best one so far; NaN never does."""
    if not np.isfinite(value):
        return False
    return best is None or (value < best if by == "loss" else value > best)
