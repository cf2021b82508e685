"""Stage 5: how pure each cluster is, by the labels of its rows.

Reads   purity_counter.shards_dir (shards with `cluster_id` and labels) and purity_counter.centroids_path
Writes  purity, majority label, Wilson bound and entropy into centroids.parquet; purity_report.html and purity.json

    python cluster_purity_counter.py --config clustering.example.yaml
"""

from __future__ import annotations

import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from common import cli
from common.centroids import Centroids, add_centroid_columns
from common.cluster_samples import ClusterSamples, sample_shard
from common.clustered_shards import clustered_inputs, open_clustered_shards, refuse_nested_labels
from common.columns import number_array, read_ids, text_array
from common.commit import Identity, OutputLock, describe_changes, make_folder, remove_stale_temporaries, write_json
from common.config import StageSettings, UserError
from common.engine import map_items
from common.purity_report import write_purity_report
from common.quality import Agreement, ClusterQuality, Contingency
from common.shards import Shard, ShardSet, read_stamp
from common.stage import map_shards

log = logging.getLogger(__name__)

# Rows that are counted at once; two narrow columns of them are a few MiB.
COUNTED_ROWS = 1 << 17


class Settings(StageSettings):
    """Section `purity_counter`."""

    shards_dir: str = Field(min_length=1, description="shards of stage 4, or any folder with cluster ids and labels")
    centroids_path: str = Field(min_length=1, description="centroids of stage 3; the result is written into them")
    teacher_label_column: str = Field("teacher_label", description="labels that clusters are measured by")
    cluster_column: str = Field("cluster_id", description="column with the cluster ids")
    distance_column: str = Field("cluster_distance", description="distance to the centroid, to choose example texts")
    text_column: str = Field("text", description="texts shown in the report; absent is fine")
    vector_column: str = Field("pca", description="vectors for the map in the report; absent is fine")
    # By its ending, a report never takes the place of shards or centroids.
    report_path: str | None = Field(
        None, pattern=r"\.html$", description="HTML report; null: purity_report.html beside the centroids"
    )
    examples_per_cluster: int = Field(5, ge=0, le=50, description="texts shown for each cluster, the nearest ones")
    map_rows: int = Field(3000, ge=0, le=20000, description="rows of the map; 0 leaves it out")
    map_method: Literal["pca", "umap"] = Field("pca", description="umap is clearer and takes ten seconds or more")
    random_state: int = Field(0, ge=0, description="seed of the samples in the report")

    @property
    def html_path(self) -> Path:
        """Where the report goes."""
        return Path(self.report_path) if self.report_path else Path(self.centroids_path).with_name("purity_report.html")

    @property
    def json_path(self) -> Path:
        """Where the overall scores go."""
        return self.html_path.with_suffix(".json")


def run(settings: Settings, *, overwrite: bool = False) -> dict[str, Any]:
    """Count labels by cluster, write the result into the centroids, and the reports; returns the overall scores."""
    watch = cli.Stopwatch()
    shards, centroids = _open_inputs(settings)
    identity = make_identity(settings, shards, centroids)
    with OutputLock(settings.centroids_path, is_file=True):
        if _is_complete(centroids, identity, settings, overwrite=overwrite):
            log.info("nothing to do: %s already has the purity of these shards", centroids.path)
            return dict(json.loads(settings.json_path.read_text(encoding="utf-8")))
        for folder in {centroids.path.parent, settings.html_path.parent}:
            remove_stale_temporaries(make_folder(folder))
        counts = count_labels(shards, settings)
        quality, agreement = counts.per_cluster(cluster_ids=centroids.ids), counts.agreement()
        _refuse_unknown_ids(counts, centroids, settings)
        samples = collect_samples(shards, settings)
        result = summarize(agreement, centroids, settings)
        # The JSON goes first and comes last: with the layer in the centroids it proves that all three are of one run.
        settings.json_path.unlink(missing_ok=True)
        write_purity_report(settings.html_path, quality, agreement, samples, map_method=settings.map_method)
        add_centroid_columns(centroids, quality_columns(quality), identity.to_dict())
        write_json(settings.json_path, result)
    log.info(
        "rows in %s, scored %s, without label %s, without cluster %s, without both %s; %.0f rows/s, %.1f s",
        f"{agreement.n_rows:,}",
        f"{agreement.n_scored:,}",
        f"{agreement.n_without_label:,}",
        f"{agreement.n_without_cluster:,}",
        f"{agreement.n_without_both:,}",
        agreement.n_rows / watch.seconds,
        watch.seconds,
    )
    return result


def check(settings: Settings) -> dict[str, Any]:
    """Validate inputs and columns; returns the plan."""
    shards, centroids = _open_inputs(settings)
    return {
        "stage": "purity_counter",
        "rows": shards.n_rows,
        "shards": len(shards.shards),
        "clusters": len(centroids.ids),
        "report": str(settings.html_path),
    }


