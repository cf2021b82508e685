"""Every stage is killed at its touches of the disk and started again: the result is the same, byte for byte.

The commands are real, so are the kills; what is killed is chosen by the touches that an undisturbed run made. Two
writers of the usual, wrong kind stand by as negative controls: this very harness must find them out.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.text_pipeline import ROOT, STAGE_NAMES, Outcome, TextPipeline, differing, stage_before

KILLED = -signal.SIGKILL


def kill_points(touches: list[tuple[str, str]], *, every_shard: bool = True) -> list[int]:
    """Every open, fsync, rename and removal, and of the writes to each file the one in its middle, torn in half.

    Shards are written alike: `every_shard=False` takes of all but the first only the rename.
    """
    chosen = []
    for (kind, path), run in groupby(enumerate(touches), key=lambda numbered: numbered[1]):
        numbers = [number for number, _ in run]
        is_later_shard = "part-0" in path and "part-00000" not in path
        if every_shard or kind == "rename" or not is_later_shard:
            chosen += [numbers[len(numbers) // 2]] if kind == "write" else numbers
    return chosen


def survey(
    pipeline: TextPipeline, stage: str, start: str, *arguments: str, every_shard: bool = False
) -> tuple[list[int], dict[str, bytes]]:
    """Run undisturbed from the state `start`: where to kill, and the bytes to be reached in the end."""
    pipeline.restore(start)
    outcome = pipeline.run(stage, *arguments)
    assert outcome.exit_code == 0, outcome.stderr
    return kill_points(outcome.touches, every_shard=every_shard), pipeline.tree()


def unhealed(
    pipeline: TextPipeline, stage: str, start: str, *arguments: str, points: list[int], wanted: dict[str, bytes]
) -> dict[int, str]:
    """Kill at each point, run again, compare; what went wrong, by point."""
    problems = {}
    for point in points:
        pipeline.restore(start)
        killed = pipeline.run(stage, *arguments, fault={"at": point, "how": "kill"})
        assert killed.exit_code == KILLED, (point, killed)
        again = pipeline.run(stage, *arguments)
        wrong = differing(pipeline.tree(), wanted)
        if again.exit_code != 0 or wrong:
            problems[point] = f"killed at {killed.touches[-1]}: exit {again.exit_code}, {again.stderr[-300:]} {wrong}"
    return problems


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_killed_anywhere_the_same_command_finishes_with_the_same_bytes(pipeline: TextPipeline, stage: str) -> None:
    points, wanted = survey(pipeline, stage, stage_before(stage), every_shard=stage == "pca")
    assert differing(wanted, pipeline.state(stage)) == []  # and two undisturbed runs agree
    assert len(points) >= 9
    assert unhealed(pipeline, stage, stage_before(stage), points=points, wanted=wanted) == {}


def test_the_harness_sees_every_file_that_a_stage_changes(pipeline: TextPipeline) -> None:
    for stage in STAGE_NAMES:
        start = stage_before(stage)
        pipeline.restore(start)
        touches = pipeline.run(stage).touches
        before = {} if start == "empty" else pipeline.state(start)
        changed = set(differing(before, pipeline.tree()))
        assert changed == {path for kind, path in touches if kind == "rename"}
        assert {kind for kind, _ in touches} >= {"open", "write", "fsync", "rename"}


# --- Paths beside the straight one -----------------------------------------------------------------------------------


def test_csv_input_killed_while_it_is_copied_or_cleared_away(pipeline: TextPipeline, tmp_path: Path) -> None:
    source = tmp_path / "requests.csv"
    rows = pq.read_table(pipeline.input).select(["text", "label", "teacher_label"]).to_pandas()
    rows.dropna(subset="text").to_csv(source, index=False)
    arguments = (f"supervise.input_parquet={source}", "supervise.num_shards=1")
    points, wanted = survey(pipeline, "supervise", "empty", *arguments)
    assert [name for name in wanted if ".input" in name] == []
    pipeline.restore("empty")
    touches = pipeline.run("supervise", *arguments).touches
    copying = [point for point in points if ".input" in touches[point][1] or "_SUCCESS" in touches[point][1]]
    assert {touches[point][0] for point in copying} >= {"open", "write", "rename", "remove"}
    assert unhealed(pipeline, "supervise", "empty", *arguments, points=copying, wanted=wanted) == {}


def test_a_list_of_cluster_numbers_killed_between_its_files(pipeline: TextPipeline) -> None:
    arguments = ("train.n_clusters=[3,5]", "train.silhouette_sample=100")
    points, wanted = survey(pipeline, "train", "pca", *arguments)
    assert {"centroids.k3.parquet", "centroids.k5.parquet", "centroids.parquet", "kmeans.joblib"} <= wanted.keys()
    pipeline.restore("pca")
    touches = pipeline.run("train", *arguments).touches
    renames = [point for point in points if touches[point][0] == "rename"]
    assert unhealed(pipeline, "train", "pca", *arguments, points=renames, wanted=wanted) == {}


def test_a_dataset_in_one_file_killed_between_the_file_and_its_summary(pipeline: TextPipeline) -> None:
    arguments = (f"update_dataset.output_path={pipeline.work / 'dataset.parquet'}",)
    points, wanted = survey(pipeline, "dataset", "purity", *arguments)
    assert {"dataset.parquet", "dataset.json"} <= wanted.keys()
    assert unhealed(pipeline, "dataset", "purity", *arguments, points=points, wanted=wanted) == {}


def test_overwriting_killed_anywhere_then_the_same_command(pipeline: TextPipeline) -> None:
    arguments = ("normalize_and_pca.n_components=5", "--overwrite")
    points, wanted = survey(pipeline, "pca", "pca", *arguments)
    pipeline.restore("pca")
    touches = pipeline.run("pca", *arguments).touches
    few = [point for point in points if touches[point][0] in ("remove", "rename")]
    assert unhealed(pipeline, "pca", "pca", *arguments, points=few, wanted=wanted) == {}


def test_a_killed_overwrite_never_passes_for_the_old_result(pipeline: TextPipeline) -> None:
    """Started again with the OLD settings, a stage must give all of the old result or refuse, never a mixture."""
    cases = {
        "train": ("train", ("train.n_clusters=4",)),
        "purity": ("purity", ("purity_counter.examples_per_cluster=2",)),
    }
    for stage, (start, change) in cases.items():
        points, _ = survey(pipeline, stage, start, *change, "--overwrite")
        pipeline.restore(start)
        touches = pipeline.run(stage, *change, "--overwrite").touches
        for point in (point for point in points if touches[point][0] in ("open", "remove")):
            pipeline.restore(start)
            killed = pipeline.run(stage, *change, "--overwrite", fault={"at": point, "how": "kill"})
            assert killed.exit_code == KILLED
            again = pipeline.run(stage)
            if again.exit_code == 0:
                assert differing(pipeline.tree(), pipeline.state(start)) == [], killed.touches[-1]
            else:
                assert "another configuration" in again.error


def test_killing_the_script_started_from_a_shell(pipeline: TextPipeline) -> None:
    """Once without the server: the script's own process, killed by the first shard that appears."""
    pipeline.restore("pca")
    command = [sys.executable, "cluster_normalize_and_pca.py", "--config", str(pipeline.config)]
    command += ["normalize_and_pca.n_components=6", "--overwrite"]
    _, wanted = survey(pipeline, "pca", "pca", *command[-2:])
    pipeline.restore("pca")
    success = pipeline.work / "pca" / "_SUCCESS"
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while success.exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    again = pipeline.run("pca", *command[-2:])
    assert (again.exit_code, differing(pipeline.tree(), wanted)) == (0, [])


