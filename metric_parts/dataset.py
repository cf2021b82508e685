"""Training rows out of parquet: texts, labels and the two masks, checked before anything is computed."""

from __future__ import annotations

import glob
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.columns import label_strings
from common.config import UserError
from common.shards import Shard, open_shards, read_footer
from metric_parts.settings import DataSettings

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

METRIC_MASK = "metric_mask"
CLASSIFIER_MASK_NAMES = ("classifier_mask", "classification_mask")
GOLD = "gold"

_NOT_WORD = re.compile(r"[^\w]+")


@dataclass(frozen=True)
class Rows:
    """Rows of which at least one loss is made."""

    texts: list[str]
    labels: list[str]
    metric_mask: np.ndarray  # [n] bool: SupCon is made of this row
    classifier_mask: np.ndarray  # [n] bool: the cross-entropy is made of this row
    is_gold: np.ndarray  # [n] bool: the label was given by people, as far as the input says
    text_keys: np.ndarray  # [n] int64: equal for texts that differ in case, spaces and punctuation alone

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> Rows:
        """The rows at these positions."""
        return Rows(
            [self.texts[row] for row in rows],
            [self.labels[row] for row in rows],
            self.metric_mask[rows],
            self.classifier_mask[rows],
            self.is_gold[rows],
            self.text_keys[rows],
        )


def normalize_text(text: str) -> str:
    """The text without case, punctuation and spaces at its ends: what makes two texts the same to us."""
    folded = _NOT_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return folded or text.strip()


def read_rows(path: str, *, settings: DataSettings, need_masks: bool = True) -> Rows:
    """Read the rows of a parquet file, a folder or a glob; rows that feed neither loss are left out and counted.

    Rows to validate or test on may come without masks (`need_masks` false): then all of them count.
    Raises UserError where files or columns are missing, a mask is not 0/1, or a label is null where a mask is 1.
    """
    texts: list[str] = []
    labels: list[str] = []
    columns: dict[str, list[np.ndarray]] = {"metric": [], "classifier": [], "gold": []}
    keys: dict[str, int] = {}
    text_keys: list[int] = []
    n_idle = n_blank = n_read = 0
    for shard in find_shards(path):
        for table in _tables(shard, settings, need_masks=need_masks):
            part = _read_part(table, shard.path, settings)
            blank = np.array([text is None or not text.strip() for text in part.texts], bool)
            idle = ~(part.metric | part.classifier)
            _require_labels(part, ~blank & ~idle, shard.path, n_read)
            n_read += len(blank)
            n_blank += int(blank.sum())
            n_idle += int((idle & ~blank).sum())
            used = np.flatnonzero(~blank & ~idle)
            texts += [str(part.texts[row]) for row in used]
            labels += [str(part.labels[row]) for row in used]
            text_keys += [keys.setdefault(normalize_text(str(part.texts[row])), len(keys)) for row in used]
            for name, mask in (("metric", part.metric), ("classifier", part.classifier), ("gold", part.gold)):
                columns[name].append(mask[used])
    masks = {name: np.concatenate(parts) if parts else np.zeros(0, bool) for name, parts in columns.items()}
    log.info("%s: %d rows read, %d in use, %d with both masks 0, %d blank", path, n_read, len(texts), n_idle, n_blank)
    if not texts:
        raise UserError(
            f"{path}: none of its {n_read} rows has a text and a mask of 1; set metric_mask or classifier_mask to 1 "
            f"for the rows to learn from (cluster_update_dataset.py writes both)"
        )
    return Rows(texts, labels, masks["metric"], masks["classifier"], masks["gold"], np.asarray(text_keys, np.int64))


def share_text_keys(parts: Sequence[Rows]) -> list[Rows]:
    """The same parts with keys by which texts can be compared between them."""
    keys: dict[str, int] = {}
    shared = []
    for rows in parts:
        own = [keys.setdefault(normalize_text(text), len(keys)) for text in rows.texts]
        shared.append(
            Rows(rows.texts, rows.labels, rows.metric_mask, rows.classifier_mask, rows.is_gold, np.array(own, np.int64))
        )
    return shared


# --- Files -----------------------------------------------------------------------------------------------------------


def find_shards(path: str) -> list[Shard]:
    """The parquet files of a path: one file, a folder (its `_SUCCESS` obeyed where it has one), or a glob."""
    if Path(path).is_dir():
        return list(open_shards(path, written_by="cluster_update_dataset.py").shards)
    found = sorted(Path(name) for name in glob.glob(path, recursive=True))  # noqa: PTH207 - an absolute pattern too
    if not found:
        raise UserError(f"{path} does not exist; run cluster_update_dataset.py first, or check data.parquet_path")
    return [Shard(file, read_footer(file).num_rows) for file in found]


def _tables(shard: Shard, settings: DataSettings, *, need_masks: bool) -> Iterator[pa.Table]:
    names = shard.schema.names
    masks = [name for name in (METRIC_MASK, *CLASSIFIER_MASK_NAMES) if name in names]
    if len(masks) == 3:
        raise UserError(f"{shard.path} has both {' and '.join(masks[1:])}, which mean the same; keep one of them")
    needed = [settings.text_column, settings.label_column]
    if need_masks:
        needed += [METRIC_MASK, masks[-1] if masks and masks[-1] != METRIC_MASK else CLASSIFIER_MASK_NAMES[0]]
    missing = [name for name in needed if name not in names]
    if missing:
        raise UserError(
            f"{shard.path} has no column {missing[0]!r} (has: {', '.join(names)}); cluster_update_dataset.py writes "
            f"text, label and both masks; other names of text and label go into data.text_column, data.label_column"
        )
    source = [settings.source_column] if settings.source_column in names else []
    yield from shard.iter_tables([settings.text_column, settings.label_column, *masks, *source])


# --- Columns ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    texts: list[str | None]
    labels: list[str | None]
    metric: np.ndarray
    classifier: np.ndarray
    gold: np.ndarray


def _read_part(table: pa.Table, path: Path, settings: DataSettings) -> _Part:
    texts = table[settings.text_column].to_pylist()
    odd = next((text for text in texts if text is not None and not isinstance(text, str)), None)
    if odd is not None:
        raise UserError(f"{path}: column {settings.text_column!r} holds {odd!r}, which is no text; check the config")
    gold = np.ones(table.num_rows, bool)
    if settings.source_column in table.column_names:
        gold = np.array([value == GOLD for value in table[settings.source_column].to_pylist()], bool)
    return _Part(
        texts,
        label_strings(table[settings.label_column]),
        _read_mask(table, (METRIC_MASK,), path),
        _read_mask(table, CLASSIFIER_MASK_NAMES, path),
        gold,
    )


def _read_mask(table: pa.Table, names: Sequence[str], path: Path) -> np.ndarray:
    name = next((name for name in names if name in table.column_names), None)
    if name is None:
        return np.ones(table.num_rows, bool)
    values = table[name].to_pylist()
    odd = next((index for index, value in enumerate(values) if value not in (0, 1)), None)
    if odd is not None:
        raise UserError(f"{path}: column {name} must be 0 or 1 in every row, but holds {values[odd]!r} in row {odd}")
    return np.array(values, bool)


def _require_labels(part: _Part, used: np.ndarray, path: Path, first_row: int) -> None:
    without = [row for row in np.flatnonzero(used) if part.labels[row] is None]
    if without:
        shown = ", ".join(str(first_row + row) for row in without[:3])
        raise UserError(
            f"{path}: {len(without)} rows have a mask of 1 and no label (rows {shown}…); give them labels, or set both "
            f"masks to 0"
        )
