"""Which labels there are, and their numbers: all labels for SupCon, those with a classifier row for the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from common.config import UserError
from metric_parts.dataset import Rows

NO_CLASS = -1


@dataclass(frozen=True)
class Labels:
    """The labels of a training set, as text; 3, "3" and 3.0 are one label."""

    names: tuple[str, ...]  # what SupCon tells apart
    classes: tuple[str, ...]  # what the head tells apart: labels with at least one classifier row

    @cached_property
    def _codes(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self.names)}

    @cached_property
    def _class_codes(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self.classes)}

    def codes(self, labels: Sequence[str]) -> np.ndarray:
        """Numbers of labels among `names`, [n] int64; NO_CLASS where training has no such label."""
        return np.array([self._codes.get(label, NO_CLASS) for label in labels], np.int64)

    def class_codes(self, labels: Sequence[str]) -> np.ndarray:
        """Numbers of labels among `classes`, [n] int64; NO_CLASS where the head has no such class."""
        return np.array([self._class_codes.get(label, NO_CLASS) for label in labels], np.int64)

    def to_dict(self) -> dict[str, list[str]]:
        """JSON-ready values."""
        return {"names": list(self.names), "classes": list(self.classes)}


def find_labels(rows: Rows) -> Labels:
    """The labels of the training rows: whole numbers in their order, else texts in theirs.

    Raises UserError where fewer than two classes have a classifier row.
    """
    classes = {label for label, is_used in zip(rows.labels, rows.classifier_mask, strict=True) if is_used}
    if len(classes) < 2:
        found = f"only {sorted(classes)[0]!r}" if classes else "none"
        raise UserError(
            f"the training rows with classifier_mask=1 have {found} of the two classes that a classifier needs; set "
            f"classifier_mask to 1 for labelled rows of at least two labels"
        )
    return Labels(_in_order(set(rows.labels)), _in_order(classes))


def _in_order(labels: set[str]) -> tuple[str, ...]:
    def number(label: str) -> int | None:
        try:
            return int(label)
        except ValueError:
            return None

    if all(number(label) is not None for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))
