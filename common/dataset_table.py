"""The columns of the dataset that stage 6 writes for the trainer, and how many rows are in it by what."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from common.columns import is_vector, number_array, text_array
from common.labeler import Labeler, RowColumns
from common.pseudo_labels import REASONS, SOURCE_NAMES, Decisions
from common.shards import Shard

if TYPE_CHECKING:
    import pyarrow as pa

# What stages 1 and 2 call their vectors; they stay where they are.
_VECTOR_COLUMNS = ("cls", "pca")

# At most 18 digits: any such number fits in 64 bits.
_WHOLE_NUMBER = re.compile("-?[0-9]{1,18}")


def columns_to_read(schema: pa.Schema, columns: RowColumns) -> list[str]:
    """All columns but the vectors of earlier stages; a list of numbers of the user's own is carried along."""

    def is_of_earlier_stage(field: pa.Field) -> bool:
        is_ours = is_vector(field.type) and not field.type.value_field.nullable  # as `vector_array` makes them
        return field.name in _VECTOR_COLUMNS or is_ours

    return [field.name for field in schema if field.name == columns.probs or not is_of_earlier_stage(field)]


def dataset_table(table: pa.Table, decisions: Decisions, labeler: Labeler) -> pa.Table:
    """The columns of the dataset: the seven of this stage first, then every column carried along."""
    import pyarrow as pa

    columns = labeler.columns
    own = {
        "text": table[columns.text],
        "label": _label_column(table, decisions, labeler),
        "metric_mask": number_array(decisions.metric_mask.astype(np.int8)),
        "classifier_mask": number_array(decisions.classifier_mask.astype(np.int8)),
        "label_source": text_array(SOURCE_NAMES).take(number_array(decisions.source)),
        "label_reason": text_array(REASONS).take(number_array(decisions.reasons)),
        "label_confidence": number_array(np.minimum(decisions.confidence, 1.0).astype(np.float32)),
    }
    dropped = {columns.text, columns.label, columns.probs, *own}
    carried = {name: table[name] for name in table.schema.names if name not in dropped}
    return pa.table(own | carried)


def _label_column(table: pa.Table, decisions: Decisions, labeler: Labeler) -> pa.Array:
    """Labels in the type of the gold ones, where every label there is can be written in it, else as text."""
    import pyarrow as pa

    names, gold = labeler.names, labeler.columns.label
    codes = number_array(decisions.labels, valid=decisions.labels >= 0)
    gold_type = table.schema.field(gold).type if gold in table.schema.names else pa.string()
    if not pa.types.is_integer(gold_type) or not all(_WHOLE_NUMBER.fullmatch(name) for name in names):
        return text_array(names).take(codes)
    numbers = number_array(np.array([int(name) for name in names], np.int64))
    try:
        return numbers.cast(gold_type).take(codes)
    except pa.ArrowInvalid:  # a label of a cluster or of the classifier is too long for the type of the gold ones
        return numbers.take(codes)


def count_dataset(shards: Iterable[Shard]) -> dict[str, Any]:
    """Rows by source, mask and reason."""
    import pyarrow.compute as pc

    totals: dict[str, Any] = dict.fromkeys(
        ("rows", "gold", "cluster", "classifier", "metric_mask", "classifier_mask"), 0
    )
    reasons: dict[str, int] = {}
    for shard in shards:
        for table in shard.iter_tables(["label_source", "label_reason", "metric_mask", "classifier_mask"]):
            totals["rows"] += table.num_rows
            for mask in ("metric_mask", "classifier_mask"):
                totals[mask] += int(pc.sum(table[mask]).as_py() or 0)
            for count in pc.value_counts(table["label_source"].drop_null()).to_pylist():
                totals[count["values"]] += count["counts"]
            for count in pc.value_counts(table["label_reason"]).to_pylist():
                reasons[count["values"]] = reasons.get(count["values"], 0) + count["counts"]
    return totals | {"reasons": dict(sorted(reasons.items()))}
