"""One seam to map a task over shards: this process, local processes (joblib's loky), or a Dask cluster.

A task takes one item, commits its result to the disk and returns a small dict. The disk is the truth: after a worker
died, what is not on the disk is tried again, so a dead worker costs the shard it was working on.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from common.config import EngineSettings, UserError
from common.workers import workers

log = logging.getLogger(__name__)

Item = TypeVar("Item")


def map_items(
    task: Callable[[Item], Any],
    items: Sequence[Item],
    engine: EngineSettings,
    *,
    is_done: Callable[[Item], bool] | None = None,
    on_result: Callable[[Item, Any], None] | None = None,
) -> list[Any]:
    """Run `task` over `items` and return its results in the order of the items.

    `task` must be importable by worker processes (a function of a module, or a partial of one). `is_done` looks at the
    disk: an item whose worker died after its commit is not computed again, and its result is None. `on_result` is
    called in this process as results arrive.

    Raises UserError if a task raised one, or if workers keep dying; any other exception of a task is raised as it is.
    """
    if engine.kind == "local" and engine.n_jobs == 1:
        return [_run_here(task, item, on_result) for item in items]
    return _run_in_workers(task, items, engine, is_done=is_done, on_result=on_result)


def _run_here(task: Callable[[Item], Any], item: Item, on_result: Callable[[Item, Any], None] | None) -> Any:
    result = task(item)
    if on_result:
        on_result(item, result)
    return result


def _run_in_workers(
    task: Callable[[Item], Any],
    items: Sequence[Item],
    engine: EngineSettings,
    *,
    is_done: Callable[[Item], bool] | None,
    on_result: Callable[[Item, Any], None] | None,
) -> list[Any]:
    results: dict[int, Any] = {}
    last_problem: Exception | None = None
    for attempt in range(engine.retries + 1):
        if attempt and is_done:
            results |= {i: None for i, item in enumerate(items) if i not in results and is_done(item)}
        todo = [(index, item) for index, item in enumerate(items) if index not in results]
        if not todo:
            break
        try:
            _attempt(task, todo, engine, results, on_result)
        except Exception as problem:
            if not _is_worker_death(problem):
                raise
            last_problem = problem
            what = _first_sentence(problem)
            log.warning("a worker died or took over %g s (%s); its shards are tried again", engine.timeout_s, what)
    n_missing = len(items) - len(results)
    if n_missing:
        raise UserError(
            f"{n_missing} of {len(items)} shards could not be computed in {engine.retries + 1} attempts: workers died "
            f"or took over engine.timeout_s={engine.timeout_s:g} s (last: {_first_sentence(last_problem)}); lower "
            f"engine.n_jobs or the shard size if memory ran out, then start again: finished shards are kept"
        ) from last_problem
    return [results[index] for index in range(len(items))]


def _attempt(
    task: Callable[[Item], Any],
    todo: list[tuple[int, Item]],
    engine: EngineSettings,
    results: dict[int, Any],
    on_result: Callable[[Item, Any], None] | None,
) -> None:
    items = dict(todo)
    with workers(engine, n_tasks=len(todo)), warnings.catch_warnings():
        # After an error the other tasks are left on purpose, against which joblib would advise the user.
        warnings.filterwarnings("ignore", message=".* tasks ", module="joblib")
        for index, result in _stream(task, todo, engine):
            results[index] = result
            if on_result:
                on_result(items[index], result)


def _stream(
    task: Callable[[Item], Any], todo: list[tuple[int, Item]], engine: EngineSettings
) -> Iterator[tuple[int, Any]]:
    from joblib import Parallel, delayed

    # Without a timeout, joblib's Dask backend waits for ever for a task whose worker was killed repeatedly.
    parallel = Parallel(batch_size=1, return_as="generator_unordered", timeout=engine.timeout_s)
    for outcome in parallel(delayed(_guarded)(task, index, item) for index, item in todo):
        if "error" in outcome:
            raise outcome["error"] if "traceback" not in outcome else _with_traceback(outcome)
        yield outcome["index"], outcome["result"]


def _guarded(task: Callable[[Item], Any], index: int, item: Item) -> dict[str, Any]:
    """Run in the worker: return an exception instead of raising it, which would abort the tasks of the others."""
    try:
        return {"index": index, "result": task(item)}
    except (UserError, OSError) as problem:
        return {"index": index, "error": problem}
    except Exception as problem:
        return {"index": index, "error": problem, "traceback": traceback.format_exc()}


def _with_traceback(outcome: dict[str, Any]) -> Exception:
    error: Exception = outcome["error"]
    error.add_note(f"in a worker process:\n{outcome['traceback']}")
    return error


def _first_sentence(problem: Exception | None) -> str:
    """What the libraries say, without the paragraphs that follow."""
    return str(problem).strip().partition("\n")[0].partition(". ")[0] or type(problem).__name__


def _is_worker_death(problem: BaseException) -> bool:
    names = {cls.__name__ for cls in type(problem).__mro__}
    return bool(
        names & {"TerminatedWorkerError", "BrokenProcessPool", "TimeoutError", "KilledWorker", "CommClosedError"}
    )
