"""Validation rows split off the training rows: stratified, and never with one text on both sides."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from common.config import UserError
from metric_parts.dataset import Rows

log = logging.getLogger(__name__)

# A class keeps at least this many texts for training: fewer give SupCon no pair.
_MIN_TRAIN_TEXTS = 2


@dataclass(frozen=True)
class Split:
    """Positions of the rows of either side."""

    train: np.ndarray  # [n] int64, ascending
    valid: np.ndarray  # [m] int64, ascending


def split_rows(rows: Rows, *, val_ratio: float, seed: int) -> Split:
    """Hold out a share of the texts of each class; rows with equal text go to one side together.

    A text is of the class that most of its rows have. Only texts with a gold row are held out, and a class keeps two
    texts for training where it has them; classes too small to share stay in training as a whole and are counted.

    Raises UserError where nothing would be held out.
    """
    classes, class_of_row = np.unique(np.asarray(rows.labels), return_inverse=True)
    class_of_text = _majority(rows.text_keys, class_of_row)
    has_gold = np.zeros(len(class_of_text), bool)
    np.logical_or.at(has_gold, rows.text_keys, rows.is_gold)
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(class_of_text), bool)
    n_whole = 0
    for code in range(len(classes)):
        texts = np.flatnonzero(class_of_text == code)
        candidates = texts[has_gold[texts]]
        n_valid = min(round(val_ratio * len(candidates)), max(len(texts) - _MIN_TRAIN_TEXTS, 0))
        held_out[rng.permutation(candidates)[:n_valid]] = True
        n_whole += n_valid == 0
    is_valid = held_out[rows.text_keys]
    if not is_valid.any():
        raise UserError(
            f"data.val_ratio {val_ratio} holds out no row: the {len(classes)} classes have too few texts with a gold "
            f"label; raise it, give data.valid_parquet_path, or set it to 0 to train without validation"
        )
    if n_whole:
        log.warning("%d of %d classes are too small to be split and have no validation rows", n_whole, len(classes))
    return Split(np.flatnonzero(~is_valid), np.flatnonzero(is_valid))


def _majority(text_keys: np.ndarray, class_of_row: np.ndarray) -> np.ndarray:
    """The most frequent class of each text, [n_texts]; the first of equals, -1 where no row has the text."""
    n_texts = int(text_keys.max()) + 1
    pairs, counts = np.unique(np.stack([text_keys, class_of_row], axis=1), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], -counts))
    majority = np.full(n_texts, -1, np.int64)
    for row in order[::-1]:
        majority[pairs[row, 0]] = pairs[row, 1]
    return majority
