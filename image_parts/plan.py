"""The plan of the file stage, every source, target and hash of it, and how it is written down.

    write_plan(plan, folder=output_dir)
    plan = read_plan(output_dir)

`plan.jsonl` holds a first line about the whole and one line for each action. It depends on nothing but the input, so
that the same run again makes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from common.commit import atomic_file
from common.config import UserError
from image_parts import yolo

PLAN_NAME = "plan.jsonl"
PLAN_FORMAT = 1

Mode = Literal["copy", "move", "hardlink", "symlink"]
Kind = Literal["copy", "move", "hardlink", "symlink", "write"]
Role = Literal["image", "label", "classes"]


@dataclass(frozen=True, slots=True)
class Action:
    """One file to be made. Actions of one group, an image and its label, are done together or not at all."""

    number: int
    group: int
    kind: Kind
    role: Role
    source: str  # absolute; "" for write
    target: str  # below output_dir
    sha256: str  # of the content
    n_bytes: int
    modified_ns: int  # of the source when it was planned
    content: str = ""  # of the file, for write


@dataclass(frozen=True)
class Plan:
    """All actions of one run and what was counted on the way."""

    mode: Mode
    input_dir: str
    output_dir: str
    actions: list[Action]
    labels: yolo.LabelCounts = field(default_factory=yolo.LabelCounts)
    n_renamed: int = 0  # images whose name was taken or too long
    n_linked_images: int = 0  # images that are symbolic links: their content is copied, the links stay
    left_out: tuple[tuple[str, str], ...] = ()  # (image path, reason): gone or changed since the scan

    @cached_property
    def digest(self) -> str:
        """sha256 of `plan.jsonl`."""
        digest = hashlib.sha256()
        for line in _plan_lines(self):
            digest.update(line)
        return digest.hexdigest()

    def image_targets(self) -> dict[str, str]:
        """Where each image goes: absolute path of the source to path below output_dir."""
        return {action.source: action.target for action in self.actions if action.role == "image"}

    def count(self, role: Role) -> int:
        """Number of actions with this role."""
        return sum(action.role == role for action in self.actions)


def write_plan(plan: Plan, *, folder: Path) -> None:
    """Write `plan.jsonl` atomically."""
    with atomic_file(folder / PLAN_NAME) as file:
        file.writelines(_plan_lines(plan))


def read_plan(output_dir: Path) -> Plan:
    """Read `plan.jsonl` of an output folder; raises UserError where there is none or it is damaged."""
    path = output_dir / PLAN_NAME
    if not path.is_file():
        raise UserError(f"{path} does not exist: no files were sorted into this folder; check output_dir")
    try:
        with path.open("rb") as file:
            head = json.loads(next(file))
            actions = [Action(**json.loads(line)) for line in file]
        if head.pop("format") != PLAN_FORMAT or head.pop("n_actions") != len(actions):
            raise ValueError("other format or number of lines")
        left_out = tuple((source, reason) for source, reason in head.pop("left_out"))
        labels = yolo.LabelCounts(**head.pop("labels"))
        return Plan(actions=actions, labels=labels, left_out=left_out, **head)
    except (ValueError, TypeError, KeyError, StopIteration) as problem:
        raise UserError(f"{path} is damaged ({problem}); nothing was touched. Restore it from a backup") from None


def _plan_lines(plan: Plan) -> Iterator[bytes]:
    # ASCII: names that are not UTF-8 hold surrogates, which JSON can only escape.
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
    names = [entry.name for entry in fields(Action)]
    for action in plan.actions:
        yield json.dumps({name: getattr(action, name) for name in names}).encode() + b"\n"
