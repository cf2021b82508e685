"""The engine: the same bytes whoever computes them; workers that die, hang or raise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from common.config import EngineSettings, UserError
from common.engine import map_items
from tests import engine_tasks
from tests.stage_runner import Result, run_main
from tests.text_pipeline import STAGE_NAMES, STAGES, TextPipeline, differing, stage_before

ROOT = Path(__file__).resolve().parent.parent
ITEMS = list("abcdef")
LOCAL = EngineSettings(n_jobs=2)
# Without vectors in memory, stage 3 maps its passes over shards.
STREAMED = "train.memory_limit_gb=0"


@pytest.fixture(scope="module")
def dask_address() -> Iterator[str]:
    """A real Dask cluster of two worker processes."""
    from dask.distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(scope="module", params=["local", "dask"])
def engine(request: pytest.FixtureRequest) -> EngineSettings:
    """Two local workers, or two workers of a Dask cluster."""
    if request.param == "local":
        return LOCAL
    return EngineSettings(kind="dask", n_jobs=2, address=request.getfixturevalue("dask_address"))


def run_here(pipeline: TextPipeline, stage: str, engine: EngineSettings, *arguments: str) -> Result:
    """Run a stage in this process, its shards in workers that stay for the next stage."""
    script, own = STAGES[stage]
    where = [f"engine.{name}={value}" for name, value in engine.model_dump().items() if value is not None]
    return run_main(script, pipeline.config, *own, *where, *arguments)


def without_config(tree: dict[str, bytes]) -> dict[str, Any]:
    """The bytes of all files, but of `_SUCCESS` all except the config, which names the engine."""
    return {
        name: {key: value for key, value in json.loads(content).items() if key != "config"}
        if name.endswith("_SUCCESS")
        else content
        for name, content in tree.items()
        if name != "kmeans.joblib"  # scikit-learn notes in it how many threads the process had
    }


# --- Stages ----------------------------------------------------------------------------------------------------------


def test_every_stage_gives_the_same_bytes_in_two_workers(pipeline: TextPipeline, engine: EngineSettings) -> None:
    for stage in STAGE_NAMES:
        pipeline.restore(stage_before(stage))
        result = run_here(pipeline, stage, engine, STREAMED)
        assert result.exit_code == 0, result.stderr
        found, wanted = without_config(pipeline.tree()), without_config(pipeline.state(stage))
        assert differing(found, wanted) == [], stage


def test_one_cluster_for_the_whole_run_where_no_address_is_given(pipeline: TextPipeline, tmp_path: Path) -> None:
    engine = EngineSettings(kind="dask", n_jobs=2)
    pipeline.restore("train")
    result = run_here(pipeline, "predict", engine)
    assert result.exit_code == 0, result.stderr
    assert differing(pipeline.tree(), pipeline.state("predict")) == []
    workers = set(map_items(engine_tasks.own_pid, ITEMS, engine))
    assert set(map_items(engine_tasks.own_pid, ITEMS, engine)) == workers and len(workers) == 2
    # After a failure the next attempt gets new workers; here it also ends what the test has started.
    with pytest.raises(UserError, match="item c is no good"):
        map_items(partial(engine_tasks.refuse, folder=tmp_path), ITEMS, engine)
    assert wait_until_gone(workers)


def test_an_error_in_a_worker_is_the_error_line_of_one_process(pipeline: TextPipeline, engine: EngineSettings) -> None:
    lines = []
    for engine_settings in (EngineSettings(), engine):
        pipeline.restore("train")
        path = pipeline.work / "pca" / "part-00001.parquet"
        content = bytearray(path.read_bytes())
        row_group = pq.read_metadata(path).row_group(0)
        columns = {row_group.column(i).path_in_schema: row_group.column(i) for i in range(row_group.num_columns)}
        content[columns["cls.list.element"].data_page_offset + 600] ^= 0xFF
        path.write_bytes(bytes(content))
        result = run_here(pipeline, "predict", engine_settings)
        assert result.exit_code == 1
        lines.append(result.error)
    assert lines[0] == lines[1]
    assert "part-00001.parquet is damaged" in lines[0]


# --- Workers ---------------------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_items(engine: EngineSettings, tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []
    task = partial(engine_tasks.write_name, folder=tmp_path)
    found = map_items(task, ITEMS, engine, on_result=lambda item, result: seen.append((item, result)))
    assert found == list("ABCDEF")
    assert sorted(seen) == list(zip("abcdef", "ABCDEF", strict=True))
    assert map_items(task, [], engine) == []


def test_a_worker_that_dies_once_costs_one_item(engine: EngineSettings, tmp_path: Path) -> None:
    found = map_items(
        partial(engine_tasks.die_once, folder=tmp_path),
        ITEMS,
        engine,
        is_done=lambda item: (tmp_path / item).exists(),
    )
    # What a dead worker had committed before is not computed again, and has no result then.
    assert all(result in (None, item.upper()) for item, result in zip(ITEMS, found, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".died") == ITEMS
    assert (tmp_path / ".died").exists()


def test_workers_that_always_die_are_given_up_and_finished_items_stay(tmp_path: Path) -> None:
    engine = EngineSettings(n_jobs=2, retries=1)
    with pytest.raises(UserError, match=r"of 6 shards could not be computed in 2 attempts.*finished shards are kept"):
        map_items(
            partial(engine_tasks.die_always, folder=tmp_path),
            ITEMS,
            engine,
            is_done=lambda item: (tmp_path / item).exists(),
        )
    assert {"a", "b"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "c").exists()


def test_a_mistake_of_the_user_comes_back_as_it_is(engine: EngineSettings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^item c is no good; give another$"):
        map_items(partial(engine_tasks.refuse, folder=tmp_path), ITEMS, engine)


def test_a_bug_keeps_the_traceback_of_the_worker(engine: EngineSettings) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        map_items(engine_tasks.fail, ITEMS, engine)
    notes = "".join(caught.value.__notes__)
    assert "engine_tasks.py" in notes and "in fail" in notes


def test_this_process_computes_by_itself_when_one_job_is_asked_for() -> None:
    assert set(map_items(engine_tasks.own_pid, ITEMS, EngineSettings())) == {os.getpid()}


def test_workers_keep_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to see who would use which; a worker keeps its own for all maps."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    end_local_workers()
    gpu_of: set[tuple[int, str]] = set()
    for _ in range(2):
        gpu_of |= set(map_items(engine_tasks.own_gpu, ITEMS, LOCAL))
    assert sorted(gpu for _, gpu in gpu_of) == ["4", "7"]
    end_local_workers()


def end_local_workers() -> None:
    """The next map starts new ones, with the environment of then."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)


