"""Forward: the actions of a plan, batch by batch, so that a kill at any point leaves every file whole.

The intents of a batch are on the disk before its first file is touched. Then the files are placed and their folders
flushed, only then the sources of copies across file systems are removed, and at last all are marked done. What a kill
left is told from the disk: a target that exists is whole, because it got its name in one step.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.cli import Progress
from common.commit import make_folder, sync_folder
from common.config import UserError
from image_parts import moves
from image_parts.actions import Action
from image_parts.journal import Journal
from image_parts.moves import SourceChanged
from image_parts.plan import Plan

log = logging.getLogger(__name__)

N_THREADS = 8
BATCH_SIZE = 256  # actions between two flushes: at most about these are looked at again after a kill


class Placer:
    """Does the actions of one plan."""

    def __init__(self, plan: Plan, output_dir: Path, journal: Journal) -> None:
        self.plan = plan
        self.output_dir = output_dir
        self.journal = journal
        self._taken: list[Action] = []  # targets that are not ours have appeared there since the check

    def place_all(self, *, progress: bool) -> int:
        """Do what is not done yet; returns the number of files placed."""
        events = self.journal.state.actions
        n_settled = events.count("done", "skipped")
        open_actions = (action for action in self.plan.actions if events[action.number] not in ("done", "skipped"))
        n_placed = 0
        with Progress(len(self.plan.actions), label="files", unit="files", enabled=progress, done=n_settled) as shown:
            for batch in _batches(open_actions):
                n_placed += self._place_batch(batch)
                shown.update(len(batch))
        return n_placed

    def _place_batch(self, batch: list[Action]) -> int:
        began = {action.number for action in batch if self.journal.state.actions[action.number] == "intent"}
        placed = {action.number for action in batch if action.number in began and os.path.lexists(self._target(action))}
        ready = self._skip_changed_groups(batch, placed)
        self._make_folders(ready)
        self.journal.add_actions("intent", [action.number for action in ready if action.number not in began])
        copied = self._place_together(ready, placed)
        sync_folders(self._target(action).parent for action in ready)
        for action in copied:
            self._remove_moved_source(action)
        sync_folders(Path(action.source).parent for action in ready if action.kind == "move")
        self.journal.add_actions("done", [action.number for action in ready])
        return len(ready)

    def _skip_changed_groups(self, batch: list[Action], placed: set[int]) -> list[Action]:
        """Leave out every image and label of which one is not what was planned; both stay where they are."""
        problems = {
            action.group: f"{action.source} {problem}"
            for action in batch
            if action.number not in placed and (problem := what_changed(action))
        }
        for action in batch:
            if action.group in problems and action.number not in placed:
                log.warning("left where it is: %s, because %s", action.source, problems[action.group])
                self.journal.add_actions("skipped", [action.number], reason=problems[action.group])
        return [action for action in batch if action.group not in problems or action.number in placed]

    def _make_folders(self, batch: list[Action]) -> None:
        for folder in sorted({self._target(action).parent for action in batch}):
            missing = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
            for path in reversed(missing):
                self.journal.add("folder", path=os.fspath(path.relative_to(self.output_dir)))
                make_folder(path)
                sync_folder(path.parent)

    def _place_together(self, ready: list[Action], placed: set[int]) -> list[Action]:
        """Make the targets of a batch; returns the moves whose source still has to be removed.

        Copies are written under temporary names, flushed together, read back and only then named.
        """
        new = [action for action in ready if action.number not in placed]
        try:
            with ThreadPoolExecutor(N_THREADS) as pool:
                begun = pool.map(self._begin, new)
                written = [action for action, waits in zip(new, begun, strict=True) if waits]
                moves.flush_files([self._part_path(action) for action in written])
                list(pool.map(self._name, written))
        except BaseException:
            for action in new:
                moves.remove_part(self._part_path(action))
            raise
        old = [action for action in ready if action.number in placed]  # a kill came after these had their names
        self._taken += [action for action in old if not is_ours(action, self._target(action))]
        if self._taken:
            raise self._blocked()
        return [a for a in (*written, *old) if a.kind == "move" and os.path.lexists(a.source)]

    def _begin(self, action: Action) -> bool:
        """Place a file by renaming or linking, or write its copy; returns whether the copy waits for its name."""
        target, part_path = self._target(action), self._part_path(action)
        moves.remove_part(part_path)  # of a copy that a kill cut short
        try:
            if action.kind == "hardlink":
                os.link(action.source, target, follow_symlinks=False)
            elif action.kind == "symlink":
                target.symlink_to(action.source)
            elif not (action.kind == "move" and _rename(action.source, target)):
                content = action.content.encode() if action.kind == "write" else action.source
                if moves.write_part(content, part_path) != action.sha256:  # since the look at it
                    raise UserError(f"{action.source} is changing; finish with --resume, which leaves it out")
                return True
        except FileExistsError:
            self._taken.append(action)
        return False

    def _name(self, action: Action) -> None:
        try:
            moves.publish_part(self._part_path(action), self._target(action), sha256=action.sha256)
        except FileExistsError:
            moves.remove_part(self._part_path(action))
            self._taken.append(action)

    def _blocked(self) -> UserError:
        """Note the targets that are not ours, so that no undo takes them for ours, and say so."""
        self.journal.add_actions("blocked", [action.number for action in self._taken])
        return UserError(
            f"{self._target(self._taken[0])} appeared since the plan was made and is not overwritten; move it away and "
            f"finish with --resume, or put all back with --undo"
        )

    def _remove_moved_source(self, action: Action) -> None:
        """Remove a source whose target is proven, unless somebody changed it or put another file there meanwhile."""
        problem = what_changed(action)
        if problem:
            log.warning("%s %s and was moved as it was then; what is there now stays", action.source, problem)
        else:
            Path(action.source).unlink()

    def _target(self, action: Action) -> Path:
        return self.output_dir / action.target

    def _part_path(self, action: Action) -> Path:
        return self._target(action).with_name(part_name(self.plan, action))


def part_name(plan: Plan, action: Action) -> str:
    """The temporary name of an unfinished copy; the same again after a kill, so that it is found and removed."""
    return f".{plan.digest[:8]}-{action.number}.part"


def what_changed(action: Action) -> str:
    """Say how the source of an action differs from what was planned; an empty text where it does not."""
    if action.kind == "write":
        return ""
    try:
        state = Path(action.source).stat(follow_symlinks=action.kind in ("copy", "symlink"))
        if not stat.S_ISREG(state.st_mode):
            return "is not a regular file any more"
        same = (state.st_size, state.st_mtime_ns) == (action.n_bytes, action.modified_ns)
        return "" if same or moves.hash_file(action.source) == action.sha256 else "changed since it was planned"
    except (FileNotFoundError, NotADirectoryError):
        return "is gone since it was planned"
    except SourceChanged as problem:
        return str(problem)


def is_ours(action: Action, target: Path) -> bool:
    """Whether an existing target is what this action makes."""
    if action.kind == "symlink":
        return target.is_symlink() and os.fspath(target.readlink()) == action.source
    if action.kind == "hardlink":
        return os.path.lexists(action.source) and moves.is_same_file(action.source, target)
    return is_regular(target) and moves.hash_file(target) == action.sha256


def move(source: str | Path, target: str | Path, *, part_path: Path) -> bool:
    """Rename, or copy across file systems; returns whether the source still has to be removed."""
    moves.remove_part(part_path)
    if _rename(source, target):
        return False
    moves.copy_verified(source, target, part_path=part_path)
    return True


def _rename(source: str | Path, target: str | Path) -> bool:
    """Rename on one file system; returns whether it was one."""
    try:
        moves.rename_exclusive(source, target)
    except OSError as problem:
        if problem.errno != errno.EXDEV:
            raise
        return False
    return True


def is_regular(path: str | Path) -> bool:
    """Whether a path is a file itself: no link, no folder, no pipe."""
    return os.path.lexists(path) and stat.S_ISREG(os.lstat(path).st_mode)


def sync_folders(folders: Iterable[Path]) -> None:
    """Flush the entries of several folders, each once."""
    for folder in sorted(set(folders)):
        sync_folder(folder)


def _batches(actions: Iterable[Action]) -> Iterator[list[Action]]:
    """Cut into batches; an image and its label are never parted."""
    batch: list[Action] = []
    for _, group in itertools.groupby(actions, key=lambda action: action.group):
        batch += group
        if len(batch) >= BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch
