"""Run again: nothing to do, a refusal that names the change, or just the missing part; and two runs at once."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.commit import describe_changes
from tests.text_pipeline import (
    ROOT,
    STAGE_NAMES,
    STAGES,
    TextPipeline,
    differing,
    requests_table,
    stage_before,
    times_of,
    write_requests,
)

# stage -> a changed key that matters, as (section, key, old, new)
SEMANTIC = {
    "supervise": ("supervise", "num_shards", "3", "2"),
    "pca": ("normalize_and_pca", "n_components", "8", "4"),
    "train": ("train", "n_clusters", "7", "5"),
    "predict": ("train", "centroid_column", '"cluster_id"', '"nearest"'),
    "purity": ("purity_counter", "teacher_label_column", '"teacher_label"', '"label"'),
    "dataset": ("update_dataset", "metric_purity_threshold", "0.4", "0.5"),
}
# Keys that do not matter to the numbers.
HARMLESS = {
    "supervise": ("supervise.batch_size=3", "supervise.num_workers=1"),
    "pca": ("normalize_and_pca.batch_size=7", "normalize_and_pca.use_gpu_pca=false"),
    "train": ("train.memory_limit_gb=1", "train.num_workers=2"),
    "predict": ("train.num_workers=2", "train.n_clusters=99"),  # the number of clusters is in the centroids by now
    "purity": ("purity_counter.log_level=debug",),
    "dataset": ("update_dataset.holdout_fraction=0.5",),
}
SECTIONS = {stage: section for stage, (section, *_) in SEMANTIC.items()}


def lock_of(pipeline: TextPipeline, stage: str) -> Path:
    """The lock file of a stage's output."""
    work = pipeline.work
    folders = {"supervise": "supervised/.lock", "pca": "pca/.lock", "predict": "pca/.lock", "dataset": "dataset/.lock"}
    return work / folders.get(stage, ".centroids.parquet.lock")


# --- Nothing to do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_unchanged_or_harmlessly_changed_there_is_nothing_to_do(pipeline: TextPipeline, stage: str) -> None:
    before = times_of(pipeline.work)
    first = pipeline.run(stage)
    changed = pipeline.run(stage, *HARMLESS[stage], "engine.n_jobs=2", f"{SECTIONS[stage]}.progress=true")
    for outcome in (first, changed):
        assert outcome.exit_code == 0, outcome.stderr
        assert "nothing to do" in outcome.stderr
    assert first.stdout == changed.stdout
    assert times_of(pipeline.work) == before


def test_a_key_that_one_side_does_not_have_is_not_called_null() -> None:
    """A version that has a new key, and a key that plays no part: neither was ever set to null."""
    of_one = {"stage": "s", "format": 1}
    before = of_one | {"keys": {"old": 3, "same": None}}
    after = of_one | {"keys": {"same": None, "new": 1.0}}
    assert describe_changes(before, after) == "new: plays no part -> 1.0; old: 3 -> plays no part"


def test_a_second_run_prints_the_same_result_as_the_first(pipeline: TextPipeline) -> None:
    for stage in STAGE_NAMES:
        pipeline.restore(stage_before(stage))
        assert pipeline.run(stage).stdout == pipeline.run(stage).stdout != ""


