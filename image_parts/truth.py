"""True labels, where somebody has them: read from folders or a CSV, and held against the clusters.

    truth = read_truth(records, "parent_folder", input_dir=input_dir, image_subdir="img")
    compare_with_truth(clustered.labels, truth)["nmi"]

They are told, never used: no cluster depends on them.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import UserError
from common.quality import Agreement, Contingency
from image_parts.records import ImageRecord, number_or_none

PARENT_FOLDER = "parent_folder"


@dataclass(frozen=True)
class TrueLabels:
    """The label of each image, and where they came from."""

    labels: list[str | None]  # [n]
    source: str
    n_unmatched: int  # rows of the CSV that name no image


def read_truth(records: Sequence[ImageRecord], source: str, *, input_dir: Path, image_subdir: str) -> TrueLabels:
    """True labels of images: the name of their parent folder, or a CSV with the columns `path` and `label`.

    A parent folder called `image_subdir` is passed over, as it only parts images from labels. Paths in the CSV are
    relative to `input_dir` or absolute; a bare file name does where it is unique.

    Raises UserError where the CSV cannot be used or names none of the images.
    """
    if source == PARENT_FOLDER:
        return TrueLabels([_folder_label(record.relative_path, image_subdir) for record in records], source, 0)
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"purity.truth {path} is no file; give a CSV with the columns path and label, or parent_folder")
    given = _read_label_csv(path)
    matches = _match_paths(records, given)
    used = set(matches) - {None}
    if records and not used:
        raise UserError(
            f"purity.truth {path}: none of its {len(given)} paths is one of the {len(records)} images, such as "
            f"{records[0].relative_path}; give paths relative to {input_dir}"
        )
    labels = [None if match is None else given[match] for match in matches]
    return TrueLabels(labels, str(path), len(given.keys() - used))


def compare_with_truth(labels: np.ndarray, truth: TrueLabels) -> dict[str, Any]:
    """NMI, ARI, ACC and purity of all images against true labels.

    ACC counts labelled images that are noise as wrong; the other scores leave noise out, and `coverage` says how much
    that is.
    """
    counts = Contingency()
    counts.update(labels, truth.labels)
    scores: Agreement = counts.agreement()
    return {
        "source": truth.source,
        "n_images": scores.n_rows,
        "n_labeled": scores.n_scored + scores.n_without_cluster,
        "n_unmatched": truth.n_unmatched,
        "n_labels": scores.n_labels,
        "n_clusters": scores.n_clusters,
        "acc": number_or_none(scores.accuracy * scores.coverage),
        "nmi": number_or_none(scores.nmi),
        "ari": number_or_none(scores.ari),
        "ami": number_or_none(scores.ami),
        "purity": number_or_none(scores.purity),
        "coverage": number_or_none(scores.coverage),
    }


def _match_paths(records: Sequence[ImageRecord], given: Mapping[str, str]) -> list[str | None]:
    """The path by which a CSV names each image; None where it does not."""
    n_of_name = Counter(Path(record.relative_path).name for record in records)
    matches = []
    for record in records:
        name = Path(record.relative_path).name
        candidates = [record.relative_path, str(record.path), *([name] if n_of_name[name] == 1 else [])]
        matches.append(next((candidate for candidate in candidates if candidate in given), None))
    return matches


def _folder_label(relative_path: str, image_subdir: str) -> str | None:
    folders = [part for part in Path(relative_path).parts[:-1] if part != image_subdir]
    return folders[-1] if folders else None


def _read_label_csv(path: Path) -> dict[str, str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            if not {"path", "label"} <= set(columns):
                raise UserError(f"purity.truth {path} has the columns {columns}; it needs path and label")
            return {row["path"]: row["label"] for row in reader}
    except (UnicodeDecodeError, csv.Error) as problem:
        raise UserError(f"purity.truth {path} cannot be read: {problem}; save it as CSV in UTF-8") from None
