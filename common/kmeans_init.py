"""Where k-means starts: a uniform sample of a stream, and greedy k-means++ on it at large k."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from common.kmeans_steps import assign, partial_sums, update_centroids

Batches = Callable[[], Iterable[np.ndarray]]  # one call starts one pass: [b, d] float32 blocks in a fixed order

POOL_DISTANCES = 1 << 24  # 64 MB of float32 distances from candidate seeds to sample rows
POOL_CANDIDATES = 1024


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
        if not len(alive):  # every draw fell on a row with u = 0 or a rounding to zero: take the first as it is
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


def warm_start(
    sample: np.ndarray,
    *,
    n_clusters: int,
    rng: np.random.Generator,
    report: Callable[[str], None],
    spherical: bool = False,
    **settings: Any,
) -> np.ndarray:
    """Converge on growing prefixes of a sample in random order: [k, d] float32 centroids near a good optimum."""
    n_rows = min(len(sample), 32 * n_clusters)
    centroids = kmeans_plus_plus(sample[:n_rows], n_clusters=n_clusters, rng=rng)
    while True:
        previous = np.inf
        for _ in range(20):
            sums = partial_sums(sample[:n_rows], centroids, spherical=spherical, **settings)
            centroids = update_centroids(sums, centroids, spherical=spherical)
            if previous - sums.inertia < 1e-3 * sums.inertia:
                break
            previous = sums.inertia
        report(f"warm start on {n_rows} rows: inertia {sums.inertia / n_rows:.6g} a row")
        if n_rows == len(sample):
            return centroids
        n_rows = min(len(sample), 2 * n_rows)
