"""The engine: the same bytes whoever computes them; workers that die, hang or raise."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from common.config import EngineSettings, UserError
from common.engine import map_items
from tests import engine_tasks
from tests.stage_runner import Result, run_main
from tests.text_pipeline import STAGE_NAMES, STAGES, TextPipeline, differing, stage_before

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


def test_a_cluster_of_its_own_where_no_address_is_given(pipeline: TextPipeline) -> None:
    pipeline.restore("train")
    result = run_here(pipeline, "predict", EngineSettings(kind="dask", n_jobs=2))
    assert result.exit_code == 0, result.stderr
    assert differing(pipeline.tree(), pipeline.state("predict")) == []


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
    assert set(map_items(_own_pid, [1, 2, 3], EngineSettings())) == {os.getpid()}


def _own_pid(_: int) -> int:
    return os.getpid()