def test_check_writes_nothing(pipeline: TextPipeline) -> None:
    for stage in STAGE_NAMES:
        pipeline.restore(stage_before(stage))
        before = times_of(pipeline.work)
        outcome = pipeline.run(stage, "--check")
        assert outcome.exit_code == 0, outcome.stderr
        assert times_of(pipeline.work) == before
        assert outcome.touches == []


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_changed_key_is_refused_by_name_with_both_values(pipeline: TextPipeline, stage: str) -> None:
    section, key, old, new = SEMANTIC[stage]
    before = pipeline.tree()
    outcome = pipeline.run(stage, f"{section}.{key}={new}")
    assert outcome.exit_code == 1
    assert f"{key}: {old} -> {new}" in outcome.error
    assert "--overwrite" in outcome.error
    assert differing(pipeline.tree(), before) == []


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_overwrite_gives_what_a_fresh_run_would(pipeline: TextPipeline, stage: str) -> None:
    section, key, _, new = SEMANTIC[stage]
    change = f"{section}.{key}={new}"
    pipeline.restore(stage_before(stage))
    assert pipeline.run(stage, change).exit_code == 0
    fresh = pipeline.tree()
    pipeline.restore(stage)
    outcome = pipeline.run(stage, change, "--overwrite")
    assert outcome.exit_code == 0, outcome.stderr
    in_place = {"predict": {"cluster_id"}, "purity": set()}
    if stage in in_place:  # columns beside which the new ones stand
        assert pipeline.run(stage, change).exit_code == 0
    else:
        assert differing(pipeline.tree(), fresh) == []


def test_overwrite_with_fewer_shards_leaves_no_stale_shard(pipeline: TextPipeline) -> None:
    assert pipeline.run("supervise", "supervise.num_shards=2", "--overwrite").exit_code == 0
    names = sorted(path.name for path in (pipeline.work / "supervised").glob("*.parquet"))
    assert names == ["part-00000.parquet", "part-00001.parquet"]


def test_overwrite_of_the_same_configuration_computes_again(pipeline: TextPipeline) -> None:
    for stage in STAGE_NAMES:
        pipeline.restore(stage)
        before = times_of(pipeline.work)
        outcome = pipeline.run(stage, "--overwrite")
        assert "nothing to do" not in outcome.stderr
        assert differing(pipeline.tree(), pipeline.state(stage)) == [], stage
        assert times_of(pipeline.work) != before


def test_resume_false_computes_everything_again(pipeline: TextPipeline) -> None:
    before = times_of(pipeline.work / "supervised")
    outcome = pipeline.run("supervise", "supervise.resume=false")
    after = times_of(pipeline.work / "supervised")
    assert outcome.exit_code == 0
    assert all(after[name] > before[name] for name in before)
    assert differing(pipeline.tree(), pipeline.state("dataset")) == ["supervised/_SUCCESS"]  # it holds the config
    assert pipeline.run("supervise", "supervise.resume=false", "supervise.num_shards=1").exit_code == 0


def test_a_changed_input_is_refused_by_every_stage_down_the_line(pipeline: TextPipeline, tmp_path: Path) -> None:
    other = write_requests(tmp_path / "requests.parquet", requests_table(seed=1))
    arguments = (f"supervise.input_parquet={other}",)
    refused = pipeline.run("supervise", *arguments)
    assert "input_parquet itself changed" in refused.error
    assert pipeline.run("supervise", *arguments, "--overwrite").exit_code == 0
    for stage in ("pca", "train"):
        refused = pipeline.run(stage)
        assert (refused.exit_code, "input_dir itself changed" in refused.error) == (1, True), refused
        assert pipeline.run(stage, "--overwrite").exit_code == 0
    for stage in ("predict", "purity"):  # what they had added went with the shards and centroids
        assert pipeline.run(stage).exit_code == 0
    assert "itself changed" in pipeline.run("dataset").error


def test_a_half_done_stage_is_no_input(pipeline: TextPipeline) -> None:
    pipeline.restore("empty")
    touches = pipeline.state("supervise")
    assert touches
    killed = pipeline.run("supervise", fault={"at": 100, "how": "kill"})
    assert killed.exit_code == -signal.SIGKILL
    refused = pipeline.run("pca")
    assert refused.exit_code == 1
    assert "unfinished" in refused.error and "cluster_supervise.py" in refused.error


