"""iterative_tuning.py as its users run it: what it leaves, what it refuses, and what it says when things go wrong."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import image_cluster
import iterative_tuning
from common.commit import OutputLock
from common.config import UserError, load_settings
from image_parts.settings import ImageSettings
from image_parts.tuning.evaluate import labels_digest
from image_parts.tuning.report import pareto_front
from image_parts.tuning.settings import TuningSettings
from tests.browser import browser, open_page  # noqa: F401
from tests.tuning_runs import (
    ROOT,
    SPACE,
    main,
    read_results,
    search,
    tuning_settings,
    tuning_values,
    write_config,
    write_digits,
)

# 2 x 2 embeddings, and of the 4 x 2 sizes one pair that does not fit together, twice for leaf and eom.
N_POINTS, N_UNFIT = 64, 2 * 2 * 1 * 2


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """images/, cache/, and out/ with a grid that was gone through."""
    folder = tmp_path_factory.mktemp("tuning")
    write_digits(folder / "images")
    settings = tuning_settings(folder / "images", folder / "out", folder / "cache", generate_full_visuals_for_top_n=1)
    (folder / "result.json").write_text(json.dumps(iterative_tuning.run(settings)))
    return folder


def again(home: Path, output: Path, **tuning) -> ImageSettings:
    """Other settings for the same images, with the embeddings that are there."""
    return tuning_settings(home / "images", output, home / "cache", **tuning)


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / "tuning_results_all.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_grid_is_gone_through_once_and_misfits_are_counted(home):
    summary = json.loads((home / "out" / "tuning_summary_latest.json").read_text())
    [phase] = summary["phases"]
    assert summary["n_points"] == N_POINTS and phase["n_skipped"] == N_UNFIT
    assert phase["skipped"] == {"min_samples 6 is above min_cluster_size 4": N_UNFIT}
    assert summary["n_evaluations"] == phase["n_evaluations"] == N_POINTS - N_UNFIT == len(rows_of(home / "out"))
    names = list(SPACE)
    assert len({tuple(row[name] for name in names) for row in rows_of(home / "out")}) == N_POINTS - N_UNFIT


def test_the_table_holds_complete_settings_and_the_ranking_is_by_score(home):
    rows = rows_of(home / "out")
    assert {"model.name", "preprocessing.trim_top", "reduction.random_state", "purity.k_neighbors"} <= set(rows[0])
    best = max(rows, key=lambda row: float(row["score"]))
    summary = json.loads((home / "out" / "tuning_summary_latest.json").read_text())
    assert float(best["score"]) == summary["best"]["score"] == json.loads((home / "result.json").read_text())["score"]
    assert [entry["rank"] for entry in summary["top"]] == list(range(1, 21))
    scores = [entry["score"] for entry in summary["top"]]
    assert scores == sorted(scores, reverse=True)
    stability = summary["best"]["stability"]
    assert stability["least_ari"] <= stability["mean_ari"] <= 1 and stability["stable"] == (
        stability["least_ari"] >= 0.8
    )


def test_best_yaml_runs_as_it_is_and_gives_the_labels_of_the_search(home, tmp_path):
    settings = load_settings(
        home / "out" / "best.yaml",
        ImageSettings,
        overrides=[f"output_dir={tmp_path / 'best'}", "visualization.enabled=false"],
    )
    image_cluster.run(settings)
    labels = pq.read_table(tmp_path / "best" / "clusters.parquet")["cluster_id"].to_numpy()
    best = json.loads((home / "out" / "tuning_summary_latest.json").read_text())["best"]
    assert labels_digest(labels) == best["labels_sha256"]
    assert (home / "out" / "top_configs" / "rank_01.yaml").exists()
    drawn = {path.name for path in (home / "out" / "top" / "rank_01" / "viz").iterdir()}
    assert "interactive_scatter.html" in drawn and "cluster_grid.png" in drawn
    purity = json.loads((tmp_path / "best" / "metrics" / "purity_report_latest.json").read_text())
    assert (purity["verdict"], purity["metrics"]["silhouette"]) == (
        best["verdict"],
        best["metrics"]["silhouette_reduced"],
    )


def test_an_iteration_is_reproduced_from_its_files(home, capsys):
    config = write_config(
        home / "config.yaml",
        tuning_values(home / "images", home / "out", home / "cache", generate_full_visuals_for_top_n=1),
    )
    assert main("--config", str(config), "--reproduce", "7") == 0
    told = json.loads(capsys.readouterr().out)
    evaluation = json.loads((home / "out" / "_tuning" / "000007" / "evaluation.json").read_text())
    assert told["same_labels"] and labels_digest(np.load(told["labels"])) == evaluation["labels_sha256"]
    matrix = np.load(home / "out" / "_tuning" / "000007" / "metrics" / "centroid_cosine_matrix.npy")
    assert len(matrix) == evaluation["metrics"]["n_clusters"]
    assert main("--config", str(config), "--reproduce", "9999") == 1
    assert "iteration 9999 is not in" in capsys.readouterr().err
    # Again with nothing changed: nothing is done, and the same is said.
    before = read_results(home / "out")
    assert main("--config", str(config)) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((home / "result.json").read_text())
    assert read_results(home / "out") == before
    # With another key: refused, by name.
    assert main("--config", str(config), "tuning.score.weight_silhouette=2") == 1
    assert "tuning.score" in capsys.readouterr().err
    with OutputLock(home / "out"):
        assert main("--config", str(config)) == 75


def test_the_page_works_offline_and_shows_the_ranking(home, browser):  # noqa: F811
    page = open_page(browser, home / "out" / "tuning_report.html")
    assert page.errors == [] and page.requests == []
    assert len(browser.find_elements("css selector", "tbody tr")) >= 25
    assert len(browser.find_elements("css selector", "img.picture")) == 2
    assert {path.name for path in (home / "out" / "plots").iterdir()} == {
        "progress.png", "importance.png", "parallel_coordinates.png", "pareto.png",
    }  # fmt: skip


@pytest.mark.parametrize("strategy", ["evolution", "tpe"])
def test_an_evaluated_candidate_is_never_evaluated_again(home, tmp_path, strategy):
    search(again(home, tmp_path / "out", search_strategy=strategy, max_evaluations=30, population_size=6))
    rows = rows_of(tmp_path / "out")
    names = list(SPACE)
    assert len(rows) == len({tuple(row[name] for name in names) for row in rows}) == 30


def test_more_evaluations_continue_what_fewer_began(home, tmp_path):
    search(again(home, tmp_path / "a", search_strategy="tpe", max_evaluations=7))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("evaluation.json")}
    more = {"search_strategy": "tpe", "max_evaluations": 20}
    search(again(home, tmp_path / "a", **more))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    search(again(home, tmp_path / "b", **more))
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b") and len(rows_of(tmp_path / "a")) == 20


def test_two_phases_and_workers(home, tmp_path):
    two = {"two_phase_enabled": True, "phase1_fraction": 0.6, "max_evaluations": 24, "phase2_top_k_seeds": 3,
           "search_strategy": "evolution", "population_size": 5}  # fmt: skip
    found = search(again(home, tmp_path / "one", **two))
    assert found.rank_correlation is not None and found.n_pairs >= 3
    rows = rows_of(tmp_path / "one")
    assert {row["phase"] for row in rows} == {"1", "2"} and len(rows) == 24
    assert {row["clustering.min_cluster_size"] for row in rows if row["phase"] == "1"} <= {"4", "5", "7", "10"}
    assert found.ranking[0].phase == 2 and found.ranking[0].iteration > len(found.sample.evaluations)
    evaluation = json.loads((tmp_path / "one" / "_tuning" / "000002" / "evaluation.json").read_text())
    assert evaluation["sample"] == {"fraction": 0.6, "seed": 42}
    assert iterative_tuning.run(again(home, tmp_path / "one", **two), iteration=2)["same_labels"]
    # Two processes: the same end.
    search(again(home, tmp_path / "two", **two, n_jobs=2))
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")


def test_early_stop_ends_a_plateau(home, tmp_path):
    stop = {"early_stop_enabled": True, "early_stop_patience_generations": 2, "early_stop_min_evaluations": 8}
    found = search(again(home, tmp_path / "out", search_strategy="evolution", population_size=4, **stop))
    assert found.whole.stopped == "early stop" and 8 <= len(found.evaluations) < N_POINTS - N_UNFIT
    scores = [evaluation.score for evaluation in found.evaluations]
    assert max(scores[-8:]) <= max(scores[:-8])


def test_time_that_is_over_can_be_given_again(home, tmp_path):
    first = search(again(home, tmp_path / "out", timeout_s=0.001))
    assert not first.whole.is_finished and len(first.evaluations) < N_POINTS - N_UNFIT
    assert search(again(home, tmp_path / "out")).whole.is_finished
    assert rows_of(tmp_path / "out") == rows_of(home / "out")


def test_a_failed_evaluation_is_a_row_with_its_error(home, tmp_path):
    space = {**SPACE, "clustering.min_cluster_size": [8, 5000]}
    result = iterative_tuning.run(again(home, tmp_path / "out", search_space=space))
    failed = [row for row in rows_of(tmp_path / "out") if row["error"]]
    assert len(failed) == result["n_failed"] == 16 and not any(row["score"] for row in failed)
    assert "90 distinct images are too few for clustering.min_cluster_size 5000" in failed[0]["error"]
    assert b"Failed" in (tmp_path / "out" / "tuning_report.html").read_bytes()


def test_all_failed_is_exit_1(home, tmp_path, capsys):
    values = tuning_values(
        home / "images", tmp_path / "out", home / "cache", search_space={"clustering.min_cluster_size": [5000, 6000]}
    )
    assert main("--config", str(write_config(tmp_path / "config.yaml", values))) == 1
    assert (
        "all 2 evaluations failed; the first error: UserError: 90 distinct images are too few"
        in capsys.readouterr().err
    )
    assert len(rows_of(tmp_path / "out")) == 2


@pytest.mark.parametrize(("tuning", "code", "message"), [
    ({"search_space": {}}, 2, "tuning.search_space is empty"),
    ({"search_space": {"clustering.min_sample": [3]}}, 2, "did you mean 'min_samples'"),
    ({"search_strategy": "random"}, 2, "tuning.search_strategy: "),
    ({"max_evaluation": 3}, 2, "tuning.max_evaluation: no such key; did you mean 'max_evaluations'"),
    ({"n_jobs": 0}, 2, "0 processes do nothing"),
    ({"search_space": {"reduction.random_state": [None]}}, 2, "reduction.random_state is null"),
    ({"search_space": {"clustering.min_cluster_size": [2, 3], "clustering.min_samples": [5]}}, 1,
     "no combination of tuning.search_space fits together"),
    ({"two_phase_enabled": True, "phase1_fraction": 0.06}, 1, "leaves 5 distinct images, but 5 neighbours"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(home, tmp_path, capsys, tuning, code, message):
    values = tuning_values(home / "images", tmp_path / "out", home / "cache", **tuning)
    assert main("--config", str(write_config(tmp_path / "config.yaml", values))) == code
    told = capsys.readouterr()
    assert message in told.err and told.out == "" and "Traceback" not in told.err


def test_a_folder_of_somebody_else_is_not_cleared(home, tmp_path):
    (tmp_path / "out" / "top").mkdir(parents=True)
    (tmp_path / "out" / "top" / "mine.txt").write_text("mine")
    iterative_tuning.run(again(home, tmp_path / "out", search_strategy="tpe", max_evaluations=2))
    assert (tmp_path / "out" / "top" / "mine.txt").read_text() == "mine"
    other = again(home, tmp_path / "out", search_strategy="tpe", max_evaluations=2, seed=5)
    with pytest.raises(UserError, match="holds another tuning .*tuning.seed: 42 -> 5"):
        iterative_tuning.run(other)
    iterative_tuning.run(other, overwrite=True)
    assert len(rows_of(tmp_path / "out")) == 2


def test_the_plan_writes_nothing(home, tmp_path, capsys):
    values = tuning_values(home / "images", tmp_path / "out", home / "cache")
    assert main("--config", str(write_config(tmp_path / "config.yaml", values)), "--check") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["images"], plan["points"], plan["embeddings_at_most"]) == (90, N_POINTS, 4)
    assert not (tmp_path / "out").exists()


def test_pareto_front():
    points = [(1, 1), (2, 3), (3, 2), (2, 2), (3, 1), (2, 3)]
    assert pareto_front([(float(x), float(y)) for x, y in points]) == [(2, 3), (3, 2)]


# --- Documents -------------------------------------------------------------------------------------------------------


def flat_keys(model=TuningSettings, prefix="") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, field in model.model_fields.items():
        if name == "score":
            found |= flat_keys(field.annotation, "score.")
        else:
            found[prefix + name] = field.default
    return found


def test_every_key_is_documented_with_its_default():
    table = (ROOT / "docs" / "iterative_tuning.md").read_text(encoding="utf-8").split("## Keys")[1].split("\n## ")[0]
    documented = dict(re.findall(r"^\| `([\w.]+)` \| `(.*?)` \|", table, re.MULTILINE))
    assert {key: yaml.safe_load(value) for key, value in documented.items()} == flat_keys()


def test_config_yaml_shows_every_key_and_a_space_that_is_valid():
    shown = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))["tuning"]
    assert {*(set(shown) - {"score"}), *(f"score.{key}" for key in shown["score"])} == set(flat_keys())
    assert {k: v for k, v in shown.items() if k not in ("search_space", "score")} == {
        k: v for k, v in flat_keys().items() if k != "search_space" and "." not in k
    }
    settings = load_settings(ROOT / "config.yaml", ImageSettings)
    assert iterative_tuning.read_tunable_space(settings).n_points > 1000
