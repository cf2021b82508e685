"""Rows cut into tiles and dealt out to threads, each with single-threaded BLAS.

BLAS's own threads wait for each other busily: on a machine that others use too, most of the time goes there. Tiles wait
for nobody, and a result does not depend on how many threads there are.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController


def share_tiles(work: Callable[[range], None], *, n_rows: int, tile_rows: int, n_threads: int | None = None) -> None:
    """Call `work` in each thread with the starts of its tiles; which thread takes a tile must change nothing."""
    starts = range(0, n_rows, tile_rows)
    n_threads = min(n_threads or available_threads(), len(starts))
    with one_blas_thread():
        if n_threads <= 1:
            work(starts)
            return
        with ThreadPoolExecutor(n_threads) as pool:
            for done in [pool.submit(work, starts[offset::n_threads]) for offset in range(n_threads)]:
                done.result()


def one_blas_thread() -> AbstractContextManager[object]:
    """Within it, BLAS and LAPACK use the calling thread alone."""
    return _threadpools().limit(limits=1, user_api="blas")


def available_threads() -> int:
    """Count the threads this process may use: the cores it is given, or OMP_NUM_THREADS where that is fewer."""
    from joblib import cpu_count

    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cpu_count(), int(asked))) if asked.isdigit() else cpu_count()


@functools.lru_cache(maxsize=1)
def _threadpools() -> ThreadpoolController:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
