"""Lloyd passes over shards by map and reduce: sums of each shard wherever the engine says, added in their order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from common.config import EngineSettings
from common.engine import map_items
from common.shards import Shard, ShardSet
from common.vector_stream import VectorStream, read_usable

if TYPE_CHECKING:
    import numpy as np

    from common.kmeans import ClusterSums, KMeansResult

log = logging.getLogger(__name__)


def lloyd_over_shards(
    start: np.ndarray,
    stream: VectorStream,
    shards: ShardSet,
    engine: EngineSettings,
    *,
    column: str,
    max_passes: int,
    tol: float,
    map_settings: dict[str, Any],
) -> KMeansResult:
    """Move centroids `start` [k, d] by at most `max_passes` full passes; `map_settings` are those of `partial_sums`.

    Vectors that `stream` keeps in memory are summed here; others are read again by the engine in every pass. Both add
    up shard by shard, so both give the same bytes.
    """
    from common import kmeans

    def one_pass(centroids: np.ndarray, **changed: Any) -> ClusterSums:
        settings = {**map_settings, **changed}
        if stream.kept is not None:
            parts = [kmeans.stream_sums(centroids, batches=partial(iter, [part]), **settings) for part in stream.kept]
        else:
            task = partial(shard_sums, column=column, centroids=centroids, settings=settings)
            parts = [part for part in map_items(task, shards.shards, engine) if part is not None]
        total, *others = parts
        for part in others:
            total = total.merge(part)
        return total

    return kmeans.lloyd_passes(
        start,
        one_pass=one_pass,
        measure=partial(one_pass, precision="float32"),
        max_epochs=max_passes,
        tol=tol,
        spherical=map_settings["spherical"],
        report=log.info,
    )


def shard_sums(shard: Shard, *, column: str, centroids: np.ndarray, settings: dict[str, Any]) -> ClusterSums | None:
    """The map of one pass over one shard; None where no row of it has a vector."""
    from common import kmeans

    batches = partial(_batches, shard, column, centroids.shape[1])
    if next(batches(), None) is None:
        return None
    return kmeans.stream_sums(centroids, batches=batches, **settings)


def _batches(shard: Shard, column: str, dimension: int) -> Iterator[np.ndarray]:
    return (vectors for vectors in read_usable(shard, column, dimension=dimension) if len(vectors))
