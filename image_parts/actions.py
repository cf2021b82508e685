"""The actions of a plan as lines of a file: in memory each takes eight bytes, however long its paths are.

    draft = ActionDraft(output_dir)
    draft.add(Action(0, …))
    actions = draft.finish()         # a sequence; an action is made when it is asked for

The draft lies in a file without a name, which is gone with the process, whatever ends it.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from common.config import UserError
from image_parts.on_demand import OnDemand

Mode = Literal["copy", "move", "hardlink", "symlink"]
Kind = Literal["copy", "move", "hardlink", "symlink", "write"]
Role = Literal["image", "label", "classes"]

# Actions that are read at a time.
_BLOCK_ACTIONS = 512


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

    def to_line(self) -> bytes:
        """One line of JSON. In ASCII: names that are not UTF-8 hold surrogates, which JSON can only escape."""
        return json.dumps({name: getattr(self, name) for name in _FIELDS}).encode() + b"\n"


_FIELDS = [entry.name for entry in fields(Action)]


class ActionLines(OnDemand[Action]):
    """Actions that lie in a file, one in each line; threads may read them at the same time.

    `starts` [n + 1] is where the lines begin and the last one ends, `n_of_role` how many actions have each role. The
    descriptor becomes theirs, and is closed with them.
    """

    def __init__(self, descriptor: int, starts: array[int], n_of_role: Counter[str]) -> None:
        self.n_of_role = n_of_role
        self._descriptor, self._starts = descriptor, starts
        weakref.finalize(self, os.close, descriptor)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _make(self, number: int) -> Action:
        return parse_action(self._read(number, number + 1))

    def __iter__(self) -> Iterator[Action]:
        for block in self.blocks():
            yield from map(parse_action, block.splitlines())

    def __reversed__(self) -> Iterator[Action]:
        for end in range(len(self), 0, -_BLOCK_ACTIONS):
            lines = self._read(max(0, end - _BLOCK_ACTIONS), end).splitlines()
            yield from map(parse_action, reversed(lines))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActionLines) and len(self) == len(other) and all(map(Action.__eq__, self, other))

    def blocks(self) -> Iterator[bytes]:
        """The lines of all actions, some hundred at a time."""
        for start in range(0, len(self), _BLOCK_ACTIONS):
            yield self._read(start, min(start + _BLOCK_ACTIONS, len(self)))

    @property
    def n_bytes(self) -> int:
        """Length of all lines."""
        return self._starts[-1] - self._starts[0]

    def _read(self, first: int, end: int) -> bytes:
        start, n_bytes = self._starts[first], self._starts[end] - self._starts[first]
        return os.pread(self._descriptor, n_bytes, start)


class ActionDraft:
    """Takes in actions one after the other."""

    def __init__(self, output_dir: Path) -> None:
        """Begin in `output_dir`, where the plan will lie, or where files without a name do if that cannot hold one."""
        usable = output_dir.is_dir() and os.access(output_dir, os.W_OK | os.X_OK)
        self._file = tempfile.TemporaryFile(dir=output_dir if usable else None)  # noqa: SIM115  # closed by `finish`
        self._folder = output_dir if usable else Path(tempfile.gettempdir())
        self._starts = array("q", [0])
        self._n_of_role: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, action: Action) -> None:
        """Append one action; raises UserError where the disk has no room for it."""
        line = action.to_line()
        try:
            self._file.write(line)
        except OSError as problem:
            raise self._explain(problem) from None
        self._starts.append(self._starts[-1] + len(line))
        self._n_of_role[action.role] += 1

    def finish(self) -> ActionLines:
        """All actions that were added; nothing can be added afterwards."""
        try:
            self._file.flush()
        except OSError as problem:
            raise self._explain(problem) from None
        with self._file:
            return ActionLines(os.dup(self._file.fileno()), self._starts, self._n_of_role)

    def _explain(self, problem: OSError) -> UserError:
        return UserError(
            f"the plan of the files cannot be written to {self._folder}: {problem.strerror or problem}; free some "
            f"space there. No file was touched"
        )


def read_actions(path: Path, *, start: int) -> ActionLines:
    """The actions in the lines of a file from the byte `start` on, each looked at once.

    Raises ValueError, TypeError or KeyError where a line is none.
    """
    starts, n_of_role = array("q", [start]), Counter[str]()
    with path.open("rb") as file:
        file.seek(start)
        for number, line in enumerate(file):
            action = parse_action(line)
            if action.number != number or not line.endswith(b"\n"):
                raise ValueError(f"line {number + 2} is not that of action {number}")
            n_of_role[action.role] += 1
            starts.append(starts[-1] + len(line))
        return ActionLines(os.dup(file.fileno()), starts, n_of_role)


def parse_action(line: bytes) -> Action:
    """Read one line."""
    return Action(**json.loads(line))
