"""Shards with cluster ids, and the centroids that the ids are of: what the stages after prediction read."""

from __future__ import annotations

from collections.abc import Mapping

from common.centroids import Centroids, load_centroids
from common.config import UserError
from common.shards import ShardSet, open_shards

PREDICTED_BY = "cluster_train_clusters.py with train.run_mode=predict"


def open_clustered_shards(
    shards_dir: str, centroids_path: str, *, cluster_column: str, columns: Mapping[str, str]
) -> tuple[ShardSet, Centroids]:
    """Open shards with cluster ids and, in `columns`, what else must be there: names and who writes each.

    Raises UserError where a column or a file is missing, or where the ids were predicted with other centroids.
    """
    shards = open_shards(shards_dir, written_by=PREDICTED_BY)
    shards.require_columns(cluster_column, *columns, written_by={cluster_column: PREDICTED_BY, **columns})
    centroids = load_centroids(centroids_path)
    _refuse_other_predictions(shards, centroids)
    return shards, centroids


def refuse_nested_labels(shards: ShardSet, *columns: str) -> None:
    """Raise UserError where a column holds lists or the like in place of labels."""
    import pyarrow as pa

    for shard in shards.shards:
        for column in shard.schema:
            if column.name in columns and pa.types.is_nested(column.type):
                raise UserError(
                    f"{shard.path}, column {column.name!r} holds {column.type}, not labels; check the column name in "
                    f"the config"
                )


def clustered_inputs(shards: ShardSet, centroids: Centroids) -> dict[str, str]:
    """What identifies both, and the ids in the shards, in an `Identity`."""
    predicted = shards.layer("predict")
    return {
        "shards_dir": shards.fingerprint,
        "cluster ids": str(predicted["fingerprint"]) if predicted else "as they are",
        "centroids_path": centroids.fingerprint,
    }


def _refuse_other_predictions(shards: ShardSet, centroids: Centroids) -> None:
    """Raise UserError where the ids in the shards are unfinished, or were predicted with other centroids."""
    predicted = shards.layer("predict")
    if predicted is None:
        return
    if not predicted["complete"]:
        raise UserError(f"the cluster ids in {shards.folder} are unfinished; run {PREDICTED_BY} again to finish them")
    if predicted["identity"]["inputs"]["centroids_out"] != centroids.fingerprint:
        raise UserError(
            f"the cluster ids in {shards.folder} were predicted with other centroids than {centroids.path}; "
            f"run {PREDICTED_BY} --overwrite"
        )
