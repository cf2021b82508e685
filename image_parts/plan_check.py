"""What could go wrong with a plan, found before any file is touched: space, permissions, targets that exist."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from common.config import UserError
from image_parts.naming import collision_key
from image_parts.plan import Action, Plan

_MAX_SHOWN = 3
_MAX_PATH_BYTES = 4095
# A file takes whole blocks, and its copy lies beside nothing else under a temporary name; 2% for folders and the plan.
_BLOCK_BYTES = 4096
_SPARE = 1.02


def check_plan(plan: Plan) -> None:
    """Raise UserError with every obstacle to the plan; returns when there is none. Writes nothing."""
    output_dir = Path(plan.output_dir)
    existing = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
    checks: list[Callable[[Plan, Path], Iterator[str]]] = [
        _check_collisions,
        _check_targets,
        _check_permissions,
        _check_hardlinks,
        _check_space,
    ]
    problems = [problem for check in checks for problem in check(plan, existing)]
    if problems:
        raise UserError("\n  ".join(["the files cannot be sorted, and none was touched:", *problems]))


def copied_bytes(plan: Plan, *, existing: Path) -> int:
    """Bytes that the plan writes anew on the file system of `existing`."""
    far = _find_far_folders(plan, existing)
    return sum(
        (action.n_bytes // _BLOCK_BYTES + 1) * _BLOCK_BYTES
        for action in plan.actions
        if action.kind in ("copy", "write") or (action.kind == "move" and Path(action.source).parent in far)
    )


def _check_collisions(plan: Plan, existing: Path) -> Iterator[str]:
    """No two targets are one name on a file system that ignores case or Unicode forms."""
    # First by hashes, in a tenth of the memory.
    hashes = b"".join(_short_hash(collision_key(action.target)) for action in plan.actions)
    if not hashes or len(np.unique(np.frombuffer(hashes, "V16"))) == len(plan.actions):
        return
    seen: dict[str, Action] = {}
    for action in plan.actions:
        other = seen.setdefault(collision_key(action.target), action)
        if other is not action:
            yield f"{other.target!r} and {action.target!r} are one name on some file systems; rename one of the sources"


def _short_hash(text: str) -> bytes:
    return hashlib.blake2b(os.fsencode(text), digest_size=16).digest()


def _check_targets(plan: Plan, existing: Path) -> Iterator[str]:
    targets = (f"{plan.output_dir}{os.sep}{action.target}" for action in plan.actions)
    taken, too_long = [], []
    for target in targets:
        if existing == Path(plan.output_dir) and os.path.lexists(target):
            taken.append(Path(target))
        if len(os.fsencode(target)) > _MAX_PATH_BYTES:
            too_long.append(target)
    if taken:
        yield f"{_some(taken)} exist already and are not overwritten; choose an empty output_dir, or move them away"
    if too_long:
        yield f"{len(too_long):,} targets have paths of more than {_MAX_PATH_BYTES} bytes; choose a shorter output_dir"


def _check_permissions(plan: Plan, existing: Path) -> Iterator[str]:
    if not os.access(existing, os.W_OK | os.X_OK):
        yield f"{existing} is not writable; choose another output_dir"
    if plan.mode != "move":
        return
    folders = sorted({Path(action.source).parent for action in plan.actions if action.kind == "move"})
    fixed = [folder for folder in folders if not os.access(folder, os.W_OK | os.X_OK)]
    if fixed:
        yield f"{_some(fixed)} cannot be written to, so that no file can be moved out of there; use mode: copy"


def _check_hardlinks(plan: Plan, existing: Path) -> Iterator[str]:
    far = sorted(_find_far_folders(plan, existing)) if plan.mode == "hardlink" else []
    if far:
        yield f"{_some(far)} lie on another file system than {plan.output_dir}, where no hard link reaches; use copy"


def _check_space(plan: Plan, existing: Path) -> Iterator[str]:
    needed, free = int(copied_bytes(plan, existing=existing) * _SPARE), shutil.disk_usage(existing).free
    if needed > free:
        yield f"{needed:,} bytes are needed at {existing} and {free:,} are free; free some space or use mode: hardlink"
    state = os.statvfs(existing)
    if state.f_files and state.f_favail < len(plan.actions):  # some file systems count no inodes
        yield f"{len(plan.actions):,} files are to be made at {existing}, and it has room for {state.f_favail:,}"


def _find_far_folders(plan: Plan, existing: Path) -> set[Path]:
    """Source folders that are on another file system than the output, or gone: what was in them is left out later."""
    device = existing.stat().st_dev
    folders = {Path(action.source).parent for action in plan.actions if action.kind in ("move", "hardlink")}
    return {folder for folder in folders if not folder.is_dir() or folder.stat().st_dev != device}


def _some(paths: list[Path]) -> str:
    """The first few of many paths, for a message."""
    shown = ", ".join(repr(os.fspath(path)) for path in paths[:_MAX_SHOWN])
    return shown if len(paths) <= _MAX_SHOWN else f"{shown} and {len(paths) - _MAX_SHOWN:,} more"
