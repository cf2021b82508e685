"""The plan of the file stage, every source, target and hash of it, and how it is written down.

    write_plan(plan, folder=output_dir)
    plan = read_plan(output_dir)

`plan.jsonl` holds a first line about the whole and one line for each action. It depends on nothing but the input, so
that the same run again makes the same bytes. Neither a plan that is made nor one that is read is ever in memory as a
whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.commit import atomic_file
from common.config import UserError
from image_parts import yolo
from image_parts.actions import ActionLines, Mode, Role, read_actions

PLAN_NAME = "plan.jsonl"
PLAN_FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """All actions of one run and what was counted on the way."""

    mode: Mode
    input_dir: str
    output_dir: str
    actions: ActionLines
    labels: yolo.LabelCounts = field(default_factory=yolo.LabelCounts)
    n_renamed: int = 0  # images whose name was taken or too long
    n_linked_images: int = 0  # images that are symbolic links: their content is copied, the links stay
    left_out: tuple[tuple[str, str], ...] = ()  # (image path, reason): gone or changed since the scan
    # [n] int64: the action of each clustered image, -1 for those left out; None in a plan that was read.
    image_actions: np.ndarray | None = field(default=None, compare=False, repr=False)

    @cached_property
    def digest(self) -> str:
        """sha256 of `plan.jsonl`."""
        digest = hashlib.sha256()
        for block in _plan_blocks(self):
            digest.update(block)
        return digest.hexdigest()

    def image_targets(self, part: slice) -> list[str | None]:
        """Where some of the clustered images go: paths below output_dir, None for those left out."""
        if self.image_actions is None:
            raise ValueError("this plan was read, and does not tell which image is in which row")
        return [None if number < 0 else self.actions[number].target for number in self.image_actions[part].tolist()]

    def count(self, role: Role) -> int:
        """Number of actions with this role."""
        return self.actions.n_of_role[role]


def write_plan(plan: Plan, *, folder: Path) -> None:
    """Write `plan.jsonl` atomically."""
    with atomic_file(folder / PLAN_NAME) as file:
        file.writelines(_plan_blocks(plan))


def read_plan(output_dir: Path) -> Plan:
    """Read `plan.jsonl` of an output folder; raises UserError where there is none or it is damaged."""
    path = output_dir / PLAN_NAME
    if not path.is_file():
        raise UserError(f"{path} does not exist: no files were sorted into this folder; check output_dir")
    try:
        with path.open("rb") as file:
            first = next(file)
        head = json.loads(first)
        actions = read_actions(path, start=len(first))
        if head.pop("format") != PLAN_FORMAT or head.pop("n_actions") != len(actions):
            raise ValueError("other format or number of lines")
        left_out = tuple((source, reason) for source, reason in head.pop("left_out"))
        labels = yolo.LabelCounts(**head.pop("labels"))
        return Plan(actions=actions, labels=labels, left_out=left_out, **head)
    except (ValueError, TypeError, KeyError, StopIteration) as problem:
        raise UserError(f"{path} is damaged ({problem}); nothing was touched. Restore it from a backup") from None


def _plan_blocks(plan: Plan) -> Iterator[bytes]:
    """The bytes of `plan.jsonl`, some lines at a time."""
    head: dict[str, Any] = {
        "format": PLAN_FORMAT,
        "mode": plan.mode,
        "input_dir": plan.input_dir,
        "output_dir": plan.output_dir,
        "n_actions": len(plan.actions),
        "labels": asdict(plan.labels),
        "n_renamed": plan.n_renamed,
        "n_linked_images": plan.n_linked_images,
        "left_out": plan.left_out,
    }
    yield json.dumps(head).encode() + b"\n"
    yield from plan.actions.blocks()
