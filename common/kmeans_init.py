"""Where k-means starts: a uniform sample of a stream, and greedy k-means++ on it at large k."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np

from common.kmeans_steps import LONG_STEP, TILE_SCORES, ClusterSums, assign, partial_sums, update_centroids

Batches = Callable[[], Iterable[np.ndarray]]  # one call starts one pass: [b, d] float32 blocks in a fixed order

POOL_DISTANCES = 1 << 24  # 64 MB of float32 distances from candidate seeds to sample rows
POOL_CANDIDATES = 1024
FIRST_ROWS_PER_CLUSTER = 32  # a warm start seeds on so many rows a cluster, and on FIRST_ROWS at least
FIRST_ROWS = 16_384
SETTLED = 2e-3  # Lloyd on a sample stops when a pass lowers inertia by less of itself
SETTLE_PASSES, RELOCATE_PASSES = 12, 5
RELOCATED_SHARE = 0.1  # of the clusters, at most, in one round


# ---- streams -------------------------------------------------------------------------------------------------------


def fixed_blocks(batches: Iterable[np.ndarray], *, n_rows: int) -> Iterator[np.ndarray]:
    """Cut a stream into blocks of exactly `n_rows` rows (the last may be shorter), however it arrives."""
    held: list[np.ndarray] = []
    n_held = 0
    for batch in batches:
        start = 0
        while n_held + len(batch) - start >= n_rows:
            stop = start + n_rows - n_held
            yield np.concatenate([*held, batch[start:stop]]) if held else batch[start:stop]
            held, n_held, start = [], 0, stop
        if start < len(batch):
            held.append(np.array(batch[start:]))  # a copy: the stream may use its buffer again
            n_held += len(batch) - start
    if n_held:
        yield np.concatenate(held)


def sample_rows(batches: Batches, *, n_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `n_rows` rows uniformly without replacement in one pass, holding at most three times as many.

    Every row gets a random key and the smallest keys stay, so the result depends on the seed and on the order of the
    rows, not on how they are cut into batches. Rows come back in random order: a prefix is a uniform sample too.
    With fewer rows in the stream, all of them come back.
    """
    kept_rows: list[np.ndarray] = []
    kept_keys: list[np.ndarray] = []
    n_kept, limit = 0, np.inf
    for batch in batches():
        keys = rng.random(len(batch))
        below = np.flatnonzero(keys < limit)
        kept_rows.append(np.asarray(batch[below], np.float32))
        kept_keys.append(keys[below])
        n_kept += len(below)
        if n_kept > 2 * n_rows:
            rows, keys = _smallest_keys(kept_rows, kept_keys, n_rows)
            kept_rows, kept_keys, n_kept, limit = [rows], [keys], len(keys), keys[-1]
    if not kept_rows:
        raise ValueError("no rows to sample from: the stream is empty")
    return _smallest_keys(kept_rows, kept_keys, n_rows)[0]