# --- Plain folders ---------------------------------------------------------------------------------------------------


def make_plain(folder: Path) -> Path:
    """Turn a stage's shards into a folder that another program could have written: no stamps, no `_SUCCESS`."""
    for path in sorted(folder.glob("part-*.parquet")):
        pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    for name in ("_SUCCESS", ".lock", "pca.safetensors", "pca.json"):
        (folder / name).unlink(missing_ok=True)
    return folder


def test_ids_added_to_a_plain_folder_killed_anywhere(pipeline: TextPipeline) -> None:
    pipeline.restore("train")
    make_plain(pipeline.work / "pca")
    if not (pipeline.states / "plain").exists():
        pipeline.save("plain")
    points, wanted = survey(pipeline, "predict", "plain")
    assert pipeline.run("purity").exit_code == 0
    points = points[: len(points) // 2]  # to the end of the second shard
    assert unhealed(pipeline, "predict", "plain", points=points, wanted=wanted) == {}


# --- The disk says no ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_full_disk_is_one_clear_line_and_loses_nothing(pipeline: TextPipeline, stage: str) -> None:
    start = stage_before(stage)
    points, wanted = survey(pipeline, stage, start)
    pipeline.restore(start)
    touches = pipeline.run(stage).touches
    writes = [point for point in points if touches[point][1].endswith(".tmp") and touches[point][0] != "open"]
    for point in (writes[0], writes[-1]):
        pipeline.restore(start)
        before = pipeline.tree()
        full = pipeline.run(stage, fault={"at": point, "how": "full"})
        assert full.exit_code == 1
        target = touches[point][1].rpartition("/")[2].lstrip(".").partition(".")[0]
        assert "disk is full" in full.error and f"/{target}" in full.error
        assert [name for name in pipeline.tree() if name.endswith(".tmp")] == []
        kept = {name: content for name, content in pipeline.tree().items() if name in before}
        assert kept.keys() == before.keys()
        assert pipeline.run(stage).exit_code == 0
        assert differing(pipeline.tree(), wanted) == []


def test_a_file_size_limit_of_the_shell_is_told_and_the_old_result_stays(pipeline: TextPipeline) -> None:
    before = pipeline.tree()
    refused = pipeline.run("train", "train.n_clusters=9", "--overwrite", max_file_bytes=1500)
    assert refused.exit_code == 1
    assert "ulimit -f" in refused.error
    assert {name: before[name] for name in ("centroids.parquet",)} == {
        "centroids.parquet": pipeline.tree()["centroids.parquet"]
    }
    assert pipeline.run("train", "train.n_clusters=9", "--overwrite").exit_code == 0


# --- Negative controls -----------------------------------------------------------------------------------------------


@pytest.fixture
def bad_writer(pipeline: TextPipeline) -> Iterator[Any]:
    """Runs a bad writer: bad_writer(skip_if, *more, fault=…)."""
    original = pipeline.config.read_text(encoding="utf-8")
    section = {"bad_writer": {"output_dir": str(pipeline.work / "bad"), "skip_if": "exists"}}
    pipeline.config.write_text(original + yaml.safe_dump(section), encoding="utf-8")

    def run(skip_if: str, *more: str, fault: dict[str, Any] | None = None) -> Outcome:
        return pipeline.run("tests.bad_writers", f"bad_writer.skip_if={skip_if}", *more, fault=fault)

    yield run
    pipeline.config.write_text(original, encoding="utf-8")


def test_control_a_writer_that_skips_files_that_exist_is_caught(pipeline: TextPipeline, bad_writer: Any) -> None:
    pipeline.restore("empty")
    points = kill_points(bad_writer("exists").touches)
    wanted = pipeline.tree()
    arguments = ("bad_writer.skip_if=exists",)
    caught = unhealed(pipeline, "tests.bad_writers", "empty", *arguments, points=points, wanted=wanted)
    assert sorted(caught[point].rpartition("[")[2] for point in caught) == [
        "'bad/part-00000.parquet']",
        "'bad/part-00001.parquet']",
        "'bad/part-00002.parquet']",
    ]


def test_control_a_writer_that_skips_readable_files_is_caught(pipeline: TextPipeline, bad_writer: Any) -> None:
    """Kills alone do not catch it, as a torn file has no footer; an exception or another configuration does."""
    pipeline.restore("empty")
    points = kill_points(bad_writer("readable").touches)
    wanted = pipeline.tree()
    arguments = ("bad_writer.skip_if=readable",)
    assert unhealed(pipeline, "tests.bad_writers", "empty", *arguments, points=points, wanted=wanted) == {}

    pipeline.restore("empty")
    assert bad_writer("readable", "bad_writer.fail_in_shard=1").exit_code == 1
    assert bad_writer("readable").exit_code == 0
    assert differing(pipeline.tree(), wanted) == ["bad/part-00001.parquet"]  # half a shard, taken for done

    pipeline.restore("empty")
    assert bad_writer("readable", fault={"at": points[-4], "how": "kill"}).exit_code == KILLED
    assert bad_writer("readable", "bad_writer.factor=2").exit_code == 0  # two configurations in one folder, unnoticed
    values = [pq.read_table(path)["value"].to_pylist() for path in sorted((pipeline.work / "bad").glob("*.parquet"))]
    firsts = [shard[1] - shard[0] for shard in values]
    assert sorted(set(firsts)) == [1, 2]


def test_control_our_stages_pass_where_the_second_writer_fails(pipeline: TextPipeline) -> None:
    """An exception inside a shard leaves nothing behind, and half-done work of another configuration is refused."""
    pipeline.restore("supervise")
    path = pipeline.work / "supervised" / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    columns = pq.read_metadata(path).row_group(0)
    vectors = next(
        columns.column(i) for i in range(columns.num_columns) if columns.column(i).path_in_schema.startswith("cls")
    )
    content[vectors.data_page_offset + 600] ^= 0xFF
    path.write_bytes(bytes(content))
    failed = pipeline.run("pca", "normalize_and_pca.fit=true")
    assert failed.exit_code == 1 and "part-00001.parquet is damaged" in failed.error
    pipeline.restore("supervise")
    points, wanted = survey(pipeline, "pca", "supervise")
    pipeline.restore("supervise")
    assert pipeline.run("pca", fault={"at": points[-6], "how": "kill"}).exit_code == KILLED
    refused = pipeline.run("pca", "normalize_and_pca.n_components=3")
    assert refused.exit_code == 1
    assert "n_components: 8 -> 3" in refused.error
    assert pipeline.run("pca").exit_code == 0
    assert differing(pipeline.tree(), wanted) == []
