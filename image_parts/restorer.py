"""Back: every file to where it was, and nothing removed that is not proven to be elsewhere.

A moved file goes back as it is, even if it was edited since. A copy is removed where it still is what was copied and
its source is there. What cannot go back without overwriting or losing something stays, with the reason.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.cli import Progress
from common.commit import make_folder, sync_folder
from image_parts import moves
from image_parts.actions import Action
from image_parts.journal import Journal
from image_parts.placer import BATCH_SIZE, N_THREADS, is_ours, is_regular, move, part_name, sync_folders, what_changed
from image_parts.plan import Plan

log = logging.getLogger(__name__)


class Restorer:
    """Undoes the actions of one plan, as far as they were begun."""

    def __init__(self, plan: Plan, output_dir: Path, journal: Journal) -> None:
        self.plan = plan
        self.output_dir = output_dir
        self.journal = journal
        self.left: list[tuple[str, str]] = []  # (path, reason): could not go back

    def put_back(self, *, progress: bool) -> int:
        """Undo all actions that were begun, last first; returns the number of files put back or removed."""
        events = self.journal.state.actions
        begun = (action for action in reversed(self.plan.actions) if events[action.number] in ("intent", "done"))
        n_changed, n_begun = 0, events.count("intent", "done")
        with Progress(n_begun, label="undo", unit="files", enabled=progress) as shown:
            for batch in _chunks(begun):
                n_changed += self._put_back_batch(batch)
                shown.update(len(batch))
        self._remove_folders()
        return n_changed

    def _put_back_batch(self, batch: Sequence[Action]) -> int:
        settled, superfluous, n_changed = [], [], 0
        with ThreadPoolExecutor(N_THREADS) as pool:  # which reads the copies, to tell whether they were changed
            problems = list(pool.map(self._find_obstacle, batch))
        for action, problem in zip(batch, problems, strict=True):
            moves.remove_part(self._target(action).with_name(part_name(self.plan, action)))
            if problem:
                self._leave(action, problem)
                continue
            settled.append(action.number)
            if os.path.lexists(self._target(action)):
                n_changed += 1
                if action.kind != "move" or not self._move_back(action):
                    superfluous.append(self._target(action))
        sync_folders(Path(action.source).parent for action in batch if action.kind == "move")
        for path in superfluous:  # its twin is on the disk by now
            path.unlink()
        sync_folders(folder for action in batch if (folder := self._target(action).parent).exists())
        self.journal.add_actions("back", settled)
        return n_changed

    def _find_obstacle(self, action: Action) -> str:
        """Say why a file cannot go back without loss; an empty text where it can."""
        target = self._target(action)
        if not os.path.lexists(target):
            if action.kind == "move" and not os.path.lexists(action.source):
                log.warning("%s is neither there nor at %s: somebody moved it on", target, action.source)
            return ""
        if action.kind == "move":
            free = not os.path.lexists(action.source) or _are_equal(action.source, target)
            return "" if free else f"its old place {action.source} is taken by another file"
        if not is_ours(action, target):
            return "it was changed since"
        if action.kind == "copy" and (problem := what_changed(action)):
            return f"its source {action.source} {problem}"
        return ""

    def _move_back(self, action: Action) -> bool:
        """Move a file back; returns False where its twin is at the old place already and this one can go."""
        if os.path.lexists(action.source):  # a kill came between the two halves of a move
            return False
        old_folder = Path(action.source).parent
        make_folder(old_folder)
        part_path = old_folder / part_name(self.plan, action)
        return not move(self._target(action), action.source, part_path=part_path)

    def _leave(self, action: Action, problem: str) -> None:
        path = self._target(action)
        log.warning("%s stays: %s", path, problem)
        self.left.append((os.fspath(path), problem))

    def _remove_folders(self) -> None:
        """Remove the folders that the run made, if nothing else lies in them by now."""
        for name in reversed(self.journal.state.folders):
            folder = self.output_dir / name
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError as problem:
                if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                log.warning("%s stays: there are other files in it", folder)
            else:
                sync_folder(folder.parent)

    def _target(self, action: Action) -> Path:
        return self.output_dir / action.target


def _are_equal(first: str | Path, second: str | Path) -> bool:
    """Whether two paths are one file, or two files of equal content."""
    if moves.is_same_file(first, second):
        return True
    return is_regular(first) and is_regular(second) and moves.hash_file(first) == moves.hash_file(second)


def _chunks(actions: Iterator[Action]) -> Iterator[list[Action]]:
    while chunk := list(itertools.islice(actions, BATCH_SIZE)):
        yield chunk