def _smallest_keys(rows: list[np.ndarray], keys: list[np.ndarray], n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    all_keys = np.concatenate(keys)
    order = np.argsort(all_keys, kind="stable")[:n_rows]
    return np.concatenate(rows)[order], all_keys[order]


# ---- seeds ---------------------------------------------------------------------------------------------------------


def kmeans_plus_plus(
    sample: np.ndarray,
    *,
    n_clusters: int,
    rng: np.random.Generator,
    initial: np.ndarray | None = None,
    n_trials: int | None = None,
) -> np.ndarray:
    """Seed by greedy k-means++: of `n_trials` rows drawn by squared distance, take the one that lowers inertia most.

    sample [n, d] -> centroids [n_clusters, d] float32. `initial` [j, d] are centroids that stay, so that only the rest
    is drawn. The draws are those of Arthur & Vassilvitskii 2007 with the trials of scikit-learn (2 + log k), but the
    candidates of many steps come from one pool, whose distances are one matrix product: a candidate drawn under older
    distances D is kept with probability (D now / D then), which leaves its distribution exact.

    Raises ValueError when the sample has fewer rows than `n_clusters`.
    """
    if len(sample) < n_clusters:
        raise ValueError(f"{n_clusters} clusters need at least as many rows, and there are {len(sample)}")
    n_trials = n_trials or 2 + int(np.log(n_clusters))
    rows = np.ascontiguousarray(sample, np.float32)
    if initial is None:
        chosen = rows[[rng.integers(len(rows))]]
    else:
        chosen = np.asarray(initial, np.float32)[:n_clusters]
    seeds = np.empty((n_clusters, rows.shape[1]), np.float32)
    seeds[: len(chosen)] = chosen
    closest = assign(rows, chosen)[1]  # [n] squared distance to the nearest seed so far
    n_seeds = len(chosen)
    while n_seeds < n_clusters:
        if not closest.any():  # fewer different rows than clusters: the rest can only be copies
            seeds[n_seeds:] = rows[rng.integers(len(rows), size=n_clusters - n_seeds)]
            break
        picked, closest = _seeds_from_pool(
            rows, closest, n_wanted=n_clusters - n_seeds, n_trials=n_trials, n_seeds=n_seeds, rng=rng
        )
        seeds[n_seeds : n_seeds + len(picked)] = rows[picked]
        n_seeds += len(picked)
    return seeds


def _seeds_from_pool(
    rows: np.ndarray, closest: np.ndarray, *, n_wanted: int, n_trials: int, n_seeds: int, rng: np.random.Generator
) -> tuple[list[int], np.ndarray]:
    """Draw one pool of candidates and take seeds from it, greedily, until it runs out."""
    n_pool = min(POOL_CANDIDATES, max(1, POOL_DISTANCES // len(rows)), n_trials * min(n_wanted, 1 + n_seeds // 4))
    pool = _draw_by_distance(closest, n_drawn=max(n_pool, n_trials), rng=rng)  # row indices
    accept_below = closest[pool] * rng.random(len(pool))  # accepted when D now / D then > u
    distances = _squared_distances(rows[pool], rows)  # [pool, n]
    trials = np.empty((n_trials, len(rows)), np.float32)
    picked: list[int] = []
    n_used = 0
    while len(picked) < n_wanted:
        alive = n_used + np.flatnonzero(closest[pool[n_used:]] > accept_below[n_used:])[:n_trials]
        if len(alive) < n_trials and picked:
            break
        if not len(alive):  # rounding alone left no candidate: the first draw was a fair one
            alive = np.array([0])
        lowered = trials[: len(alive)]
        for trial, candidate in enumerate(alive):
            np.minimum(distances[candidate], closest, out=lowered[trial])
        best = int(lowered.sum(axis=1).argmin())
        closest = lowered[best].copy()
        picked.append(int(pool[alive[best]]))
        n_used = int(alive[-1]) + 1
    return picked, closest


def _draw_by_distance(closest: np.ndarray, *, n_drawn: int, rng: np.random.Generator) -> np.ndarray:
    cumulative = np.cumsum(closest, dtype=np.float64)
    drawn = np.searchsorted(cumulative, rng.random(n_drawn) * cumulative[-1], side="right")
    return np.minimum(drawn, len(closest) - 1)


def _squared_distances(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Squared distances [m, n] in float32 by one matrix product, about the mean of the points."""
    origin = points.mean(axis=0)
    points, rows = points - origin, rows - origin
    distances = points @ (rows.T * np.float32(-2))
    distances += np.einsum("ij,ij->i", points, points)[:, None]
    distances += np.einsum("ij,ij->i", rows, rows)
    return np.maximum(distances, 0, out=distances)


# ---- warm start ----------------------------------------------------------------------------------------------------


def warm_start(
    sample: np.ndarray,
    *,
    n_clusters: int,
    rng: np.random.Generator,
    n_relocations: int = 4,
    spherical: bool = False,
    report: Callable[[str], None] | None = None,
    **settings: Any,
) -> np.ndarray:
    """Find centroids [k, d] float32 near a good optimum on a sample [n, d] in random order, before any full pass.

    k-means++ and Lloyd on a prefix of 32 rows a cluster; then rounds that merge the cheapest pairs of clusters and
    seed the freed centroids again by squared distance, each kept if inertia fell (Lloyd alone never moves a centroid
    from a crowded region to an empty one); then Lloyd on prefixes that double up to the whole sample. `settings` are
    those of `partial_sums`.
    """
    settle = partial(_settle, spherical=spherical, settings=settings)
    n_rows = min(len(sample), max(FIRST_ROWS, FIRST_ROWS_PER_CLUSTER * n_clusters))
    rows = sample[:n_rows]
    centroids, sums = settle(rows, kmeans_plus_plus(rows, n_clusters=n_clusters, rng=rng), n_passes=SETTLE_PASSES)
    for _ in range(n_relocations if n_clusters > 1 else 0):
        relocated = _relocate(rows, centroids, sums.counts, rng=rng)
        moved, moved_sums = settle(rows, relocated, n_passes=RELOCATE_PASSES)
        if moved_sums.inertia < sums.inertia:
            centroids, sums = moved, moved_sums
    while True:
        if report:
            report(f"warm start on {n_rows} rows: inertia {sums.inertia / n_rows:.6g} a row")
        if n_rows == len(sample):
            return centroids
        n_rows = min(len(sample), 2 * n_rows)
        centroids, sums = settle(sample[:n_rows], centroids, n_passes=SETTLE_PASSES)


def _settle(
    rows: np.ndarray, centroids: np.ndarray, *, n_passes: int, spherical: bool, settings: dict[str, Any]
) -> tuple[np.ndarray, ClusterSums]:
    """Run Lloyd in memory until inertia hardly falls; the sums that come back are those of the last step."""
    previous = np.inf
    for n_left in range(n_passes, 0, -1):
        sums = partial_sums(rows, centroids, spherical=spherical, **settings)
        last = n_left == 1 or previous - sums.inertia <= SETTLED * sums.inertia
        centroids = update_centroids(sums, centroids, spherical=spherical, step=1.0 if last else LONG_STEP)
        if last:
            break
        previous = sums.inertia
    return centroids, sums


def _relocate(rows: np.ndarray, centroids: np.ndarray, counts: np.ndarray, *, rng: np.random.Generator) -> np.ndarray:
    """Merge the cheapest pairs, no cluster in two of them, and seed the freed centroids again on the rows."""
    costs, partners = _cheapest_merges(centroids, counts)
    merged, paired, freed = centroids.astype(np.float64), set[int](), list[int]()
    for cluster in np.argsort(costs, kind="stable"):
        partner = partners[cluster]
        if len(freed) >= max(1, int(RELOCATED_SHARE * len(centroids))):
            break
        if paired.isdisjoint((cluster, partner)):
            weight = counts[cluster] / max(1, counts[cluster] + counts[partner])
            merged[partner] += weight * (merged[cluster] - merged[partner])
            paired.update((cluster, partner))
            freed.append(cluster)
    kept = np.delete(merged, freed, axis=0).astype(np.float32)
    return kmeans_plus_plus(rows, n_clusters=len(centroids), rng=rng, initial=kept)


def _cheapest_merges(centroids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cost [k] and partner [k] of each cluster's cheapest merge: n m / (n + m) |a - b|^2 of inertia (Ward 1963)."""
    n_clusters = len(centroids)
    costs, partners = np.empty(n_clusters, np.float32), np.empty(n_clusters, np.int64)
    sizes = counts.astype(np.float32)
    block = max(1, TILE_SCORES // n_clusters)
    for start in range(0, n_clusters, block):
        own = np.arange(start, min(start + block, n_clusters))
        added = _squared_distances(centroids[own], centroids)
        added *= sizes[own, None] * sizes / np.maximum(sizes[own, None] + sizes, 1)
        added[np.arange(len(own)), own] = np.inf
        partners[own] = added.argmin(axis=1)
        costs[own] = added.min(axis=1)
    return costs, partners
