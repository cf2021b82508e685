"""The rules of stage 6 over the rows of shards: what they read there, and what they decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from common.centroids import Centroids
from common.columns import has_text, label_strings, numbers, read_ids, read_numbers, read_vectors
from common.config import StageSettings
from common.pseudo_labels import ClassCuts, ClusterLabels, Decisions, Rows, Rules, decide
from common.shards import Shard, ShardSet
from common.stage import map_shards

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class RowColumns:
    """What the columns are called that the rules read; labels, probabilities and predictions may be absent."""

    text: str
    label: str
    cluster_id: str
    probs: str
    prediction: str

    def present(self, schema: pa.Schema) -> list[str]:
        """Those of them that a shard has."""
        return [name for name in dict.fromkeys(vars(self).values()) if name in schema.names]


@dataclass(frozen=True)
class Labeler:
    """The rules and all that they go by, small enough to send to another process."""

    columns: RowColumns
    names: tuple[str, ...]  # every label there is, sorted; a label's place in it is its code
    clusters: ClusterLabels
    rules: Rules
    cuts: ClassCuts | None = None  # None: all that pass the rules take part

    def decide(self, table: pa.Table, *, where: str = "") -> Decisions:
        """A label and two masks for each row of a table with at least the columns that are present."""
        return decide(self.read_rows(table, where=where), self.clusters, self.rules, cuts=self.cuts)

    def decisions(self, shard: Shard) -> Iterator[Decisions]:
        """The decisions on the rows of one shard, chunk by chunk, by the columns that the rules read alone."""
        decide_there = partial(self.decide, where=str(shard.path))
        return map(decide_there, shard.iter_tables(self.columns.present(shard.schema)))

    def read_rows(self, table: pa.Table, *, where: str = "") -> Rows:
        """What the rules need to know of some rows; an error begins with `where`, the file that they are of."""
        file = f"{where}, " if where else ""
        return Rows(
            gold=self._codes(table, self.columns.label),
            cluster_ids=read_ids(table[self.columns.cluster_id], where=f"{file}column {self.columns.cluster_id!r}"),
            max_prob=_max_prob(table, self.columns.probs, where=file),
            predicted=self._codes(table, self.columns.prediction),
            usable=has_text(table[self.columns.text]),
        )

    def _codes(self, table: pa.Table, column: str) -> np.ndarray:
        """[n] int64: the code of each row's label, -1 where there is none."""
        import pyarrow as pa

        if column not in table.schema.names:
            return np.full(table.num_rows, -1)
        code_of = {name: code for code, name in enumerate(self.names)}
        encoded = pa.concat_arrays(table[column].chunks or [pa.nulls(0, table[column].type)]).dictionary_encode()
        of_value = [code_of.get(label, -1) if label is not None else -1 for label in label_strings(encoded.dictionary)]
        return np.array([*of_value, -1], np.int64)[numbers(encoded.indices, absent=len(of_value))]


def _max_prob(table: pa.Table, column: str, *, where: str) -> np.ndarray:
    """[n] float64: the top probability of each row, NaN where there are no probabilities."""
    if column not in table.schema.names:
        return np.full(table.num_rows, np.nan)
    probs = read_vectors(table[column], where=f"{where}column {column!r}")
    if probs.vectors.shape[1] == 0:
        return np.full(table.num_rows, np.nan)
    return np.where(probs.valid, probs.vectors.max(axis=1), np.nan)


def make_labeler(
    shards: ShardSet,
    centroids: Centroids,
    *,
    columns: RowColumns,
    rules: Rules,
    use_lower_bound: bool,
    settings: StageSettings,
) -> Labeler:
    """Collect the labels of shards and centroids; `use_lower_bound` takes Wilson's bound for the purity."""
    names = _collect_names(shards, centroids, columns, settings)
    return Labeler(columns, names, _cluster_labels(centroids, names, use_lower_bound=use_lower_bound), rules)


def _collect_names(
    shards: ShardSet, centroids: Centroids, columns: RowColumns, settings: StageSettings
) -> tuple[str, ...]:
    """All labels there are, sorted: gold, predicted, and of clusters."""
    names = {label for label in centroids.table["majority_label"].to_pylist() if label is not None}
    with_labels = [name for name in (columns.label, columns.prediction) if name in shards.schema.names]
    collect = partial(unique_labels, columns=with_labels)
    return tuple(sorted(names.union(*map_shards(collect, shards.shards, settings, label="labels"))))


def unique_labels(shard: Shard, *, columns: Sequence[str]) -> set[str]:
    """The labels that occur in some columns of one shard."""
    found: set[str] = set()
    for table in shard.iter_tables(columns) if columns else ():
        for column in columns:
            found |= {label for label in label_strings(table[column].unique()) if label is not None}
    return found


def _cluster_labels(centroids: Centroids, names: Sequence[str], *, use_lower_bound: bool) -> ClusterLabels:
    code_of = {name: code for code, name in enumerate(names)}
    column = "purity_lower_bound" if use_lower_bound else "purity"
    order = np.argsort(centroids.ids)
    majority = [code_of.get(label, -1) for label in centroids.table["majority_label"].to_pylist()]
    return ClusterLabels(
        ids=centroids.ids[order],
        majority=np.array(majority, np.int64)[order],
        purity=_numbers_of(centroids, column)[order],
        n_labeled=_numbers_of(centroids, "n_labeled").astype(np.int64)[order],
    )


def _numbers_of(centroids: Centroids, column: str) -> np.ndarray:
    """[k] float64: a column that stage 5 writes; 0 where there is nothing."""
    where = f"{centroids.path}, column {column!r}"
    found = centroids.table[column]
    return np.nan_to_num(read_numbers(found, absent=0.0, where=where, what_to_do="run cluster_purity_counter.py again"))
