"""The file stage: sort the files by a plan, go on after a kill, and put every file back.

    plan = plan_files(clustered, …)
    report = organize(plan)                 # writes plan.jsonl and journal.jsonl into the output folder
    report = resume(output_dir)             # finishes what a kill cut short
    report = undo(output_dir)               # puts every file back, byte for byte

Each of the three may be killed and called again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.commit import make_folder, remove_stale_temporaries
from common.config import UserError
from image_parts.journal import Journal, Stage, read_state
from image_parts.placer import Placer
from image_parts.plan import PLAN_NAME, Plan, read_plan, write_plan
from image_parts.plan_check import check_plan
from image_parts.restorer import Restorer


@dataclass(frozen=True)
class FileReport:
    """What the file stage did."""

    stage: Stage
    output_dir: str
    n_images: int  # in the plan
    n_labels: int
    n_changed: int  # files placed, or put back, by this call
    skipped: tuple[tuple[str, str], ...]  # (path, reason): left where they are
    labels: dict[str, int]
    n_renamed: int

    @property
    def summary(self) -> str:
        """One line for the log."""
        verb = "put back" if self.stage in ("undone", "undoing") else "placed"
        left = f", {len(self.skipped):,} left where they are" if self.skipped else ""
        return f"{self.n_changed:,} files {verb}{left} ({self.n_images:,} images, {self.n_labels:,} labels planned)"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def find_stage(output_dir: str | Path) -> Stage:
    """Tell what happened in an output folder: none, unfinished, finished, undoing or undone."""
    folder = Path(output_dir)
    if not (folder / PLAN_NAME).exists():
        return "none"
    return read_state(folder, plan_digest=read_plan(folder).digest).stage


def organize(plan: Plan, *, progress: bool = False) -> FileReport:
    """Check the plan, write it, and do it; with the same plan again it finishes, or does nothing.

    Raises UserError where the plan cannot be done (and nothing was touched), where another plan holds the folder, or
    where the disk fills up; what was done until then stays, for `resume` or `undo`.
    """
    output_dir = Path(plan.output_dir)
    if (output_dir / PLAN_NAME).exists():
        _refuse_other_plan(plan, output_dir)
    if read_state(output_dir, plan_digest=plan.digest).stage in ("none", "undone"):
        check_plan(plan)
        make_folder(output_dir)
        remove_stale_temporaries(output_dir)
        write_plan(plan, folder=output_dir)
    return _go_forward(plan, output_dir, progress=progress)


def resume(output_dir: str | Path, *, progress: bool = False) -> FileReport:
    """Finish the plan of an output folder; raises UserError where there is none or an undo is under way."""
    plan = read_plan(Path(output_dir))
    return _go_forward(plan, Path(output_dir), progress=progress)


def undo(output_dir: str | Path, *, progress: bool = False) -> FileReport:
    """Put every file back to where it was and remove what was made; killed, it is started again in the same way.

    Never overwrites: a file whose old place is taken, and a copy that was changed or whose source is gone, stay and are
    reported. Raises UserError where there is no plan.
    """
    folder = Path(output_dir)
    plan = read_plan(folder)
    with Journal(folder, plan_digest=plan.digest) as journal:
        if journal.state.stage == "undone":
            return _report(plan, journal, folder, n_changed=0)
        if journal.state.stage != "undoing":
            journal.add("undo")
        restorer = Restorer(plan, folder, journal)
        try:
            n_changed = restorer.put_back(progress=progress)
        except OSError as problem:
            raise _explain(problem, folder) from problem
        if not restorer.left:
            journal.add("undone")
        return _report(plan, journal, folder, n_changed=n_changed, left=restorer.left)


def _refuse_other_plan(plan: Plan, output_dir: Path) -> None:
    before = read_plan(output_dir)
    stage = read_state(output_dir, plan_digest=before.digest).stage
    if before.digest != plan.digest and stage in ("unfinished", "finished", "undoing"):
        remedy = {"unfinished": "finish it with --resume, or put", "undoing": "finish that with --undo; put"}
        raise UserError(
            f"{output_dir} holds {len(before.actions):,} files of another plan ({stage}); "
            f"{remedy.get(stage, 'put')} them back with --undo, or choose another output_dir"
        )


def _go_forward(plan: Plan, output_dir: Path, *, progress: bool) -> FileReport:
    with Journal(output_dir, plan_digest=plan.digest) as journal:
        if journal.state.stage == "undoing":
            raise UserError(f"the files in {output_dir} are being put back; finish that with --undo first")
        if journal.state.stage == "finished":
            return _report(plan, journal, output_dir, n_changed=0)
        if journal.state.stage != "unfinished":
            journal.add("begin")
        try:
            n_changed = Placer(plan, output_dir, journal).place_all(progress=progress)
        except OSError as problem:
            raise _explain(problem, output_dir) from problem
        journal.add("finished")
        return _report(plan, journal, output_dir, n_changed=n_changed)


def _explain(problem: OSError, output_dir: Path) -> UserError:
    """What the system refused, and that nothing is lost."""
    if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        what = f"the disk of {output_dir} is full; free some space"
    else:
        where = problem.filename or output_dir
        what = f"{where}: {problem.strerror or problem}; mend that"
    return UserError(
        f"{what} and go on with --resume, or put all back with --undo: every file is whole, at its old place or its new"
    )


def _report(
    plan: Plan, journal: Journal, output_dir: Path, *, n_changed: int, left: Sequence[tuple[str, str]] = ()
) -> FileReport:
    reasons = sorted(journal.state.reasons.items())
    skipped = [(plan.actions[number].source, reason) for number, reason in reasons]
    return FileReport(
        stage=journal.state.stage,
        output_dir=os.fspath(output_dir),
        n_images=plan.count("image"),
        n_labels=plan.count("label"),
        n_changed=n_changed,
        skipped=(*plan.left_out, *skipped, *left),
        labels=asdict(plan.labels),
        n_renamed=plan.n_renamed,
    )
