"""The columns `probs` and `prediction`: of a classification head, or of prototypes where a model has none.

A row's probabilities stand in the order of the classes, whose names are in the metadata of the column `probs`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from common.columns import label_strings, number_array, read_vectors, replace_columns, text_array, vector_array
from common.config import canonical_json
from common.layers import LayerTask
from common.shards import Shard, read_stamp

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)


def add_probs(
    table: pa.Table, probs: np.ndarray | None, *, usable: Sequence[int], classes: Sequence[str] | None
) -> pa.Table:
    """The table with both columns: `probs` [m, c] are those of the rows `usable` [m]; all are null where it is None."""
    import pyarrow as pa

    n_rows = table.num_rows
    if probs is None or classes is None:
        return replace_columns(
            table, {"probs": pa.nulls(n_rows, pa.list_(pa.float32())), "prediction": pa.nulls(n_rows, pa.string())}
        )
    valid = np.zeros(n_rows, bool)
    valid[usable] = True
    all_probs = np.zeros((n_rows, len(classes)), np.float32)
    all_probs[usable] = probs
    codes = number_array(all_probs.argmax(axis=1), valid=valid)
    return replace_columns(
        table,
        {
            "probs": vector_array(all_probs, valid=valid),
            "prediction": text_array(classes).take(codes),
        },
        field_metadata={"probs": {"classes": canonical_json(list(classes))}},
    )


def classes_of(shard: Shard) -> list[str] | None:
    """The names of the classes of a shard's `probs`; None where it has none."""
    metadata = shard.schema.field("probs").metadata or {}
    return list(json.loads(metadata[b"classes"])) if b"classes" in metadata else None


# --- Prototypes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prototypes:
    """The mean direction of each class among the rows that carry a label."""

    classes: list[str]
    centers: np.ndarray  # [c, d] float32, unit length

    def find_probs(self, table: pa.Table, *, temperature: float) -> pa.Table:
        """Both columns, by a softmax over the cosines of `cls` to the classes."""
        column = read_vectors(table["cls"], where="cls", dimension=self.centers.shape[1])
        cosines = _unit(column.vectors) @ self.centers.T  # [n, c]
        scores = np.exp((cosines - cosines.max(axis=1, keepdims=True, initial=-1.0)) / temperature)
        probs = scores / scores.sum(axis=1, keepdims=True)
        usable = np.flatnonzero(column.valid).tolist()
        with_probs = add_probs(table, probs[usable].astype(np.float32), usable=usable, classes=self.classes)
        return with_probs.select(["probs", "prediction"])


def has_own_probs(shard: Shard) -> bool:
    """Whether a classification head, and no prototypes, gave the shard its `probs`."""
    stamp = read_stamp(shard.path)
    return classes_of(shard) is not None and stamp is not None and "prototypes" not in stamp.layers


def fit_prototypes(shards: Sequence[Shard]) -> Prototypes | None:
    """Mean unit vector of each class among the labelled rows, in one pass; None where no row has a label."""
    if "label" not in shards[0].schema.names:
        return None
    code_of: dict[str, int] = {}
    sums = np.zeros((0, shards[0].schema.field("cls").type.list_size))  # [c, d] float64
    for shard in shards:
        for table in shard.iter_tables(["cls", "label"]):
            column = read_vectors(table["cls"], where=str(shard.path))
            texts = label_strings(table["label"])
            labels = [label if usable else None for label, usable in zip(texts, column.valid, strict=True)]
            codes = np.array([-1 if label is None else code_of.setdefault(label, len(code_of)) for label in labels])
            sums = np.concatenate([sums, np.zeros((len(code_of) - len(sums), sums.shape[1]))])
            labelled = np.flatnonzero(codes >= 0)
            np.add.at(sums, codes[labelled], _unit(column.vectors[labelled].astype(np.float64)))
    if not code_of:
        return None
    classes = sorted(code_of)
    return Prototypes(classes, _unit(sums[[code_of[name] for name in classes]]).astype(np.float32))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def write_prototype_probs(shards: Sequence[Shard], prototypes: Prototypes, *, temperature: float) -> None:
    """Give every shard `probs` by its nearness to the prototypes; one that has them by these very ones is left."""
    log.info("probs by prototypes of %d classes: nearness to the mean vector of each", len(prototypes.classes))
    fingerprint = canonical_json({"classes": prototypes.classes, "temperature": temperature})
    for shard in shards:
        task = LayerTask(shard, "prototypes", {"stage": "prototypes"}, fingerprint)
        if not task.is_done():
            compute = partial(prototypes.find_probs, temperature=temperature)
            task.write(compute, reads=["cls"])
