"""How well clusters agree with labels, from counts alone, so that rows can stream by.

    counts = Contingency()
    for cluster_ids, labels in batches:
        counts.update(cluster_ids, labels)
    counts.agreement().purity              # overall scores
    counts.per_cluster().purity_lower_bound  # one value for each cluster

Everything follows from one sparse table, the number of rows for each pair of cluster and label. Tables of shards are
added with `merge`. The scores equal scikit-learn's on the expanded labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.agreement import agreement_scores, wilson_lower_bound
from common.columns import label_text, number_array, numbers, read_ids

# A pair of cluster and label is one int64: the cluster id plus one in the upper half, the code of the label below.
_CODE_BITS = 32
_NO_LABEL = 0
# Pairs kept apart before they are added up; bounds the memory of a long stream.
_COMPACT_AT = 1 << 20
# A batch is counted in a table of all pairs of cluster and label, which is quicker than sorting, where the table has up
# to so many cells, or so many for each row.
_TABLE_CELLS = 1 << 17
_TABLE_CELLS_PER_ROW = 16
# And never more than so many, 32 MiB.
_MOST_TABLE_CELLS = 1 << 22


@dataclass(frozen=True)
class ClusterQuality:
    """One row for each cluster, by ascending id; all arrays have the length of `cluster_ids`."""

    cluster_ids: np.ndarray  # [k] int64
    sizes: np.ndarray  # [k] int64, all rows of the cluster
    n_labeled: np.ndarray  # [k] int64, those with a label
    majority_labels: list[str | None]  # the most frequent label; the first by name among equals; None without labels
    majority_counts: np.ndarray  # [k] int64
    purity: np.ndarray  # [k] float64, majority_counts / n_labeled; NaN without labels
    purity_lower_bound: np.ndarray  # [k] float64, one-sided Wilson bound; 0 without labels
    entropy: np.ndarray  # [k] float64, of the labels, in bits; NaN without labels


@dataclass(frozen=True)
class Agreement:
    """Scores of a whole clustering against labels, over the rows that have both ("scored" rows).

    purity: the sum of the majority counts of all clusters / scored rows.
    accuracy: the share of scored rows that are right when clusters and labels are matched one to one as well as can be
    (Hungarian method, "ACC"); unmatched clusters count as wrong.
    coverage: scored rows / labelled rows, so accuracy * coverage is ACC with unclustered rows counted as wrong.
    NMI and AMI use the arithmetic mean of the entropies. All scores are NaN when no row is scored.
    """

    n_rows: int
    n_scored: int
    n_without_label: int  # in a cluster, no label
    n_without_cluster: int  # labelled, in no cluster
    n_without_both: int
    n_clusters: int  # with at least one row
    n_labels: int
    purity: float
    accuracy: float
    nmi: float
    ami: float
    ari: float
    homogeneity: float
    completeness: float
    v_measure: float
    coverage: float


class Contingency:
    """Counts of rows for each pair of cluster and label, built batch by batch.

    A row is in no cluster when its id is null, NaN or negative (noise). It has no label when that is null, NaN or
    blank. Labels are compared as text, and 3, "3" and 3.0 are one. Memory grows with the number of distinct pairs, not
    with rows.
    """

    def __init__(self) -> None:
        self._label_codes: dict[str, int] = {}  # codes start at 1; 0 is "no label"
        self._code_of_text: dict[str, int] = {}  # of labels as they were met, blanks around them and all
        self._keys: list[np.ndarray] = [np.zeros(0, np.int64)]
        self._counts: list[np.ndarray] = [np.zeros(0, np.int64)]

    def update(self, cluster_ids: Any, labels: Any) -> None:
        """Add a batch of rows: ids as integers or null, labels of any type; lists, numpy, pandas or pyarrow.

        Raises ValueError for unequal lengths and UserError for ids above 2**31 - 2.
        """
        clusters = _as_cluster_ids(cluster_ids)
        codes = self._encode(labels)
        if len(clusters) != len(codes):
            raise ValueError(f"{len(clusters)} cluster ids but {len(codes)} labels")
        self._add(*_count_pairs(clusters, codes))

    def merge(self, other: Contingency) -> None:
        """Add the counts of another table, whose labels may be others."""
        codes = np.zeros(len(other._label_codes) + 1, np.int64)
        for label, code in other._label_codes.items():
            codes[code] = self._code(label)
        other._compact()
        clusters, other_codes = _split_keys(other._keys[0])
        self._add(((clusters + 1) << _CODE_BITS) | codes[other_codes], other._counts[0])

    @property
    def labels(self) -> list[str]:
        """All labels seen, in the order of their names."""
        return sorted(self._label_codes)

    @property
    def cluster_ids(self) -> np.ndarray:
        """[k] int64, the clusters seen, rising."""
        self._compact()
        clusters = _split_keys(self._keys[0])[0]  # which rise
        return np.unique(clusters[clusters >= 0])

    def matrix(self) -> tuple[np.ndarray, list[str], Any]:
        """Return cluster ids [k], label names [c] and the scipy CSR matrix [k, c] of counts of the scored rows.

        Clusters without a labelled row and labels without a clustered row are left out.
        """
        ids, label_ranks, table = _scored_table(*self._pairs())
        names = self.labels
        return ids, [names[rank] for rank in label_ranks], table

    def per_cluster(self, *, cluster_ids: Sequence[int] | np.ndarray | None = None) -> ClusterQuality:
        """Return the quality of each cluster; `cluster_ids` sets which and in which order (unseen ones are empty)."""
        clusters, ranks, counts = self._pairs()
        inside = clusters >= 0
        clusters, ranks, counts = clusters[inside], ranks[inside], counts[inside]
        ids = np.unique(clusters) if cluster_ids is None else np.asarray(cluster_ids, np.int64)
        rows = _positions(ids, clusters)
        wanted = rows >= 0
        return _cluster_quality(ids, rows[wanted], ranks[wanted], counts[wanted], self.labels)

    def agreement(self) -> Agreement:
        """Return the overall scores."""
        clusters, ranks, counts = self._pairs()
        in_cluster, labeled = clusters >= 0, ranks >= 0
        n_scored = int(counts[in_cluster & labeled].sum())
        n_without_cluster = int(counts[~in_cluster & labeled].sum())
        n_labeled = n_scored + n_without_cluster
        return Agreement(
            n_rows=int(counts.sum()),
            n_scored=n_scored,
            n_without_label=int(counts[in_cluster & ~labeled].sum()),
            n_without_cluster=n_without_cluster,
            n_without_both=int(counts[~in_cluster & ~labeled].sum()),
            n_clusters=len(np.unique(clusters[in_cluster])),
            n_labels=len(self._label_codes),
            coverage=n_scored / n_labeled if n_labeled else math.nan,
            **agreement_scores(_scored_table(clusters, ranks, counts)[2]),
        )

    def _pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cluster id (-1: none), rank of the label by name (-1: none) and count, for each pair that occurs."""
        self._compact()
        clusters, codes = _split_keys(self._keys[0])
        ranks = np.full(len(self._label_codes) + 1, -1, np.int64)
        for rank, label in enumerate(self.labels):
            ranks[self._label_codes[label]] = rank
        ranks = ranks[codes]
        # One order whatever the order of the batches, so that sums of floats are equal to the last bit.
        order = np.argsort((clusters << _CODE_BITS) + ranks)
        return clusters[order], ranks[order], self._counts[0][order]

    def _encode(self, labels: Any) -> np.ndarray:
        encoded = _as_arrow(labels).dictionary_encode()
        values = encoded.dictionary.to_pylist()
        codes = np.array([self._code(value) for value in values] + [_NO_LABEL], np.int64)
        return codes[numbers(encoded.indices, absent=len(values))]

    def _code(self, value: Any) -> int:
        if not isinstance(value, str):
            return self._new_code(value)
        if value not in self._code_of_text:
            self._code_of_text[value] = self._new_code(value)
        return self._code_of_text[value]

    def _new_code(self, value: Any) -> int:
        label = label_text(value)
        return _NO_LABEL if label is None else self._label_codes.setdefault(label, len(self._label_codes) + 1)

    def _add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        self._keys.append(keys)
        self._counts.append(counts)
        # Doubling over what is already merged keeps the cost of merging linear.
        if sum(len(part) for part in self._keys[1:]) > max(_COMPACT_AT, len(self._keys[0])):
            self._compact()

    def _compact(self) -> None:
        if len(self._keys) > 1:
            keys, counts = _count_pairs(*_split_keys(np.concatenate(self._keys)), np.concatenate(self._counts))
            self._keys, self._counts = [keys], [counts]


