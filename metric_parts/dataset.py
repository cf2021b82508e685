"""Training rows out of parquet: texts, labels and the two masks, checked before anything is computed."""

from __future__ import annotations

import glob
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.columns import label_strings
from common.config import UserError
from common.shards import Shard, damaged, open_shards, read_footer
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


def read_rows(path: str, *, settings: DataSettings, need_masks: bool = True, key: str = "data.parquet_path") -> Rows:
    """Read the rows of a parquet file, a folder or a glob; rows that feed neither loss are left out and counted.

    Rows to validate or test on may come without masks (`need_masks` false): then all of them count. `key` is the key of
    the config that gave `path`, for messages.
    Raises UserError where files or columns are missing, a mask is not 0/1, or a label is null where a mask is 1.
    """
    used: list[Rows] = []
    n_read = n_blank = n_idle = 0
    for shard in find_shards(path, key=key):
        first_row = 0  # of the piece, in its file
        for table in _tables(shard, settings, need_masks=need_masks):
            part = _read_part(table, shard.path, settings, first_row=first_row)
            first_row += table.num_rows
            n_read += table.num_rows
            n_blank += int(part.is_blank.sum())
            n_idle += int((part.is_idle & ~part.is_blank).sum())
            used.append(part.used_rows())
    rows = _join(used)
    log.info("%s: %d rows read, %d in use, %d with both masks 0, %d blank", path, n_read, len(rows), n_idle, n_blank)
    if not len(rows):
        raise UserError(
            f"{path}: none of its {n_read} rows has a text and a mask of 1; set metric_mask or classifier_mask to 1 "
            f"for the rows to learn from (cluster_update_dataset.py writes both), or check {key}"
        )
    return rows


def share_text_keys(parts: Sequence[Rows]) -> list[Rows]:
    """The same parts with keys by which texts can be compared between them."""
    numbers: dict[str, int] = {}
    return [replace(rows, text_keys=_number_texts(rows.texts, numbers)) for rows in parts]


def _join(parts: Sequence[Rows]) -> Rows:
    texts = [text for part in parts for text in part.texts]
    labels = [label for part in parts for label in part.labels]
    masks = {
        name: np.concatenate([np.zeros(0, bool), *(getattr(part, name) for part in parts)])
        for name in ("metric_mask", "classifier_mask", "is_gold")
    }
    return Rows(texts, labels, **masks, text_keys=_number_texts(texts, {}))


def _number_texts(texts: Sequence[str], numbers: dict[str, int]) -> np.ndarray:
    """Numbers of normalised texts, [n] int64: the known ones, and new ones in their order, which are added."""
    return np.array([numbers.setdefault(normalize_text(text), len(numbers)) for text in texts], np.int64)


# --- Files -----------------------------------------------------------------------------------------------------------


def find_shards(path: str, *, key: str = "data.parquet_path") -> list[Shard]:
    """The parquet files of a path: one file, a folder (its `_SUCCESS` obeyed where it has one), or a glob."""
    if Path(path).is_dir():
        return list(open_shards(path, written_by="cluster_update_dataset.py").shards)
    found = sorted(Path(name) for name in glob.glob(path, recursive=True))  # noqa: PTH207 - an absolute pattern too
    if not found:
        hint = "run cluster_update_dataset.py first, or check" if key == "data.parquet_path" else "check"
        raise UserError(f"{path} does not exist; {hint} {key}")
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
    """A piece of a file."""

    texts: list[str | None]
    labels: list[str | None]
    metric: np.ndarray
    classifier: np.ndarray
    gold: np.ndarray
    is_blank: np.ndarray  # [n] bool: no text

    @property
    def is_idle(self) -> np.ndarray:
        """Rows that feed neither loss, [n] bool."""
        return ~(self.metric | self.classifier)

    def used_rows(self) -> Rows:
        """The rows that feed a loss; their texts are not numbered yet."""
        used = np.flatnonzero(~self.is_blank & ~self.is_idle)
        texts, labels = ([str(values[row]) for row in used] for values in (self.texts, self.labels))
        return Rows(texts, labels, self.metric[used], self.classifier[used], self.gold[used], np.zeros(0, np.int64))


def _read_part(table: pa.Table, path: Path, settings: DataSettings, *, first_row: int) -> _Part:
    try:
        texts = table[settings.text_column].to_pylist()
        labels = label_strings(table[settings.label_column])
    except UnicodeDecodeError as problem:
        raise damaged(path, problem) from None
    odd = next((text for text in texts if text is not None and not isinstance(text, str)), None)
    if odd is not None:
        raise UserError(
            f"{path}: column {settings.text_column!r} holds {odd!r}, which is no text; give the column with the texts "
            f"in data.text_column"
        )
    gold = np.ones(table.num_rows, bool)
    if settings.source_column in table.column_names:
        gold = np.array([value == GOLD for value in table[settings.source_column].to_pylist()], bool)
    is_blank = np.array([text is None or not text.strip() for text in texts], bool)
    metric = _read_mask(table, (METRIC_MASK,), path, first_row=first_row)
    classifier = _read_mask(table, CLASSIFIER_MASK_NAMES, path, first_row=first_row)
    part = _Part(texts, labels, metric, classifier, gold, is_blank)
    _require_labels(part, path, settings.label_column, first_row=first_row)
    return part


def _read_mask(table: pa.Table, names: Sequence[str], path: Path, *, first_row: int) -> np.ndarray:
    name = next((name for name in names if name in table.column_names), None)
    if name is None:
        return np.ones(table.num_rows, bool)
    values = table[name].to_pylist()
    odd = next((index for index, value in enumerate(values) if value not in (0, 1)), None)
    if odd is not None:
        raise UserError(
            f"{path}: column {name} must be 0 or 1 in every row, but holds {values[odd]!r} in row {first_row + odd}; "
            f"write numbers or booleans, and 0 where nothing is known"
        )
    return np.array(values, bool)


def _require_labels(part: _Part, path: Path, column: str, *, first_row: int) -> None:
    used = np.flatnonzero(~part.is_blank & ~part.is_idle)
    without = [first_row + row for row in used if part.labels[row] is None]
    if without:
        shown = ", ".join(map(str, without[:3])) + (", …" if len(without) > 3 else "")
        raise UserError(
            f"{path}: rows with a mask of 1, or without masks, need a label, but column {column} is empty in "
            f"{len(without)} of them (rows {shown}); give them labels, or set both masks to 0"
        )
