"""The step that every stage has: map a task over shards, wherever the engine says, and tell how far it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from common.config import StageSettings
from common.engine import map_items
from common.outputs import StageOutput
from common.progress import Progress
from common.shard_writer import ShardTask
from common.shards import Shard, ShardSet, shard_name

log = logging.getLogger(__name__)


class ShardToWrite(Protocol):
    """A shard to be written, or to be written again."""

    @property
    def path(self) -> Path:
        """Its file."""

    @property
    def n_rows(self) -> int:
        """Its rows."""


class WritesShard(Protocol):
    """A task that ends in one committed shard."""

    @property
    def shard(self) -> ShardToWrite:
        """The shard to be written."""


class KnowsDone(Protocol):
    """An output that knows what of it is on the disk."""

    def is_done(self, name: str, /) -> bool:
        """Whether one shard is committed."""


Task = TypeVar("Task", bound=WritesShard)


@dataclass(frozen=True)
class ShardToShard:
    """One input shard and the output shard that it becomes."""

    source: Shard
    shard: ShardTask


def one_to_one(shards: ShardSet, output: StageOutput) -> list[ShardToShard]:
    """A task for every input shard: the output has as many, of as many rows."""
    return [
        ShardToShard(shard, output.task(shard_name(index), shard.n_rows)) for index, shard in enumerate(shards.shards)
    ]


def write_missing_shards(
    write: Callable[[Task], Any], tasks: Sequence[Task], output: KnowsDone, settings: StageSettings, *, label: str
) -> int:
    """Run `write` for every task whose shard is not committed yet; returns the rows that were computed now."""
    todo = [task for task in tasks if not output.is_done(task.shard.path.name)]
    n_rows, n_todo = (sum(task.shard.n_rows for task in some) for some in (tasks, todo))
    log.info("%s: %s rows in %d shards, %d shards to do", label, f"{n_rows:,}", len(tasks), len(todo))
    with Progress(n_rows, label=label, enabled=settings.progress, done=n_rows - n_todo) as progress:
        map_items(
            write,
            todo,
            settings.engine,
            is_done=lambda task: output.is_done(task.shard.path.name),
            on_result=lambda task, _: progress.update(task.shard.n_rows),
        )
    return n_todo


def map_shards(
    task: Callable[[Shard], Any], shards: Sequence[Shard], settings: StageSettings, *, label: str
) -> list[Any]:
    """What `task` makes of every shard, in their order; nothing of it is on the disk."""
    n_rows = sum(shard.n_rows for shard in shards)
    with Progress(n_rows, label=label, enabled=settings.progress) as progress:
        return map_items(task, shards, settings.engine, on_result=lambda shard, _: progress.update(shard.n_rows))