def _scored_table(clusters: np.ndarray, ranks: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
    """Ids [k] and ranks [c] of the clusters and labels of scored rows, and their counts as a CSR matrix [k, c]."""
    from scipy.sparse import csr_array

    scored = (clusters >= 0) & (ranks >= 0)
    ids, rows = np.unique(clusters[scored], return_inverse=True)
    label_ranks, columns = np.unique(ranks[scored], return_inverse=True)
    table = csr_array((counts[scored], (rows, columns)), shape=(len(ids), len(label_ranks)), dtype=np.int64)
    return ids, label_ranks, table


def _cluster_quality(
    ids: np.ndarray, rows: np.ndarray, ranks: np.ndarray, counts: np.ndarray, names: list[str]
) -> ClusterQuality:
    """Group the pairs (row of the cluster, rank of the label or -1, count) by cluster."""
    k = len(ids)
    sizes = np.bincount(rows, weights=counts, minlength=k).astype(np.int64)
    rows, ranks, counts = rows[ranks >= 0], ranks[ranks >= 0], counts[ranks >= 0]
    n_labeled = np.bincount(rows, weights=counts, minlength=k).astype(np.int64)
    # The first pair of each cluster after this sort is its majority; equal counts go by the name of the label.
    order = np.lexsort((ranks, -counts, rows))
    present, first = np.unique(rows[order], return_index=True)
    majority_counts = np.zeros(k, np.int64)
    majority_counts[present] = counts[order][first]
    majority: list[str | None] = [None] * k
    for row, rank in zip(present, ranks[order][first], strict=True):
        majority[row] = names[rank]
    share = counts / n_labeled[rows]
    bits = np.bincount(rows, weights=-share * np.log2(share), minlength=k)
    labeled = n_labeled > 0
    purity = np.where(labeled, majority_counts / np.maximum(n_labeled, 1), np.nan)
    return ClusterQuality(
        cluster_ids=ids,
        sizes=sizes,
        n_labeled=n_labeled,
        majority_labels=majority,
        majority_counts=majority_counts,
        purity=purity,
        purity_lower_bound=wilson_lower_bound(majority_counts, n_labeled),
        entropy=np.where(labeled, bits, np.nan),
    )


def _count_pairs(
    clusters: np.ndarray, codes: np.ndarray, counts: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that occur as rising keys, and how often; or the sums of their `counts`."""
    n_codes = int(codes.max(initial=0)) + 1
    n_cells = (int(clusters.max(initial=-1)) + 2) * n_codes
    if n_cells <= min(max(_TABLE_CELLS, _TABLE_CELLS_PER_ROW * len(codes)), _MOST_TABLE_CELLS):
        places = clusters + 1
        places *= n_codes  # in place: new memory costs more than the arithmetic
        places += codes
        totals = np.bincount(places, weights=counts, minlength=n_cells)
        cells = np.flatnonzero(totals)
        return ((cells // n_codes) << _CODE_BITS) | (cells % n_codes), totals[cells].astype(np.int64)
    keys = ((clusters + 1) << _CODE_BITS) | codes
    if counts is None:
        return np.unique(keys, return_counts=True)
    keys, places = np.unique(keys, return_inverse=True)
    return keys, np.bincount(places, weights=counts, minlength=len(keys)).astype(np.int64)


def _split_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (keys >> _CODE_BITS) - 1, keys & ((1 << _CODE_BITS) - 1)


def _positions(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Position of each wanted value in `ids`, -1 where it is not there."""
    if len(ids) == 0:
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(ids, kind="stable")
    places = np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)
    found = order[places]
    return np.where(ids[found] == wanted, found, -1)


def _as_arrow(labels: Any) -> Any:
    import pyarrow as pa

    if isinstance(labels, pa.ChunkedArray):
        return labels.chunk(0) if labels.num_chunks == 1 else labels.combine_chunks()  # which would copy a single one
    if isinstance(labels, pa.Array):
        return labels
    try:
        return pa.array(labels, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # types are mixed: compare them as text
        return pa.array([label_text(label) for label in labels], pa.string())


def _as_cluster_ids(cluster_ids: Any) -> np.ndarray:
    """Cluster ids as int64 with -1 for null, NaN and negative ones."""
    if isinstance(cluster_ids, np.ndarray) and cluster_ids.dtype.kind in "iu":
        cluster_ids = number_array(cluster_ids)
    return read_ids(_as_arrow(cluster_ids))
