"""Evaluations on disk: one folder for each, `_tuning/000017/`, whose evaluation.json is written last.

records = Records(output_dir / "_tuning")
records.write(evaluation, report)
records.find(phase=2, key=key)          # the stored evaluation of equal clusters, or None
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from common.commit import make_folder, remove_stale_temporaries, save_array, write_json
from common.config import UserError
from image_parts.purity import PurityReport
from image_parts.tables import COSINE_MATRIX, PURITY_REPORT
from image_parts.tuning.evaluate import Evaluation

log = logging.getLogger(__name__)

EVALUATION = "evaluation.json"


def iteration_dir(tuning_dir: Path, iteration: int) -> Path:
    """The folder of one evaluation."""
    return tuning_dir / f"{iteration:06d}"


def write_evaluation(tuning_dir: Path, evaluation: Evaluation, report: PurityReport | None) -> None:
    """Write the files of one evaluation; from the last one on it counts as done.

    Only that one is flushed to the disk. It holds the sizes of the others, by which they are known to be whole.
    """
    folder = iteration_dir(tuning_dir, evaluation.iteration)
    sizes = {}
    if report is not None:
        make_folder((folder / PURITY_REPORT).parent)
        with (folder / COSINE_MATRIX).open("wb") as file:
            save_array(file, report.centroid_cosine_matrix)
        values = {**report.to_dict(), "tuning": evaluation.metrics, "score": evaluation.score}
        (folder / PURITY_REPORT).write_bytes((json.dumps(values, indent=1) + "\n").encode())
        sizes = {name: (folder / name).stat().st_size for name in (COSINE_MATRIX, PURITY_REPORT)}
    write_json(folder / EVALUATION, {**evaluation.to_dict(), "sizes": sizes})


def read_evaluation(tuning_dir: Path, iteration: int) -> Evaluation | None:
    """One evaluation as it was written; None where it was not finished or is damaged, so that it is made again."""
    path = iteration_dir(tuning_dir, iteration) / EVALUATION
    try:
        values = json.loads(path.read_bytes())
        for name, size in values.pop("sizes").items():
            if (path.parent / name).stat().st_size != size:
                raise ValueError(f"{name} beside it is not whole")
        return Evaluation(**values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        log.warning("%s is damaged; this candidate is evaluated again: %s", path, problem)
        return None


class Records:
    """All evaluations of one run."""

    def __init__(self, tuning_dir: Path) -> None:
        self.tuning_dir = tuning_dir
        self._by_key: dict[tuple[int, str], Evaluation] = {}
        folders = sorted(tuning_dir.glob("[0-9]*")) if tuning_dir.is_dir() else []
        for folder in folders:
            if folder.is_dir():
                remove_stale_temporaries(folder)
            evaluation = read_evaluation(tuning_dir, int(folder.name)) if folder.name.isdigit() else None
            if evaluation is not None:
                self.add(evaluation)

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, evaluation: Evaluation) -> None:
        """Know an evaluation that is on disk."""
        self._by_key[evaluation.phase, evaluation.key] = evaluation

    def find(self, *, phase: int, key: str) -> Evaluation | None:
        """The evaluation of a candidate that gives these clusters, if there is one."""
        return self._by_key.get((phase, key))

    def all(self) -> list[Evaluation]:
        """Every evaluation, in the order of iterations."""
        return sorted(self._by_key.values(), key=lambda evaluation: evaluation.iteration)


def require_evaluation(tuning_dir: Path, iteration: int) -> Evaluation:
    """One evaluation; raises UserError where there is none."""
    found = read_evaluation(tuning_dir, iteration)
    if found is None:
        raise UserError(
            f"iteration {iteration} is not in {tuning_dir}; tuning_results_all.csv lists those that are there"
        )
    return found
