"""What could go wrong with a plan, found before any file is touched: space, permissions, targets that exist."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.config import UserError
from image_parts.actions import Action
from image_parts.naming import collision_key
from image_parts.plan import Plan

_MAX_SHOWN = 3
_MAX_PATH_BYTES = 4095
# A file takes whole blocks, and its copy lies beside nothing else under a temporary name; 2% for folders.
_BLOCK_BYTES = 4096
_SPARE = 1.02
# Lines of the journal for one action, its intent and that it is done.
_JOURNAL_BYTES = 160


def check_plan(plan: Plan) -> None:
    """Raise UserError with every obstacle to the plan; returns when there is none. Writes nothing."""
    output_dir = Path(plan.output_dir)
    existing = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
    found = _Findings.of(plan, existing)
    problems = [
        *_check_collisions(plan, found),
        *_check_targets(found),
        *_check_permissions(plan, found, existing),
        *_check_hardlinks(plan, found),
        *_check_links(plan, found),
        *_check_space(plan, found, existing),
    ]
    if problems:
        raise UserError("\n  ".join(["the files cannot be sorted, and none was touched:", *problems]))


class _Some:
    """The first few of many paths, for a message, and how many there are."""

    def __init__(self) -> None:
        self.n = 0
        self._first: list[str] = []

    def add(self, path: str) -> None:
        self.n += 1
        if self.n <= _MAX_SHOWN:
            self._first.append(path)

    def __str__(self) -> str:
        shown = ", ".join(map(repr, self._first))
        return shown if self.n <= _MAX_SHOWN else f"{shown} and {self.n - _MAX_SHOWN:,} more"


@dataclass
class _Findings:
    """What one pass over the actions tells."""

    target_hashes: np.ndarray  # [n] V16, of what a file system may take for the name of the target
    n_bytes: int = 0  # written anew
    taken: _Some = field(default_factory=_Some)  # targets that exist
    too_long: _Some = field(default_factory=_Some)
    moved_from: Counter[str] = field(default_factory=Counter)  # folders of sources that go
    far: Counter[str] = field(default_factory=Counter)  # folders of sources on another file system, or gone
    linked: dict[str, str] = field(default_factory=dict)  # what links lead to that are copied, and the links

    @classmethod
    def of(cls, plan: Plan, existing: Path) -> _Findings:
        """Look at every action once; `existing` is the output folder or the nearest one above it that exists."""
        found = cls(np.empty(len(plan.actions), "V16"))
        is_far = lru_cache(maxsize=1024)(lambda folder: _is_far(folder, device=existing.stat().st_dev))
        has_folder = existing == Path(plan.output_dir)
        for row, action in enumerate(plan.actions):
            found.target_hashes[row] = _short_hash(collision_key(action.target))
            target = f"{plan.output_dir}{os.sep}{action.target}"
            if has_folder and os.path.lexists(target):
                found.taken.add(target)
            if len(os.fsencode(target)) > _MAX_PATH_BYTES:
                found.too_long.add(target)
            if plan.mode == "move" and action.kind == "copy":
                found._take_link(action)
            found._take_source(action, is_near=action.kind not in ("move", "hardlink") or not is_far(_folder(action)))
        return found

    def _take_link(self, action: Action) -> None:
        real = os.path.realpath(action.source)
        if real != action.source:  # else a file that others use too
            self.linked[real] = action.source

    def _take_source(self, action: Action, *, is_near: bool) -> None:
        if not is_near:  # what was in a folder that is gone is left out later
            self.far[_folder(action)] += 1
        if action.kind == "move":
            self.moved_from[_folder(action)] += 1
        if action.kind in ("copy", "write") or (action.kind == "move" and not is_near):
            self.n_bytes += (action.n_bytes // _BLOCK_BYTES + 1) * _BLOCK_BYTES


def _check_collisions(plan: Plan, found: _Findings) -> Iterator[str]:
    """No two targets are one name on a file system that ignores case or Unicode forms."""
    found.target_hashes.sort()
    if not (found.target_hashes[1:] == found.target_hashes[:-1]).any():
        return
    seen: dict[str, str] = {}
    for action in plan.actions:
        other = seen.setdefault(collision_key(action.target), action.target)
        if other is not action.target:
            yield f"{other!r} and {action.target!r} are one name on some file systems; rename one of the sources"


def _check_targets(found: _Findings) -> Iterator[str]:
    if found.taken.n:
        yield f"{found.taken} exist already and are not overwritten; choose an empty output_dir, or move them away"
    if found.too_long.n:
        yield (
            f"{found.too_long.n:,} targets have paths of more than {_MAX_PATH_BYTES} bytes; choose a shorter output_dir"
        )


def _check_permissions(plan: Plan, found: _Findings, existing: Path) -> Iterator[str]:
    if not os.access(existing, os.W_OK | os.X_OK):
        yield f"{existing} is not writable; choose another output_dir"
    fixed = _Some()
    for folder in sorted(found.moved_from) if plan.mode == "move" else ():
        if not os.access(folder, os.W_OK | os.X_OK):
            fixed.add(folder)
    if fixed.n:
        yield f"{fixed} cannot be written to, so that no file can be moved out of there; use mode: copy"


def _check_hardlinks(plan: Plan, found: _Findings) -> Iterator[str]:
    far = _Some()
    for folder in sorted(found.far) if plan.mode == "hardlink" else ():
        far.add(folder)
    if far.n:
        yield f"{far} lie on another file system than {plan.output_dir}, where no hard link reaches; use copy"


def _check_links(plan: Plan, found: _Findings) -> Iterator[str]:
    """No link leads to a file that would be gone from there before what the link leads to is copied."""
    for action in plan.actions if found.linked else ():
        link = found.linked.get(os.path.realpath(action.source)) if action.kind == "move" else None
        if link is not None:
            yield f"{link!r} leads to {action.source!r}, which would be moved away; use mode: copy, or remove the link"


def _check_space(plan: Plan, found: _Findings, existing: Path) -> Iterator[str]:
    n_actions, free = len(plan.actions), shutil.disk_usage(existing).free
    needed = int(found.n_bytes * _SPARE) + plan.actions.n_bytes + n_actions * _JOURNAL_BYTES
    if needed > free:
        remedy = "free some space or use mode: hardlink" if found.n_bytes else "free some space"
        yield f"{needed:,} bytes are needed at {existing} and {free:,} are free; {remedy}"
    state = os.statvfs(existing)
    if state.f_files and state.f_favail < n_actions:  # some file systems count no inodes
        yield f"{n_actions:,} files are to be made at {existing}, and it has room for {state.f_favail:,}"


def _folder(action: Action) -> str:
    return action.source.rpartition(os.sep)[0] or os.sep


def _is_far(folder: str, *, device: int) -> bool:
    """Whether a folder is on another file system than `device`, or gone."""
    return not Path(folder).is_dir() or Path(folder).stat().st_dev != device


def _short_hash(text: str) -> bytes:
    return hashlib.blake2b(os.fsencode(text), digest_size=16).digest()
