"""A look into clusters: the texts nearest to each centroid, and an even sample of rows for a map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.columns import has_text, is_vector, label_strings, number_array, read_ids, read_numbers, read_vectors
from common.shards import Shard

if TYPE_CHECKING:
    import pyarrow as pa

_EXAMPLE_CHARACTERS = 300


@dataclass(frozen=True)
class ClusterSamples:
    """Example texts by cluster, nearest first, and the rows of the map."""

    examples: dict[int, list[tuple[float, str]]]  # cluster id -> (distance, text)
    vectors: np.ndarray  # [m, d] float32
    cluster_ids: np.ndarray  # [m] int64
    captions: list[str]  # [m] text and label

    @classmethod
    def empty(cls) -> ClusterSamples:
        """Samples of no rows."""
        return cls({}, np.zeros((0, 0), np.float32), np.zeros(0, np.int64), [])

    def farthest(self, cluster_ids: np.ndarray, *, n_examples: int) -> np.ndarray:
        """[n] distance of the last example of each row's cluster; infinite where another one has a place."""
        full = sorted((i, texts[-1][0]) for i, texts in self.examples.items() if len(texts) == n_examples)
        ids = np.array([cluster_id for cluster_id, _ in full], np.int64)
        limits = np.array([distance for _, distance in full] + [np.inf])
        places = np.searchsorted(ids, cluster_ids)
        found = np.append(ids, -1)[places] == cluster_ids
        return limits[np.where(found, places, len(ids))]

    def merge(self, other: ClusterSamples, *, n_examples: int) -> ClusterSamples:
        """Samples of both; of the examples the nearest stay."""
        examples = dict(self.examples)
        for cluster_id, texts in other.examples.items():
            examples[cluster_id] = sorted(examples.get(cluster_id, []) + texts)[:n_examples]
        parts = [part for part in (self.vectors, other.vectors) if len(part)]
        return ClusterSamples(
            examples,
            np.concatenate(parts) if parts else self.vectors,
            np.concatenate([self.cluster_ids, other.cluster_ids]),
            self.captions + other.captions,
        )


def sample_shard(
    numbered: tuple[int, Shard],
    *,
    cluster_column: str,
    distance_column: str,
    text_column: str,
    label_column: str,
    vector_column: str,
    n_examples: int,
    map_share: float,
    seed: int,
) -> ClusterSamples:
    """Sample one shard; `numbered` is its number among the shards, which enters the seed, and the shard."""
    number, shard = numbered
    names = shard.schema.names
    rng = np.random.default_rng([seed, number])
    wanted = [cluster_column, distance_column, text_column, label_column, vector_column]
    samples = ClusterSamples.empty()
    if not n_examples and not map_share:
        return samples
    for table in shard.iter_tables([name for name in dict.fromkeys(wanted) if name in names]):
        cluster_ids = read_ids(table[cluster_column], where=f"{shard.path}, column {cluster_column!r}")
        distances = _distances(table, distance_column, shard)
        # Of a long stream few rows are near enough to get in; the rest is not even sorted.
        near = ~(distances > samples.farthest(cluster_ids, n_examples=n_examples)) & (cluster_ids >= 0)
        examples = _nearest(table, np.flatnonzero(near), cluster_ids, distances, text_column, n_examples)
        chosen = np.flatnonzero((rng.random(len(cluster_ids)) < map_share) & (cluster_ids >= 0))
        vectors = np.zeros((0, 0), np.float32)
        if vector_column in names and is_vector(table.schema.field(vector_column).type):
            column = read_vectors(_take(table[vector_column], chosen), where=str(shard.path))
            chosen, vectors = chosen[column.valid], column.vectors[column.valid]
        else:
            chosen = chosen[:0]
        labels = label_strings(_take(table[label_column], chosen))
        texts = _texts(table, text_column, chosen)
        captions = [f"{label or 'no label'}: {text}" for label, text in zip(labels, texts, strict=True)]
        samples = samples.merge(ClusterSamples(examples, vectors, cluster_ids[chosen], captions), n_examples=n_examples)
    return samples


def _take(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
    return column.take(number_array(rows))


def _texts(table: pa.Table, text_column: str, rows: np.ndarray) -> list[str]:
    """The texts of some rows, shortened."""
    if text_column not in table.schema.names:
        return [""] * len(rows)
    return ["" if value is None else _clip(str(value)) for value in _take(table[text_column], rows).to_pylist()]


def _distances(table: pa.Table, distance_column: str, shard: Shard) -> np.ndarray:
    """[n] float64, infinite where there is none."""
    if distance_column not in table.schema.names:
        return np.zeros(table.num_rows)
    where = f"{shard.path}, column {distance_column!r}"
    return read_numbers(table[distance_column], absent=np.inf, where=where, what_to_do="check distance_column")


def _clip(text: str) -> str:
    return text if len(text) <= _EXAMPLE_CHARACTERS else text[:_EXAMPLE_CHARACTERS] + "…"


def _nearest(
    table: pa.Table,
    rows: np.ndarray,
    cluster_ids: np.ndarray,
    distances: np.ndarray,
    text_column: str,
    n_examples: int,
) -> dict[int, list[tuple[float, str]]]:
    """Of some rows in clusters, the `n_examples` nearest with a text, by cluster."""
    if text_column not in table.schema.names:
        return {}
    rows = rows[np.lexsort((distances[rows], cluster_ids[rows]))]
    chosen = _first_of_each(rows, cluster_ids, n_examples)
    if not has_text(_take(table[text_column], chosen)).all():  # seldom; to look at every text takes long
        chosen = _first_of_each(rows[has_text(_take(table[text_column], rows))], cluster_ids, n_examples)
    examples: dict[int, list[tuple[float, str]]] = {}
    texts = _texts(table, text_column, chosen)
    for cluster_id, distance, text in zip(cluster_ids[chosen], distances[chosen], texts, strict=True):
        examples.setdefault(int(cluster_id), []).append((float(distance), text))
    return examples


def _first_of_each(rows: np.ndarray, cluster_ids: np.ndarray, n_examples: int) -> np.ndarray:
    """The first `n_examples` rows of each cluster; `rows` are sorted by cluster."""
    ids = cluster_ids[rows]
    return rows[np.arange(len(ids)) - np.searchsorted(ids, ids) < n_examples]
