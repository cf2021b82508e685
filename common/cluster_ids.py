"""The nearest centroid of every row: as columns added to the shards in place, or as shards of their own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from common.centroids import Centroids
from common.columns import no_rows, number_array, read_vectors
from common.commit import Identity
from common.config import StageSettings, UserError
from common.layers import LayerOutput, LayerTask
from common.outputs import StageOutput
from common.shards import Shard, ShardSet
from common.stage import ShardToShard, one_to_one, write_missing_shards

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predictor:
    """Finds the nearest centroid of rows; small enough to send to another process."""

    centroids: Centroids
    vector_column: str
    id_column: str
    distance_column: str

    def refuse_other_dimension(self, shards: ShardSet) -> None:
        """Raise UserError where the vectors of the first shard are of another length than the centroids."""
        first = next(shards.shards[0].iter_tables([self.vector_column], n_rows=1024))
        where = f"{shards.shards[0].path}, column {self.vector_column!r}"
        length, dimension = read_vectors(first[self.vector_column], where=where).vectors.shape[1], self.dimension
        if length not in (0, dimension):
            raise UserError(
                f"centroids {self.centroids.path} have dimension {dimension}, but {where} holds vectors of length "
                f"{length}; train on these shards first"
            )

    @property
    def dimension(self) -> int:
        """Length of a centroid."""
        return int(self.centroids.centers.shape[1])

    def find_ids(self, table: pa.Table, *, where: str) -> pa.Table:
        """Id and distance of each row's nearest centroid, as two columns; null where a row has no vector."""
        import pyarrow as pa

        from common.kmeans import assign, unit_rows

        where = f"{where}, column {self.vector_column!r}"
        column = read_vectors(table[self.vector_column], where=where, dimension=self.dimension)
        vectors = unit_rows(column.vectors) if self.centroids.spherical else column.vectors
        nearest, squared_distances = assign(vectors, self.centroids.centers)
        ids, distances = self.centroids.ids[nearest].astype(np.int32), np.sqrt(squared_distances, dtype=np.float32)
        return pa.table(
            {
                self.id_column: number_array(ids, valid=column.valid),
                self.distance_column: number_array(distances, valid=column.valid),
            }
        )


# --- In place --------------------------------------------------------------------------------------------------------


def predict_in_place(
    shards: ShardSet, predictor: Predictor, identity: Identity, settings: StageSettings, *, overwrite: bool
) -> dict[str, int] | None:
    """Add the columns to the shards, one by one; returns the counts, None where there was nothing to do."""
    with LayerOutput(shards, identity, overwrite=overwrite) as layer:
        if layer.is_complete:
            log.info("nothing to do: %s already has %s", shards.folder, predictor.id_column)
            return None
        layer.begin()
        tasks = [layer.task(shard) for shard in shards.shards]
        write_missing_shards(partial(add_ids, predictor=predictor), tasks, layer, settings, label="predict")
        totals = _count(shards.shards, predictor)
        layer.finish(totals)
    return totals


def add_ids(task: LayerTask, *, predictor: Predictor) -> None:
    """Give one shard the id of the nearest centroid of each row."""
    task.write(partial(predictor.find_ids, where=str(task.shard.path)), reads=[predictor.vector_column])


# --- Into a folder of their own --------------------------------------------------------------------------------------


def predict_into_folder(
    folder: str,
    shards: ShardSet,
    predictor: Predictor,
    identity: Identity,
    settings: StageSettings,
    *,
    overwrite: bool,
) -> dict[str, int] | None:
    """Write shards with the two columns alone; returns the counts, None where there was nothing to do."""
    with StageOutput(folder, identity, overwrite=overwrite, source=shards.folder) as output:
        if output.is_complete:
            log.info("nothing to do: %s is complete", output.folder)
            return None
        tasks = one_to_one(shards, output)
        write_missing_shards(partial(write_ids, predictor=predictor), tasks, output, settings, label="predict")
        totals = _count([Shard(task.shard.path, task.shard.n_rows) for task in tasks], predictor)
        output.finish([task.shard.name for task in tasks], settings, totals)
    return totals


def write_ids(task: ShardToShard, *, predictor: Predictor) -> dict[str, Any]:
    """Write the ids of one shard, and nothing else, to a shard of its own."""
    find_ids = partial(predictor.find_ids, where=str(task.source.path))
    tables = (find_ids(table) for table in task.source.iter_tables([predictor.vector_column]))
    empty = no_rows(task.source.schema).select([predictor.vector_column])
    return task.shard.write(find_ids(empty).schema, tables)


def _count(shards: Sequence[Shard], predictor: Predictor) -> dict[str, int]:
    """Rows, clusters, and rows that have no vector and so no cluster."""
    n_rows = n_without_vector = 0
    for shard in shards:
        for table in shard.iter_tables([predictor.id_column]):
            n_rows += table.num_rows
            n_without_vector += table[predictor.id_column].null_count
    return {"rows": n_rows, "clusters": len(predictor.centroids.ids), "without_vector": n_without_vector}
