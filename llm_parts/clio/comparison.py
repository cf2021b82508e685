"""Two hierarchies over the same base clusters, side by side: by labels, by distances, by a judge, by what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_parts.clio.taxonomy import ClusterName, Hierarchy, base_paths, level_names

COMPARISON_TITLE = "The two hierarchies compared"
COLUMNS = (
    *("hierarchy", "level", "n_clusters", "largest_share", "label_purity", "label_nmi"),
    *("cophenetic_correlation", "judge_vote", "calls", "cost"),
)
# Base clusters up to which all pairs are compared, random pairs of more, and how many are held at once.
_MAX_CLUSTERS, _N_PAIRS, _PAIRS_AT_ONCE = 2048, 1 << 20, 1 << 14


def compare_hierarchies(
    hierarchies: Sequence[Hierarchy],
    *,
    base_labels: np.ndarray,
    true_labels: Sequence[Any] | None,
    centroids: np.ndarray | None,
    votes: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """One row for each level of each hierarchy, level 1 the top; None where a score could not be computed.

    `base_labels` [n] are the base clusters of the conversations (negative: none), `true_labels` [n] what they are
    labelled with. `centroids` [n_base, d] are those of the base clusters, of unit length. `votes` tells of each kind
    the share of a judge's votes that it got. cophenetic_correlation, judge_vote, calls and cost are of the whole
    hierarchy and stand in each of its rows. More clusters are purer: compare purities of levels of like size, or NMI.
    """
    n_base = _count_base(hierarchies, base_labels, centroids)
    rows = []
    for hierarchy in hierarchies:
        paths = base_paths(hierarchy, n_base=n_base)  # [n_levels, n_base]
        shared = {
            "cophenetic_correlation": cophenetic_correlation(paths, centroids) if centroids is not None else None,
            "judge_vote": (votes or {}).get(hierarchy.kind),
            "calls": hierarchy.calls,
            "cost": None if math.isnan(hierarchy.cost) else hierarchy.cost,
        }
        for depth, numbers in enumerate(paths, start=1):
            scores = _level_scores(numbers, base_labels, true_labels)
            rows.append({"hierarchy": hierarchy.kind, "level": depth, **scores, **shared})
    return [{name: row[name] for name in COLUMNS} for row in rows]


def cophenetic_correlation(paths: np.ndarray, centroids: np.ndarray) -> float | None:
    """Pearson's correlation of how high two base clusters meet with how far apart they are; None where one is constant.

    Two clusters meet one step higher for each level that parts them: `paths` [n_levels, n_base] as `base_paths` gives.
    They are as far apart as their `centroids` [n_base, d] by cosine. Of more than 2,048 base clusters a million random
    pairs are asked. Source: R. R. Sokal, F. J. Rohlf, The comparison of dendrograms by objective methods, Taxon 11
    (1962).
    """
    n_base = paths.shape[1]
    if n_base < 2:
        return None
    is_small = n_base <= _MAX_CLUSTERS
    first, second = np.triu_indices(n_base, 1) if is_small else _random_pairs(n_base)
    heights = sum((level[first] != level[second]).astype(np.float64) for level in paths)  # [pairs]
    distances = np.empty(len(first))
    for start in range(0, len(first), _PAIRS_AT_ONCE):
        pairs = slice(start, start + _PAIRS_AT_ONCE)
        distances[pairs] = 1.0 - np.vecdot(centroids[first[pairs]], centroids[second[pairs]])
    if heights.var() * distances.var() <= 1e-12:
        return None
    return float(np.corrcoef(heights, distances)[0, 1])


def _random_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of different numbers below n, each as likely as any other."""
    rng = np.random.default_rng(0)
    first = rng.integers(n, size=_N_PAIRS)
    return first, (first + rng.integers(1, n, size=_N_PAIRS)) % n


def placements(hierarchy: Hierarchy, base_names: Sequence[ClusterName]) -> list[str]:
    """Where each base cluster stands, in words, for a judge: `Payments > Card payments`."""
    names = level_names(hierarchy, list(base_names))
    paths = base_paths(hierarchy, n_base=len(base_names))
    return [
        " > ".join(level[number].name for level, number in zip(names, path, strict=True)) for path in paths.T.tolist()
    ]


def _count_base(hierarchies: Sequence[Hierarchy], base_labels: np.ndarray, centroids: np.ndarray | None) -> int:
    known = [len(hierarchy.levels[-1].parent_of) for hierarchy in hierarchies if hierarchy.levels]
    known += [len(centroids)] if centroids is not None else []
    if len(set(known)) > 1:
        raise ValueError(f"hierarchies and centroids are of different base clusters: {sorted(set(known))}")
    return known[0] if known else int(base_labels.max(initial=-1)) + 1


def _level_scores(numbers: np.ndarray, base_labels: np.ndarray, true_labels: Sequence[Any] | None) -> dict[str, Any]:
    """Scores of one level, from the number of each base cluster's ancestor there."""
    from common.quality import Contingency

    clusters = np.where(base_labels >= 0, numbers[base_labels], -1) if len(numbers) else np.full(len(base_labels), -1)
    counts = np.bincount(clusters[clusters >= 0])
    scores: dict[str, Any] = {
        "n_clusters": len(np.unique(numbers)),
        "largest_share": float(counts.max() / counts.sum()) if len(counts) else None,
        "label_purity": None,
        "label_nmi": None,
    }
    if true_labels is not None:
        table = Contingency()
        table.update(clusters, list(true_labels))
        agreement = table.agreement()
        for name, score in (("label_purity", agreement.purity), ("label_nmi", agreement.nmi)):
            scores[name] = None if math.isnan(score) else score
    return scores