# --- A driver that is killed -----------------------------------------------------------------------------------------

DRIVER = """
import sys
from functools import partial
from pathlib import Path
from tests import engine_tasks
task = partial(engine_tasks.write_pid_and_stay, folder=Path(sys.argv[2]))
if sys.argv[1] == "ours":
    from common.config import EngineSettings
    from common.engine import map_items
    map_items(task, ["a"], EngineSettings(n_jobs=2))
else:
    from joblib import Parallel, delayed
    Parallel(n_jobs=2, batch_size=1)(delayed(task)(item) for item in ["a"])
"""


def test_workers_end_when_their_driver_is_killed(tmp_path: Path) -> None:
    """One of the two is at work, the other was never given a task."""
    workers = {name: kill_driver(name, tmp_path / name) for name in ("ours", "joblib alone")}
    try:
        assert wait_until_gone(workers["ours"])
        assert all(is_running(pid) for pid in workers["joblib alone"])  # the negative control
    finally:
        for pid in {*workers["ours"], *workers["joblib alone"]}:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


def kill_driver(name: str, folder: Path) -> set[int]:
    """Start a driver with two workers and one task, kill it when that is begun, and return the workers' numbers."""
    folder.mkdir()
    workers: set[int] = set()
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, name, str(folder)], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while len(workers) < 2 or not (folder / "a").exists():
            assert driver.poll() is None, "the driver ended by itself"
            time.sleep(0.05)
            workers = {child.pid for child in psutil.Process(driver.pid).children() if is_worker(child)}
    finally:
        driver.kill()
        driver.wait()
    assert int((folder / "a").read_text()) in workers
    return workers


def is_worker(process: psutil.Process) -> bool:
    """Whether a process is one of joblib's workers; it starts another one beside them, which tidies up."""
    try:
        return any(word.startswith("LokyProcess") for word in process.cmdline())
    except psutil.Error:  # gone in between
        return False


def wait_until_gone(pids: set[int]) -> bool:
    """Whether all processes end, at last."""
    give_up = time.monotonic() + 30
    while any(is_running(pid) for pid in pids) and time.monotonic() < give_up:
        time.sleep(0.1)
    return not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    """Whether a process computes; one that has ended and that nobody has asked about yet does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # gone in between, or a system without /proc, where the first line has said all
        return not Path("/proc").exists()
