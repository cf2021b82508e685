"""The vectors of a shard set as a stream that can be read again: from memory where they fit, else from the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from common.columns import read_vectors
from common.config import UserError
from common.shards import Shard, ShardSet


@dataclass(frozen=True)
class VectorStream:
    """Calling it starts one pass over the usable vectors: [b, d] float32 batches in the order of rows."""

    read: Callable[[], Iterator[np.ndarray]]
    n_rows: int  # rows of one pass
    kept: tuple[np.ndarray, ...] | None  # one [n, d] matrix a shard, where all fit in memory

    def __call__(self) -> Iterator[np.ndarray]:
        """Start one pass."""
        return iter(self.kept) if self.kept is not None else self.read()

    def in_memory(self) -> np.ndarray:
        """All vectors as one [n, d] float32 matrix, whatever its size."""
        return np.concatenate(list(self()))

    def sample(self, n_rows: int, *, seed: int) -> VectorStream:
        """At most `n_rows` rows, drawn evenly and kept in memory."""
        from common.kmeans import sample_rows

        if n_rows >= self.n_rows:
            return self
        drawn = sample_rows(self, n_rows=n_rows, rng=np.random.default_rng(seed))
        return VectorStream(self.read, len(drawn), (drawn,))


def open_stream(shards: ShardSet, column: str, *, memory_limit_gb: float) -> VectorStream:
    """Count the usable vectors in one pass and keep them if they fit in `memory_limit_gb`.

    Raises UserError where a shard holds no vectors in `column`, or vectors of another length.
    """
    kept: list[np.ndarray] | None = []
    n_rows = n_bytes = 0
    dimension: int | None = None
    for shard in shards.shards:
        batches = []
        for vectors in read_usable(shard, column, dimension=dimension):
            dimension = vectors.shape[1] or dimension
            n_rows += len(vectors)
            n_bytes += vectors.nbytes
            kept = kept if n_bytes <= memory_limit_gb * 2**30 else None
            batches += [vectors] if kept is not None and len(vectors) else []
        if kept is not None and batches:
            kept.append(np.concatenate(batches))
    if n_rows == 0:
        raise UserError(f"no row of {shards.folder} has a usable vector in {column!r}; its `error` column says why")
    read = partial(_read_all, shards.shards, column, dimension)
    return VectorStream(read, n_rows, tuple(kept) if kept is not None else None)


def read_usable(shard: Shard, column: str, *, dimension: int | None = None) -> Iterator[np.ndarray]:
    """Yield the usable vectors of one shard, [b, d] float32 at a time."""
    for table in shard.iter_tables([column]):
        read = read_vectors(table[column], where=f"{shard.path}, column {column!r}", dimension=dimension)
        yield read.vectors if read.valid.all() else read.vectors[read.valid]


def _read_all(shards: tuple[Shard, ...], column: str, dimension: int | None) -> Iterator[np.ndarray]:
    for shard in shards:
        yield from read_usable(shard, column, dimension=dimension)
