"""The step that every stage has: compute the shards that are not on the disk yet, wherever the engine says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from common.config import StageSettings
from common.engine import map_items
from common.outputs import FileOutput, ShardTask, StageOutput
from common.progress import Progress

log = logging.getLogger(__name__)


class WritesShard(Protocol):
    """A task that ends in one committed shard."""

    @property
    def shard(self) -> ShardTask:
        """The shard to be written."""


Task = TypeVar("Task", bound=WritesShard)


def write_missing_shards(
    write: Callable[[Task], Any],
    tasks: Sequence[Task],
    output: StageOutput | FileOutput,
    settings: StageSettings,
    *,
    label: str,
) -> int:
    """Run `write` for every task whose shard is not committed yet; returns the rows that were computed now."""
    todo = [task for task in tasks if not output.is_done(task.shard.name)]
    n_rows, n_todo = (sum(task.shard.n_rows for task in some) for some in (tasks, todo))
    log.info("%s: %s rows in %d shards, %d shards to do", label, f"{n_rows:,}", len(tasks), len(todo))
    with Progress(n_rows, label=label, enabled=settings.progress, done=n_rows - n_todo) as progress:
        map_items(
            write,
            todo,
            settings.engine,
            is_done=lambda task: output.is_done(task.shard.name),
            on_result=lambda task, _: progress.update(task.shard.n_rows),
        )
    return n_todo
