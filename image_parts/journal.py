"""The journal of the file stage: append-only JSON lines, flushed to the disk, from which a killed run is taken up.

Every line names the plan that it belongs to. An intent is on the disk before its files are touched, a `done` only after
they are on the disk. A torn last line, which nobody ever relied on, is cut off when the journal is opened again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from common.commit import LockHeld, sync_folder
from common.config import UserError

JOURNAL_NAME = "journal.jsonl"

Stage = Literal["none", "unfinished", "finished", "undoing", "undone"]
Event = Literal["begin", "folder", "intent", "done", "skipped", "blocked", "finished", "undo", "back", "undone"]

_EVENTS: tuple[Event | None, ...] = (None, *get_args(Event))
_STAGE_AFTER: dict[str, Stage] = {"begin": "unfinished", "finished": "finished", "undo": "undoing", "undone": "undone"}


class LastEvents:
    """The last event of each action, by its number: a byte each."""

    def __init__(self) -> None:
        self._codes = bytearray()

    def __getitem__(self, number: int) -> Event | None:
        """The last event of an action; None where there was none."""
        return _EVENTS[self._codes[number]] if number < len(self._codes) else None

    def __setitem__(self, number: int, event: Event) -> None:
        self._codes.extend(bytes(max(0, number + 1 - len(self._codes))))
        self._codes[number] = _EVENTS.index(event)

    def count(self, *events: Event) -> int:
        """How many actions have one of these as their last event."""
        return sum(self._codes.count(_EVENTS.index(event)) for event in events)


@dataclass
class JournalState:
    """What the journal tells of one plan."""

    stage: Stage = "none"
    actions: LastEvents = field(default_factory=LastEvents)
    reasons: dict[int, str] = field(default_factory=dict)  # why an action was skipped
    folders: list[str] = field(default_factory=list)  # that the run made, below the output folder, in this order

    def take(self, line: dict[str, Any]) -> None:
        """Take in one line."""
        event = line["event"]
        if event == "begin":
            self.__init__()  # type: ignore[misc]  # a plan that was undone and starts anew
        if event in _STAGE_AFTER:
            self.stage = _STAGE_AFTER[event]
        elif event == "folder":
            self.folders.append(line["path"])
        else:
            self.actions[line["action"]] = event
            if "reason" in line:
                self.reasons[line["action"]] = line["reason"]


class Journal:
    """The open journal of one output folder, held by one process; `state` follows every line that is added.

    Raises LockHeld where another process has it, UserError where a whole line of it is damaged.
    """

    def __init__(self, folder: Path, *, plan_digest: str) -> None:
        self.path = folder / JOURNAL_NAME
        self._plan = plan_digest[:16]

    def __enter__(self) -> Journal:
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            self._cut_torn_line()
            sync_folder(self.path.parent)
            states = read_states(self.path.parent)
            self.state = states.pop(self._plan, JournalState())
            if any(other.stage in ("unfinished", "finished", "undoing") for other in states.values()):
                raise UserError(
                    f"{self.path} tells of files that another plan placed than the one in {self.path.parent}; nothing "
                    f"was touched. Restore that plan.jsonl from a backup and start --undo"
                )
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def add(self, event: Event, **values: Any) -> None:
        """Append one line and flush it to the disk."""
        self._append([{"event": event, **values}])

    def add_actions(self, event: Event, numbers: Iterable[int], **values: Any) -> None:
        """Append one line for each action and flush them together."""
        self._append([{"event": event, "action": number, **values} for number in numbers])

    def _append(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        # ASCII: file names that are not UTF-8 hold surrogates, which JSON can only escape.
        content = "".join(json.dumps({"plan": self._plan, **line}, ensure_ascii=True) + "\n" for line in lines).encode()
        while content:
            content = content[os.write(self._descriptor, content) :]
        os.fsync(self._descriptor)
        for line in lines:
            self.state.take(line)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockHeld(
                f"files of {self.path.parent} are being moved by another run; wait for it or end it"
            ) from None

    def _cut_torn_line(self) -> None:
        n_bytes = os.fstat(self._descriptor).st_size
        content = os.pread(self._descriptor, 2**16, max(0, n_bytes - 2**16))  # lines are far shorter than this
        torn = len(content) - (content.rfind(b"\n") + 1)
        if torn:
            os.ftruncate(self._descriptor, n_bytes - torn)


def read_state(folder: Path, *, plan_digest: str) -> JournalState:
    """What the journal of `folder` tells of a plan; raises UserError where a line of it is damaged."""
    return read_states(folder).get(plan_digest[:16], JournalState())


def read_states(folder: Path) -> dict[str, JournalState]:
    """What the journal of `folder` tells of all plans, by the start of their digests."""
    states: dict[str, JournalState] = {}
    for line in _read_lines(folder / JOURNAL_NAME):
        states.setdefault(line["plan"], JournalState()).take(line)
    return states


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return  # torn by a kill
            try:
                line = json.loads(raw)
                _check_line(line, number)
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path} line {number} is damaged; nothing was touched. Restore the file, or compare plan.jsonl "
                    f"with the folders by hand"
                ) from None
            yield line


def _check_line(line: dict[str, Any], number: int) -> None:
    """Raise ValueError, KeyError or TypeError unless this is line `number` of a journal, the first of which is 1."""
    is_known = line["event"] in get_args(Event) and isinstance(line["plan"], str)
    if not is_known or not 0 <= line.get("action", 0) < number:  # each action before it has a line of its own
        raise ValueError("no line of ours")