def test_another_stages_output_is_never_overwritten(pipeline: TextPipeline) -> None:
    """`output_dir` set to the input: the advice to use --overwrite would destroy what is being read."""
    before = pipeline.tree()
    same = {
        "pca": f"normalize_and_pca.output_dir={pipeline.work / 'supervised'}",
        "predict": f"train.output_dir={pipeline.work / 'pca'}",
        "dataset": f"update_dataset.output_path={pipeline.work / 'pca'}",
    }
    for stage, override in same.items():
        for arguments in ((override,), (override, "--overwrite")):
            outcome = pipeline.run(stage, *arguments)
            assert outcome.exit_code == 1, (stage, outcome)
            assert "--overwrite" not in outcome.error
            assert differing(pipeline.tree(), before) == []
    onto = f"update_dataset.output_path={pipeline.work / 'centroids.parquet'}"
    assert "choose another path" in pipeline.run("dataset", onto, "--overwrite").error
    again = f"normalize_and_pca.input_dir={pipeline.work / 'pca'}"
    outcome = pipeline.run("pca", again, "normalize_and_pca.vector_column=pca", "--overwrite")
    assert outcome.exit_code == 1
    assert differing(pipeline.tree(), before) == []


# --- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["supervise", "pca", "dataset"])
@pytest.mark.parametrize("harm", ["deleted", "cut short"])
def test_one_lost_shard_is_computed_again_alone(pipeline: TextPipeline, stage: str, harm: str) -> None:
    pipeline.restore(stage)
    folder = pipeline.work / {"supervise": "supervised"}.get(stage, stage)
    lost = folder / "part-00001.parquet"
    before = times_of(pipeline.work)
    if harm == "deleted":
        lost.unlink()
    else:
        lost.write_bytes(lost.read_bytes()[:-100])
    outcome = pipeline.run(stage)
    assert outcome.exit_code == 0, outcome.stderr
    assert ("is damaged" in outcome.stderr) == (harm == "cut short")
    assert differing(pipeline.tree(), pipeline.state(stage)) == []
    touched = {Path(name).name for name, time in times_of(pipeline.work).items() if before.get(name) != time}
    assert touched == {"part-00001.parquet", "_SUCCESS"}


def test_a_lost_shard_is_named_by_the_stage_that_reads_it(pipeline: TextPipeline) -> None:
    (pipeline.work / "pca" / "part-00002.parquet").unlink()
    for stage in ("train", "predict", "purity", "dataset"):
        assert "part-00002.parquet is missing" in pipeline.run(stage).error


def test_a_damaged_success_is_mended_by_overwrite(pipeline: TextPipeline) -> None:
    for stage, folder in (("supervise", "supervised"), ("pca", "pca"), ("dataset", "dataset")):
        pipeline.restore(stage)
        success = pipeline.work / folder / "_SUCCESS"
        success.write_text(success.read_text()[:50])
        refused = pipeline.run(stage)
        assert refused.exit_code == 1 and "_SUCCESS is damaged" in refused.error and "--overwrite" in refused.error
        outcome = pipeline.run(stage, "--overwrite")
        assert outcome.exit_code == 0, outcome.stderr
        assert differing(pipeline.tree(), pipeline.state(stage)) == []


def test_a_lost_joblib_or_report_comes_back_and_the_centroids_keep_their_purity(pipeline: TextPipeline) -> None:
    wanted = pipeline.tree()
    (pipeline.work / "kmeans.joblib").unlink()
    assert pipeline.run("train").exit_code == 0
    assert differing(pipeline.tree(), wanted) == []
    for name in ("purity_report.html", "purity_report.json"):
        (pipeline.work / name).unlink()
        assert pipeline.run("purity").exit_code == 0
        assert differing(pipeline.tree(), wanted) == []


# --- Stages 4 to 6 ---------------------------------------------------------------------------------------------------


def test_ids_half_added_are_refused_until_they_are_whole(pipeline: TextPipeline) -> None:
    pipeline.restore("train")
    touches = pipeline.run("predict").touches
    second_shard = [number for number, touch in enumerate(touches) if touch == ("rename", "pca/part-00001.parquet")]
    pipeline.restore("train")
    assert pipeline.run("predict", fault={"at": second_shard[0], "how": "kill"}).exit_code == -signal.SIGKILL
    for stage in ("purity", "dataset"):
        refused = pipeline.run(stage)
        assert refused.exit_code == 1
        assert "no column 'cluster_id'" in refused.error or "unfinished" in refused.error
        assert "run_mode=predict" in refused.error
    assert pipeline.run("train").exit_code == 0  # which reads other columns
    assert pipeline.run("predict").exit_code == 0
    assert differing(pipeline.tree(), pipeline.state("predict")) == []


