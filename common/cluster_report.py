"""How good several numbers of clusters are, side by side, and which one to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.columns import label_strings, read_vectors
from common.quality import Contingency
from common.shards import ShardSet

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class ClusterNumber:
    """One trained number of clusters."""

    n_clusters: int
    table: pa.Table  # the columns of centroids.parquet
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def centers(self) -> np.ndarray:
        """[k, d] float32."""
        return read_vectors(self.table["center"], where="center").vectors

    @property
    def inertia(self) -> float:
        """Sum of squared distances of all rows to their centroids."""
        return float(np.sum(self.table["inertia"]))


def score_clusters(
    number: ClusterNumber,
    shards: ShardSet,
    *,
    vector_column: str,
    label_column: str,
    silhouette_sample: int,
    spherical: bool,
    seed: int,
) -> dict[str, float]:
    """Inertia, silhouette of a sample and, where rows have labels, purity and NMI, in one pass over the shards."""
    from common.kmeans import assign, unit_rows
    from common.silhouette import silhouette_score

    has_labels = label_column in shards.schema.names
    columns = [vector_column, *([label_column] if has_labels else [])]
    keep = min(1.0, 2 * silhouette_sample / shards.n_rows)  # more than the sample needs, less than all
    rng = np.random.default_rng(seed)
    counts, sampled, sampled_ids = Contingency(), [], []
    for table in shards.iter_tables(columns):
        column = read_vectors(table[vector_column], where=str(shards.folder), dimension=number.centers.shape[1])
        vectors = unit_rows(column.vectors) if spherical else column.vectors
        ids, _ = assign(vectors, number.centers)
        ids = np.where(column.valid, ids, -1)
        if has_labels:
            counts.update(ids, label_strings(table[label_column]))
        chosen = column.valid & (rng.random(len(ids)) < keep)
        sampled.append(vectors[chosen])
        sampled_ids.append(ids[chosen])
    scores = {"inertia": number.inertia}
    scores["silhouette"] = silhouette_score(
        np.concatenate(sampled),
        np.concatenate(sampled_ids),
        metric="cosine" if spherical else "sqeuclidean",
        sample_size=silhouette_sample,
        random_state=seed,
    )
    agreement = counts.agreement() if has_labels else None
    if agreement is not None and agreement.n_scored:
        scores |= {"purity": agreement.purity, "nmi": agreement.nmi, "ami": agreement.ami}
    return scores


def choose_best(tried: Sequence[ClusterNumber], *, select_by: str) -> ClusterNumber:
    """The number with the highest score; by "inertia", the one at the bend of the curve.

    Without labels, purity and NMI fall back to the silhouette.
    """
    if select_by == "inertia":
        return _at_the_bend(sorted(tried, key=lambda number: number.n_clusters))
    if any(select_by not in number.scores for number in tried):
        select_by = "silhouette"
    return max(tried, key=lambda number: _or_lowest(number.scores[select_by]))


def _or_lowest(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def _at_the_bend(tried: Sequence[ClusterNumber]) -> ClusterNumber:
    """The point farthest below the straight line from the first to the last, both axes scaled to 0..1."""
    numbers = np.array([number.n_clusters for number in tried], float)
    inertia = np.array([number.inertia for number in tried], float)
    x = (numbers - numbers[0]) / max(numbers[-1] - numbers[0], 1e-12)
    y = (inertia - inertia[-1]) / max(inertia[0] - inertia[-1], 1e-12)
    return tried[int(np.argmax(1 - x - y))]


def write_cluster_report(tried: Sequence[ClusterNumber], best: ClusterNumber, path: Path) -> None:
    """Write the table and the curves as one HTML page, and the curves as a PNG beside it."""
    from common.figures import write_lines_png
    from common.report import Column, Report

    names = list(tried[0].scores)
    report = Report("How many clusters?", f"{len(tried)} numbers tried; {best.n_clusters} taken")
    kinds = {"purity": "percent", "nmi": "number", "silhouette": "number"}
    columns = [Column("clusters", "number"), *(Column(name, kinds.get(name, "number")) for name in names)]  # type: ignore[arg-type]
    rows = [[number.n_clusters, *(number.scores.get(name) for name in names)] for number in tried]
    report.add_table("Scores", columns, rows, note=f"Taken: {best.n_clusters} clusters.")
    for name in names:
        points = sorted((float(number.n_clusters), number.scores[name]) for number in tried if name in number.scores)
        report.add_lines(name.capitalize(), {name: points}, x_label="clusters", y_label=name)
    report.write(path)
    shares = [name for name in names if name != "inertia"]
    curves = {name: sorted((float(n.n_clusters), n.scores[name]) for n in tried if name in n.scores) for name in shares}
    write_lines_png(path.with_suffix(".png"), curves, title="Scores by number of clusters", x_label="clusters")
