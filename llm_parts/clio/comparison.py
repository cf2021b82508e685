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
_PAIRS_AT_ONCE = 4_000_000


def compare_hierarchies(
    hierarchies: Sequence[Hierarchy],
    *,
    base_labels: np.ndarray,
    true_labels: Sequence[Any] | None,
    distances: np.ndarray | None,
    votes: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """One row for each level of each hierarchy, level 1 the top; None where a score could not be computed.

    `base_labels` [n] are the base clusters of the conversations (negative: none), `true_labels` [n] what they are
    labelled with. `distances` [n_base, n_base] are those of the base clusters' centroids. `votes` tells of each kind
    the share of a judge's votes that it got. cophenetic_correlation, judge_vote, calls and cost are of the whole
    hierarchy and stand in each of its rows. More clusters are purer: compare purities of levels of like size, or NMI.
    """
    n_base = _count_base(hierarchies, base_labels, distances)
    rows = []
    for hierarchy in hierarchies:
        paths = base_paths(hierarchy, n_base=n_base)  # [n_levels, n_base]
        shared = {
            "cophenetic_correlation": cophenetic_correlation(paths, distances) if distances is not None else None,
            "judge_vote": (votes or {}).get(hierarchy.kind),
            "calls": hierarchy.calls,
            "cost": None if math.isnan(hierarchy.cost) else hierarchy.cost,
        }
        for depth, numbers in enumerate(paths, start=1):
            scores = _level_scores(numbers, base_labels, true_labels)
            rows.append({"hierarchy": hierarchy.kind, "level": depth, **scores, **shared})
    return [{name: row[name] for name in COLUMNS} for row in rows]


def cophenetic_correlation(paths: np.ndarray, distances: np.ndarray) -> float | None:
    """Pearson's correlation of how high two base clusters meet with how far apart they are; None where one is constant.

    Two clusters meet one step higher for each level that parts them: `paths` [n_levels, n_base] as `base_paths` gives.
    Source: R. R. Sokal, F. J. Rohlf, The comparison of dendrograms by objective methods, Taxon 11 (1962).
    """
    n_base = paths.shape[1]
    sums = np.zeros(6)  # pairs, x, y, xx, yy, xy
    n_rows = max(1, _PAIRS_AT_ONCE // max(1, n_base))
    for start in range(0, n_base, n_rows):
        rows = np.arange(start, min(n_base, start + n_rows))
        heights = (paths[:, rows, None] != paths[:, None, :]).sum(axis=0, dtype=np.float64)  # [rows, n_base]
        above = rows[:, None] < np.arange(n_base)[None]
        x, y = heights[above], np.asarray(distances[rows], dtype=np.float64)[above]
        sums += [len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y]
    n, sum_x, sum_y, sum_xx, sum_yy, sum_xy = sums.tolist()
    spread = (n * sum_xx - sum_x**2) * (n * sum_yy - sum_y**2)
    return (n * sum_xy - sum_x * sum_y) / math.sqrt(spread) if n and spread > 1e-12 * n**4 else None


def placements(hierarchy: Hierarchy, base_names: Sequence[ClusterName]) -> list[str]:
    """Where each base cluster stands, in words, for a judge: `Payments > Card payments`."""
    names = level_names(hierarchy, list(base_names))
    paths = base_paths(hierarchy, n_base=len(base_names))
    return [
        " > ".join(level[number].name for level, number in zip(names, path, strict=True)) for path in paths.T.tolist()
    ]


def _count_base(hierarchies: Sequence[Hierarchy], base_labels: np.ndarray, distances: np.ndarray | None) -> int:
    known = [len(hierarchy.levels[-1].parent_of) for hierarchy in hierarchies if hierarchy.levels]
    known += [len(distances)] if distances is not None else []
    if len(set(known)) > 1:
        raise ValueError(f"hierarchies and distances are of different base clusters: {sorted(set(known))}")
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
