"""The report of stage 5: a table of clusters with examples, their purity and sizes, and a map."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from common.cluster_samples import ClusterSamples
from common.quality import Agreement, ClusterQuality


def write_purity_report(
    path: Path, quality: ClusterQuality, agreement: Agreement, samples: ClusterSamples, *, map_method: str
) -> None:
    """Write one self-contained HTML page."""
    from common.report import Report

    n_shown = f"{agreement.n_rows:,} rows, {agreement.n_scored:,} with a label and a cluster"
    report = Report("Purity of clusters", n_shown)
    _add_facts(report, agreement)
    report.add_histogram("Purity", _defined(quality.purity), bins=20, as_percent=True, y_label="clusters")
    sizes = sorted(((f"{i}", float(n)) for i, n in zip(quality.cluster_ids, quality.sizes, strict=True)), key=_by_size)
    report.add_bars("Sizes", sizes, y_label="rows")
    _add_table(report, quality, samples)
    if len(samples.vectors) > 2:
        points = project(samples.vectors, method=map_method)
        labels = [int(cluster_id) for cluster_id in samples.cluster_ids]
        note = f"{len(points):,} rows, drawn evenly; projected by {map_method.upper()}."
        report.add_scatter("Map", points, labels=labels, hover_texts=samples.captions, note=note)
    report.write(path)


def project(vectors: np.ndarray, *, method: str) -> np.ndarray:
    """Vectors [m, d] to points [m, 2]; UMAP falls back to PCA for fewer than 50 rows."""
    if method == "umap" and len(vectors) >= 50:
        from common.density import embed_umap

        return embed_umap(vectors, n_components=2, n_neighbors=15, min_dist=0.1, metric="cosine", random_state=0)
    centered = vectors - vectors.mean(axis=0)
    _, _, directions = np.linalg.svd(centered, full_matrices=False)
    points = centered @ directions[:2].T
    return points if points.shape[1] == 2 else np.pad(points, ((0, 0), (0, 2 - points.shape[1])))


def _add_facts(report: object, agreement: Agreement) -> None:
    facts = {
        "Purity": _percent(agreement.purity),
        "NMI": _number(agreement.nmi),
        "AMI": _number(agreement.ami),
        "ARI": _number(agreement.ari),
        "V-measure": _number(agreement.v_measure),
        "Coverage": _percent(agreement.coverage),
        "Clusters": f"{agreement.n_clusters:,}",
        "Labels": f"{agreement.n_labels:,}",
        "Without label": f"{agreement.n_without_label:,}",
        "Without cluster": f"{agreement.n_without_cluster:,}",
    }
    notes = {
        "Purity": "labelled rows that have the majority label of their cluster",
        "Coverage": "labelled rows that are in a cluster",
    }
    report.add_facts(facts, notes=notes)  # type: ignore[attr-defined]


def _add_table(report: object, quality: ClusterQuality, samples: ClusterSamples) -> None:
    from common.report import Column

    columns = [
        Column("Cluster", "number", digits=0),
        Column("Rows", "bar", digits=0),
        Column("Labelled", "number", digits=0),
        Column("Purity", "meter"),
        Column("At least", "percent", note="one-sided 95% lower bound of purity (Wilson)"),
        Column("Majority label"),
        Column("Entropy", "number", digits=2, note="of the labels, in bits"),
    ]
    rows = [
        [int(cluster_id), int(size), int(labeled), _or_none(purity), float(bound), majority or "", _or_none(entropy)]
        for cluster_id, size, labeled, purity, bound, majority, entropy in zip(
            quality.cluster_ids,
            quality.sizes,
            quality.n_labeled,
            quality.purity,
            quality.purity_lower_bound,
            quality.majority_labels,
            quality.entropy,
            strict=True,
        )
    ]
    details = [[text for _, text in samples.examples.get(int(cluster_id), [])] for cluster_id in quality.cluster_ids]
    report.add_table(  # type: ignore[attr-defined]
        "Clusters", columns, rows, details=details, details_title="Nearest texts", sort_by="Rows", descending=True
    )


def _defined(values: np.ndarray) -> list[float]:
    return [float(value) for value in values if not np.isnan(value)]


def _by_size(pair: tuple[str, float]) -> float:
    return -pair[1]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}%"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