def make_identity(settings: Settings, shards: ShardSet, centroids: Centroids) -> Identity:
    """What the purity depends on."""
    names = ("teacher_label_column", "cluster_column", "examples_per_cluster", "map_rows", "map_method", "random_state")
    keys = {name: getattr(settings, name) for name in names}
    return Identity("purity_counter", keys, clustered_inputs(shards, centroids))


def _open_inputs(settings: Settings) -> tuple[ShardSet, Centroids]:
    shards, centroids = open_clustered_shards(
        settings.shards_dir,
        settings.centroids_path,
        cluster_column=settings.cluster_column,
        columns={settings.teacher_label_column: "cluster_supervise.py on labelled input"},
    )
    refuse_nested_labels(shards, settings.teacher_label_column)
    return shards, centroids


def _is_complete(centroids: Centroids, identity: Identity, settings: Settings, *, overwrite: bool) -> bool:
    stamp = read_stamp(centroids.path)
    before = stamp.layers.get(identity.stage) if stamp else None
    if before is None or overwrite:
        return False
    if before != identity.to_dict():
        raise UserError(
            f"{centroids.path} already holds the purity of another configuration "
            f"({describe_changes(before, identity.to_dict())}); replace it with --overwrite"
        )
    return settings.html_path.exists() and settings.json_path.exists()


# --- Counting --------------------------------------------------------------------------------------------------------


def count_labels(shards: ShardSet, settings: Settings) -> Contingency:
    """The number of rows for each pair of cluster and label; shards are counted apart and added in their order."""
    counts = Contingency()
    for part in map_shards(partial(count_shard, settings=settings), shards.shards, settings, label="count"):
        counts.merge(part)
    return counts


def count_shard(shard: Shard, *, settings: Settings) -> Contingency:
    """The counts of one shard."""
    counts = Contingency()
    label, where = settings.teacher_label_column, f"{shard.path}, column {settings.cluster_column!r}"
    for table in shard.iter_tables([settings.cluster_column, label], n_rows=COUNTED_ROWS, as_dictionaries=[label]):
        counts.update(read_ids(table[settings.cluster_column], where=where), table[label])
    return counts


def _refuse_unknown_ids(counts: Contingency, centroids: Centroids, settings: Settings) -> None:
    unknown = np.setdiff1d(counts.cluster_ids, centroids.ids)
    if len(unknown):
        raise UserError(
            f"{settings.shards_dir} holds cluster id {unknown[0]}, which {centroids.path} does not have; "
            f"predict with these centroids first"
        )


def quality_columns(quality: ClusterQuality) -> dict[str, Any]:
    """The columns that this stage adds to `centroids.parquet`, in the order of the centroids."""
    return {
        "purity": number_array(quality.purity, valid=~np.isnan(quality.purity)),
        "majority_label": text_array(quality.majority_labels),
        "n_rows": number_array(quality.sizes),
        "n_labeled": number_array(quality.n_labeled),
        "purity_lower_bound": number_array(quality.purity_lower_bound),
        "entropy": number_array(quality.entropy, valid=~np.isnan(quality.entropy)),
    }


def summarize(agreement: Agreement, centroids: Centroids, settings: Settings) -> dict[str, Any]:
    """The overall scores as one JSON line; a score that is not defined is null."""
    names = ("purity", "nmi", "ami", "ari", "v_measure", "coverage", "n_rows", "n_scored", "n_without_label")
    scores = {name: getattr(agreement, name) for name in (*names, "n_without_cluster", "n_without_both", "n_clusters")}
    defined = {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in scores.items()}
    return defined | {"report": str(settings.html_path), "centroids": str(centroids.path)}


def collect_samples(shards: ShardSet, settings: Settings) -> ClusterSamples:
    """Example texts for each cluster and rows for the map, in one pass."""
    task = partial(
        sample_shard,
        cluster_column=settings.cluster_column,
        distance_column=settings.distance_column,
        text_column=settings.text_column,
        label_column=settings.teacher_label_column,
        vector_column=settings.vector_column,
        n_examples=settings.examples_per_cluster,
        map_share=min(1.0, settings.map_rows / shards.n_rows),
        seed=settings.random_state,
    )
    samples = ClusterSamples.empty()
    for part in map_items(task, list(enumerate(shards.shards)), settings.engine):
        samples = samples.merge(part, n_examples=settings.examples_per_cluster)
    return samples


if __name__ == "__main__":
    from cluster_purity_counter import (
        Settings,
        check,
        run,
    )  # by name, so that worker processes can import the functions

    sys.exit(cli.main(Settings, run, doc=__doc__, section="purity_counter", check=check))
