"""Which rows of a clustering are sure enough to learn from, and how they come together in batches.

Rows that lie much nearer to their own centroid than to any other are taken as sure. Two of one cluster are a pair that
belongs together; two of different clusters are one that does not, unless their clusters are next to each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from common.config import UserError
from common.grouping import cluster_members
from llm_parts.clio.base_clusters import BaseClusters
from llm_parts.clio.nearby import nearest_others
from llm_parts.clio.vector_settings import SelfTrainingSettings

# Clusters nearest to each that are never in a batch with it.
N_RIVALS = 3
# Clusters around each, one of which is the nearest other one of its rows.
N_AROUND = 64


def choose_held_out(texts: Sequence[str], *, share: float, seed: int) -> np.ndarray:
    """Which rows are held out, [n] bool: a share of the different texts, so that no text is on both sides."""
    unique = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    chosen = np.random.default_rng((seed, 1)).permutation(len(unique)) < round(share * len(unique))
    return chosen[[unique[text] for text in texts]] if len(texts) else np.zeros(0, bool)


def confident_rows(
    vectors: np.ndarray,
    base: BaseClusters,
    texts: Sequence[str],
    *,
    without: np.ndarray,
    options: SelfTrainingSettings,
    seed: int = 0,
) -> dict[int, np.ndarray]:
    """The surest rows of each cluster, by falling margin: cosine to its own centroid less that to the nearest other.

    Equal texts count once, rows marked in `without` [n] never; clusters with fewer than two such rows are left out.
    Raises UserError where fewer than two clusters are left: there is nothing to tell apart.
    """
    margins = _margins(vectors, base)
    firsts = np.zeros(len(texts), bool)
    firsts[list({text: row for row, text in reversed(list(enumerate(texts)))}.values())] = True
    usable = np.where(firsts & ~without & vectors.any(axis=1), base.labels, -1)
    groups: dict[int, np.ndarray] = {}
    for cluster, rows in cluster_members(usable, base.n_clusters):
        n_sure = max(2, round(options.confident_share * len(rows)))
        if len(rows) >= 2:
            groups[cluster] = rows[np.argsort(-margins[rows], kind="stable")[:n_sure]]
    groups = _thinned(groups, max_rows=options.max_rows, seed=seed)
    if len(groups) < 2:
        raise UserError(
            f"clio.self_training: {len(groups)} of {base.n_clusters} clusters have two different rows to learn from, "
            "and two such clusters are needed; raise clio.n_clusters, or set clio.self_training.enabled: false"
        )
    return groups


def rivals(centroids: np.ndarray, *, n: int = N_RIVALS) -> list[set[int]]:
    """For each cluster [k] those that are too near to it to be told apart for sure, or that it is too near to.

    With few clusters fewer are rivals, so that each has one to be told from.
    """
    k = len(centroids)
    near: list[set[int]] = [set() for _ in range(k)]
    for cluster, others in enumerate(nearest_others(centroids, min(n, max(0, (k - 2) // 2))).tolist()):
        near[cluster].update(others)
        for other in others:
            near[other].add(cluster)
    return near


def _margins(vectors: np.ndarray, base: BaseClusters) -> np.ndarray:
    """[n] float32: how much nearer a row is to its own centroid than to the nearest other; noise is -inf.

    The nearest other is one of those around its own, so that time does not grow with rows times clusters.
    """
    margins = np.full(len(vectors), -np.inf, np.float32)
    around = nearest_others(base.centroids, N_AROUND)
    for cluster, rows in cluster_members(base.labels, base.n_clusters):
        others = vectors[rows] @ base.centroids[around[cluster]].T
        margins[rows] = vectors[rows] @ base.centroids[cluster] - others.max(axis=1, initial=-1.0)
    return margins


def _thinned(groups: dict[int, np.ndarray], *, max_rows: int, seed: int) -> dict[int, np.ndarray]:
    """The groups with a like share of their rows at random, `max_rows` or little more in all, two rows at least.

    Of more groups than have place for two rows each, some are taken at random: batches go with what is learnt from.
    """
    total = sum(len(rows) for rows in groups.values())
    if total <= max_rows:
        return groups
    rng = np.random.default_rng((seed, 2))
    if 2 * len(groups) > max_rows:
        taken = rng.choice(list(groups), max_rows // 2, replace=False).tolist()
        groups = {cluster: groups[cluster] for cluster in sorted(taken)}
        total = sum(len(rows) for rows in groups.values())
    return {
        cluster: np.sort(rng.choice(rows, max(2, len(rows) * max_rows // total), replace=False))
        for cluster, rows in groups.items()
    }


def batches(
    groups: dict[int, np.ndarray], near: Sequence[set[int]], *, options: SelfTrainingSettings, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and clusters of each batch: so many clusters that are no rivals, so many rows of each."""
    rng = np.random.default_rng((seed, 3))
    clusters = np.array(sorted(groups))
    sizes = np.array([len(groups[cluster]) for cluster in clusters], float)
    for _ in range(count_steps(groups, options=options)):
        order = rng.choice(clusters, len(clusters), replace=False, p=sizes / sizes.sum())
        picked: list[int] = []
        for cluster in order:
            if near[cluster].isdisjoint(picked):
                picked.append(int(cluster))
            if len(picked) == options.clusters_per_batch:
                break
        drawn = [_some(groups[cluster], options.rows_per_cluster, rng) for cluster in picked]
        yield np.concatenate(drawn), np.repeat(picked, [len(rows) for rows in drawn])


def count_steps(groups: dict[int, np.ndarray], *, options: SelfTrainingSettings) -> int:
    """Optimizer steps in which as many rows are seen as the epochs have."""
    n_rows = sum(len(rows) for rows in groups.values())
    per_batch = min(options.clusters_per_batch, len(groups)) * options.rows_per_cluster
    return options.epochs * max(1, -(-n_rows // per_batch))


def _some(rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return rows if len(rows) <= n else rng.choice(rows, n, replace=False)
