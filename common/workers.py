"""The processes that compute shards: local ones, which end with the driver and share its GPUs, or those of Dask."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.config import EngineSettings, UserError

# How soon a worker notices that its driver is gone.
_SECONDS_BETWEEN_LOOKS = 1.0


@contextmanager
def workers(engine: EngineSettings, *, n_tasks: int) -> Iterator[None]:
    """In this block joblib's `Parallel` runs in the processes that the settings name."""
    from joblib import parallel_config

    if engine.kind == "dask":
        with _dask_client(engine), parallel_config(backend="dask"):
            yield
        return
    # Never one: joblib would run it in this process, and a shard that kills its worker would kill the driver.
    n_jobs = max(2, min(engine.n_jobs, n_tasks))
    # An hour: a worker that waits keeps the model that it loaded; where its driver was killed, it ends by itself.
    options = {"idle_worker_timeout": 3600, "initializer": prepare_local_worker, "initargs": (os.getpid(),)}
    with parallel_config(backend="loky", n_jobs=n_jobs, **options):
        yield


# --- Local -----------------------------------------------------------------------------------------------------------


def prepare_local_worker(driver: int) -> None:
    """Once in each local worker, as it starts: one that never gets a task has to notice too that its driver is gone."""
    threading.Thread(target=end_with_driver, args=(driver,), daemon=True).start()
    gpus = _visible_gpus()
    if len(gpus) > 1:  # before anything of CUDA is loaded in it
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[_worker_number() % len(gpus)]


def end_with_driver(driver: int) -> None:
    """End this process when its parent is no longer the process `driver`.

    A driver ends its workers, but not where it is killed. What they were writing then is removed by the next run. (The
    signal that Linux sends on request, PR_SET_PDEATHSIG, comes as soon as the thread ends that started the worker.)
    """
    while os.getppid() == driver:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _visible_gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip()]
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    return [path.name.removeprefix("nvidia") for path in devices]


def _worker_number() -> int:
    """Workers are numbered as they are started: LokyProcess-1, LokyProcess-2, …, those of one pool in a row."""
    return int(re.findall(r"\d+", multiprocessing.current_process().name)[-1])


# --- Dask ------------------------------------------------------------------------------------------------------------


@contextmanager
def _dask_client(engine: EngineSettings) -> Iterator[Any]:
    try:
        from dask.distributed import Client
    except ImportError:
        raise UserError("engine.kind=dask needs Dask; run: pip install 'dask[distributed]'") from None

    logging.getLogger("distributed").setLevel(logging.WARNING)  # it asks for more as it is imported
    if not engine.address:
        cluster = _own_cluster(engine.n_jobs)
        try:
            with Client(cluster) as client:
                yield client
        except BaseException:  # a worker that hangs or died would spoil the next attempt too
            _own_cluster.cache_clear()
            cluster.close()
            raise
        return
    try:
        with Client(engine.address, timeout=20) as client:
            yield client
    except (OSError, TimeoutError) as problem:
        raise UserError(f"no Dask scheduler answers at engine.address={engine.address} ({problem})") from None


@lru_cache(maxsize=1)
def _own_cluster(n_workers: int) -> Any:
    """A Dask cluster on this machine, started once a process: its workers keep the model that they loaded."""
    from dask.distributed import LocalCluster

    cluster = LocalCluster(n_workers=n_workers, threads_per_worker=1, dashboard_address=None)
    atexit.register(cluster.close)
    return cluster