def test_ids_half_renewed_are_refused_though_every_shard_has_the_column(pipeline: TextPipeline) -> None:
    assert pipeline.run("train", "train.n_clusters=4", "--overwrite").exit_code == 0
    refused = pipeline.run("predict")
    assert refused.exit_code == 1 and "centroids_out itself changed" in refused.error
    for stage in ("purity", "dataset"):
        assert pipeline.run(stage).exit_code == 1
    assert "other centroids" in pipeline.run("purity").error
    touches = pipeline.run("predict", "--overwrite").touches
    second_shard = touches.index(("rename", "pca/part-00001.parquet"))
    assert pipeline.run("train", "train.n_clusters=5", "--overwrite").exit_code == 0
    killed = pipeline.run("predict", "--overwrite", fault={"at": second_shard, "how": "kill"})
    assert killed.exit_code == -signal.SIGKILL
    refused = pipeline.run("purity")
    assert refused.exit_code == 1 and "unfinished" in refused.error
    assert pipeline.run("predict", "--overwrite").exit_code == 0
    assert pipeline.run("purity").exit_code == 0
    ids = pa.concat_tables([pq.read_table(path) for path in sorted((pipeline.work / "pca").glob("*.parquet"))])
    assert set(ids["cluster_id"].to_pylist()) == {0, 1, 2, 3, 4, None}


def test_ids_into_a_folder_of_their_own(pipeline: TextPipeline) -> None:
    pipeline.restore("train")
    before = pipeline.tree()
    arguments = (f"train.output_dir={pipeline.work / 'ids'}",)
    assert pipeline.run("predict", *arguments).exit_code == 0
    assert {name: pipeline.tree()[name] for name in before} == before  # the shards stay as they were
    assert "nothing to do" in pipeline.run("predict", *arguments).stderr
    for index in range(3):
        ids = pq.read_table(pipeline.work / "ids" / f"part-{index:05d}.parquet")
        assert ids.column_names == ["cluster_id", "cluster_distance"]
        in_place = pq.read_table(pipeline.states / "predict" / "pca" / f"part-{index:05d}.parquet")
        assert ids.equals(in_place.select(ids.column_names))


# --- Two runs at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_an_output_that_is_being_written_is_left_alone(pipeline: TextPipeline, stage: str) -> None:
    before = pipeline.tree()
    with lock_of(pipeline, stage).open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        outcome = pipeline.run(stage, "--overwrite")
    assert outcome.exit_code == 75
    assert "is being written by pid " in outcome.error
    assert differing(pipeline.tree(), before) == []


def test_the_second_of_two_runs_names_the_first(pipeline: TextPipeline) -> None:
    """The first is stopped while it holds the lock, so that the second surely comes second."""
    pipeline.restore("supervise")
    script, _ = STAGES["pca"]
    command = [sys.executable, f"{script}.py", "--config", str(pipeline.config)]
    hold = (
        "import os, signal, sys; from common import extended_shard as module; real = module.write_extended_shard\n"
        "def stopping(*a, **k):\n    os.kill(os.getpid(), signal.SIGSTOP); return real(*a, **k)\n"
        "module.write_extended_shard = stopping\n"
        "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    first = subprocess.Popen([sys.executable, "-c", hold, *command[1:]], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        os.waitpid(first.pid, os.WUNTRACED)
        second = pipeline.run("pca")
        assert second.exit_code == 75
        assert f"pid {first.pid} " in second.error
    finally:
        first.kill()
        first.communicate()
    assert pipeline.run("pca").exit_code == 0  # the kernel has freed the lock
    assert differing(pipeline.tree(), pipeline.state("pca")) == []
