"""A tuning is killed at its touches of the disk and started again: the same end, and no evaluation done twice."""

from __future__ import annotations

import errno
import json
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterative_tuning
from common.commit import atomic_file, save_array
from tests.tuning_runs import (
    TuningServer,
    read_results,
    tuning_settings,
    tuning_values,
    write_config,
    write_digits,
)

TUNING = {"search_strategy": "evolution", "max_evaluations": 9, "population_size": 4, "stability_top_n": 1}


@pytest.fixture(scope="module")
def server():
    server = TuningServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Images, and a cache with all embeddings, so that a killed run is quick."""
    folder = tmp_path_factory.mktemp("crash")
    write_digits(folder / "images", n_each=20)
    iterative_tuning.run(tuning_settings(folder / "images", folder / "warm", folder / "cache", **TUNING))
    return folder


def config_of(prepared: Path, folder: Path) -> tuple[Path, Path]:
    """A config whose output is `folder`/run/out, and that output."""
    output = folder / "run" / "out"
    folder.mkdir(exist_ok=True)
    values = tuning_values(prepared / "images", output, prepared / "cache", **TUNING)
    return write_config(folder / "config.yaml", values), output


def evaluations(output: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in output.rglob("evaluation.json")}


def survey(prepared: Path, server: TuningServer, folder: Path, script: str) -> tuple[list[Any], dict[str, bytes]]:
    """What an undisturbed run touches, and what it leaves."""
    config, output = config_of(prepared, folder)
    whole = server.run(config, folder / "run", script=script)
    assert whole["exit_code"] == 0, whole["stderr"]
    return whole["touches"], portable(output)


def portable(output: Path) -> dict[str, bytes]:
    return {name: content.replace(str(output).encode(), b"OUT") for name, content in read_results(output).items()}


@pytest.mark.parametrize(("script", "n_points"), [("tests.tuning_runs", 5), ("iterative_tuning", 1)])
def test_killed_anywhere_it_reaches_the_same_end(prepared, server, tmp_path, script, n_points):
    touches, wanted = survey(prepared, server, tmp_path / "whole", script)
    journal = [i for i, (kind, path) in enumerate(touches) if path.endswith("study.journal")]
    if script == "iterative_tuning":  # the search itself is what the other one kills
        points = [next(i for i, (_, path) in enumerate(touches) if name in path) + 2 for name in ("rank_05",)]
    else:
        points = sorted({*range(3, len(touches), len(touches) // n_points), journal[0], journal[-2]})
    for point in points:
        folder = tmp_path / f"killed-{point}"
        config, output = config_of(prepared, folder)
        killed = server.run(config, folder / "run", fault={"at": point, "how": "kill"}, script=script)
        assert killed["exit_code"] == -signal.SIGKILL, (point, killed)
        there = evaluations(output)
        again = server.run(config, folder / "run", script=script)
        assert again["exit_code"] == 0, (point, touches[point], again["stderr"])
        found = portable(output)
        different = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
        assert different == [], (point, touches[point])
        assert {path: time for path, time in evaluations(output).items() if path in there} == there


def test_a_full_disk_is_told_and_loses_nothing(prepared, server, tmp_path):
    config, output = config_of(prepared, tmp_path)
    touches = server.run(config, tmp_path / "run")["touches"]
    wanted = (output / "tuning_results_all.csv").read_bytes()
    point = next(i for i, (_, path) in enumerate(touches) if "000005" in path)
    for path in sorted(output.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    full = server.run(config, tmp_path / "run", fault={"at": point, "how": "full"})
    assert full["exit_code"] == 1 and "the disk is full" in full["stderr"] and "Traceback" not in full["stderr"]
    assert server.run(config, tmp_path / "run")["exit_code"] == 0
    assert (output / "tuning_results_all.csv").read_bytes() == wanted


def test_an_array_that_the_disk_refuses_says_why(tmp_path):
    """A stage of a run is an array; numpy's own way to a file, the control, leaves out the reason."""
    array, path = np.zeros(1 << 17), tmp_path / "umap.npy"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        for save, reason in ((save_array, errno.EFBIG), (np.save, None)):
            with pytest.raises(OSError) as refused, atomic_file(path) as file:
                save(file, array)
            assert refused.value.errno == reason
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    with atomic_file(path) as file:
        save_array(file, array)
    assert np.array_equal(np.load(path), array)


def test_a_journal_that_was_lost_or_damaged_is_made_anew(prepared, server, tmp_path):
    config, output = config_of(prepared, tmp_path)
    server.run(config, tmp_path / "run")
    wanted, there = read_results(output), evaluations(output)
    journal = output / "_tuning" / "study.journal"
    for content in (None, b"nonsense\n" + journal.read_bytes()):
        journal.unlink() if content is None else journal.write_bytes(content)
        (output / "tuning_summary_latest.json").unlink()
        again = server.run(config, tmp_path / "run")
        assert again["exit_code"] == 0, again["stderr"]
        assert read_results(output) == wanted and evaluations(output) == there


def test_an_evaluation_that_was_lost_is_made_again(prepared, server, tmp_path):
    config, output = config_of(prepared, tmp_path)
    server.run(config, tmp_path / "run")
    wanted = read_results(output)
    path = output / "_tuning" / "000003" / "evaluation.json"
    path.write_text(json.dumps({"torn": 1})[:7])
    (output / "tuning_summary_latest.json").unlink()
    again = server.run(config, tmp_path / "run")
    assert again["exit_code"] == 0 and "is damaged; this candidate is evaluated again" in again["stderr"]
    assert read_results(output) == wanted
