"""Threads of this process, for work that leaves the interpreter to others: decoding, array arithmetic, BLAS.

`share_tiles` deals the tiles of one array out; `map_ahead` works on the next items while the last one is used. In both,
BLAS keeps to the thread that calls it: its own threads wait for each other busily, and on a machine that others use too
most of the time goes there. No result depends on how many threads there are.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")

_END = object()
# Items come from one thread that decodes; more threads than this would wait for it.
_MOST_AHEAD = 4

_here = threading.local()


def share_tiles(work: Callable[[range], None], *, n_rows: int, tile_rows: int, n_threads: int | None = None) -> None:
    """Call `work` in each thread with the starts of its tiles; which thread takes a tile must change nothing.

    Inside `map_ahead`, whose threads have the cores already, the calling thread takes all tiles.
    """
    starts = range(0, n_rows, tile_rows)
    if getattr(_here, "is_shared", False):
        work(starts)
        return
    n_threads = min(n_threads or available_threads(), len(starts))
    with one_blas_thread():
        if n_threads <= 1:
            work(starts)
            return
        with ThreadPoolExecutor(n_threads) as pool:
            for done in [pool.submit(work, starts[offset::n_threads]) for offset in range(n_threads)]:
                done.result()


def map_ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `work(item)` in the order of the items; a few are worked on in threads while an earlier one is used.

    An exception comes where the result would have come.
    """
    n_threads = min(available_threads(), _MOST_AHEAD)
    upcoming: deque[Future[Result]] = deque()
    with one_blas_thread(), ThreadPoolExecutor(n_threads, initializer=_mark_shared) as pool:
        for item in items:
            upcoming.append(pool.submit(work, item))
            if len(upcoming) > n_threads:
                yield upcoming.popleft().result()
        while upcoming:
            yield upcoming.popleft().result()


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the same items in the same order, one of them made in advance, in a thread.

    An exception comes where the item would have come.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        upcoming: Future[Item | object] = reader.submit(next, items, _END)
        while (item := upcoming.result()) is not _END:
            upcoming = reader.submit(next, items, _END)
            yield item  # type: ignore[misc]


def one_blas_thread() -> AbstractContextManager[object]:
    """Within it, BLAS and LAPACK use the calling thread alone."""
    return _threadpools().limit(limits=1, user_api="blas")


def available_threads() -> int:
    """Count the threads this process may use: the cores it is given, or OMP_NUM_THREADS where that is fewer."""
    from joblib import cpu_count

    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cpu_count(), int(asked))) if asked.isdigit() else cpu_count()


def _mark_shared() -> None:
    _here.is_shared = True


@functools.lru_cache(maxsize=1)
def _threadpools() -> ThreadpoolController:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
