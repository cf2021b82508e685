"""Stage 5 through its main: purity, bound and counts worked out by hand, and a report that runs no text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.cluster_samples import sample_shard
from common.columns import vector_array
from common.quality import Contingency
from common.shards import CHUNK_ROWS, open_shards
from tests.stage_runner import run_stage, write_parquet

SCRIPT = "cluster_purity_counter"

# cluster 0: a a a b, 3 of 4; cluster 1: b b, one row without a label; cluster 2: labels of nobody; cluster 3: empty
CLUSTERS = [0, 0, 0, 0, 1, 1, 1, 2, 2, None, None, -1]
LABELS = ["a", "a", "a", "b", "b", "b", None, None, "  ", "a", None, "b"]


def write_centroids(path: Path, n_clusters: int, dimension: int = 2) -> Path:
    """Centroids as another program might write them."""
    centers = np.arange(n_clusters * dimension, dtype=np.float32).reshape(n_clusters, dimension)
    return write_parquet(path, {"centroid_id": list(range(n_clusters)), "center": vector_array(centers)})


@pytest.fixture
def count(tmp_path):
    """Run stage 5 on cluster ids and labels in two plain shards."""

    def call(clusters, labels, *arguments: str, n_clusters: int = 4, others=None, **values):
        table = pa.table({"cluster_id": clusters, "teacher_label": labels, **(others or {})})
        half = table.num_rows // 2
        for index, part in enumerate([table.slice(0, half), table.slice(half)]):
            write_parquet(tmp_path / "in" / f"{index}.parquet", dict(zip(part.schema.names, part.columns, strict=True)))
        own = {"shards_dir": str(tmp_path / "in"), "centroids_path": str(tmp_path / "centroids.parquet")}
        if "--overwrite" not in arguments:
            write_centroids(tmp_path / "centroids.parquet", n_clusters)
        return run_stage(SCRIPT, tmp_path, own | values, *arguments)

    return call


def centroids(tmp_path) -> dict[str, list]:
    return pq.read_table(tmp_path / "centroids.parquet").to_pydict()


def test_purity_by_hand(tmp_path, count):
    result = count(CLUSTERS, LABELS).json
    found = centroids(tmp_path)
    assert found["centroid_id"] == [0, 1, 2, 3]
    assert found["purity"] == [0.75, 1.0, None, None]
    assert found["majority_label"] == ["a", "b", None, None]
    assert found["n_rows"] == [4, 3, 2, 0]
    assert found["n_labeled"] == [4, 2, 0, 0]
    assert found["entropy"][0] == pytest.approx(-(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)))
    assert found["entropy"][1:] == [0.0, None, None]
    assert result["purity"] == pytest.approx(5 / 6)
    assert result["coverage"] == pytest.approx(6 / 8)


def test_wilson_bound_by_hand(tmp_path, count):
    """Lower end of Wilson's interval at z = 1.645: (p + z²/2n - z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    count(CLUSTERS, LABELS)
    # p = 3/4, n = 4: (0.75 + 0.338253 - 1.645 * sqrt(0.046875 + 0.042282)) / (1 + 0.676506) = 0.356135
    # p = 2/2, n = 2: (1 + 0.676506 - 1.645 * sqrt(0 + 0.169127)) / (1 + 1.353013) = 0.424987
    assert centroids(tmp_path)["purity_lower_bound"] == pytest.approx([0.356135, 0.424987, 0.0, 0.0], abs=2e-5)


def test_rows_without_label_or_cluster_are_counted_and_named(count):
    result = count(CLUSTERS, LABELS)
    counts = {name: value for name, value in result.json.items() if name.startswith("n_")}
    assert counts == {
        "n_rows": 12, "n_scored": 6, "n_without_label": 3, "n_without_cluster": 2, "n_without_both": 1, "n_clusters": 3,
    }  # fmt: skip
    assert "rows in 12, scored 6, without label 3, without cluster 2, without both 1" in result.stderr


def test_scores_equal_scikit_learn(count):
    from sklearn import metrics

    rng = np.random.default_rng(0)
    labels, clusters = rng.integers(0, 5, 400), rng.integers(0, 4, 400)
    clusters[:200] = labels[:200] % 4
    result = count(clusters.tolist(), [f"l{label}" for label in labels]).json
    assert result["nmi"] == pytest.approx(metrics.normalized_mutual_info_score(labels, clusters))
    assert result["ami"] == pytest.approx(metrics.adjusted_mutual_info_score(labels, clusters))
    assert result["ari"] == pytest.approx(metrics.adjusted_rand_score(labels, clusters))
    assert result["v_measure"] == pytest.approx(metrics.v_measure_score(labels, clusters))


@pytest.mark.parametrize("labels", [[1, 1, 2, None], [1.0, 1.0, 2.0, None], ["1", " 1", "2", ""]])
def test_labels_of_any_type_have_the_names_that_stage_6_gives_them(tmp_path, count, labels):
    count([0, 0, 0, 1], labels, n_clusters=2)
    assert centroids(tmp_path)["majority_label"] == ["1", None]
    assert centroids(tmp_path)["purity"] == [pytest.approx(2 / 3), None]


def test_of_equal_labels_the_first_by_name_is_the_majority(tmp_path, count):
    count([0, 0, 0, 0], ["b", "a", "b", "a"], n_clusters=1)
    assert centroids(tmp_path)["majority_label"] == ["a"]
    assert centroids(tmp_path)["purity"] == [0.5]


def test_row_groups_with_dictionaries_of_their_own(tmp_path):
    """Each of 30 row groups, two tables of 15, begins with a label that the others have not; one has none at all."""
    labels = [None if row // 10 == 7 else f"label {row // 10 if row % 10 < 2 else row % 3}" for row in range(300)]
    columns = {"cluster_id": [row % 2 for row in range(300)], "teacher_label": labels}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "in" / "0.parquet", row_group_size=10)
    (shard,) = open_shards(tmp_path / "in", written_by="nobody").shards
    tables = list(shard.iter_tables(n_rows=150, as_dictionaries=["teacher_label"]))
    assert [table.num_rows for table in tables] == [150, 150]
    assert pa.concat_tables(tables)["teacher_label"].cast("string").to_pylist() == labels
    whole, pieces = Contingency(), Contingency()
    whole.update(columns["cluster_id"], labels)
    for table in tables:
        pieces.update(table["cluster_id"], table["teacher_label"])
    assert pieces.agreement() == whole.agreement() and pieces.labels == whole.labels


def test_no_labels_at_all(tmp_path, count):
    result = count([0, 1, 0, 1], pa.nulls(4, pa.string()), n_clusters=2).json
    assert result["purity"] is None and result["nmi"] is None and result["n_scored"] == 0
    assert centroids(tmp_path)["purity"] == [None, None]
    assert (tmp_path / "purity_report.html").exists()


def test_no_clusters_at_all(tmp_path, count):
    result = count(pa.nulls(4, pa.int32()), ["a", "b", "a", "b"], n_clusters=2).json
    assert result["purity"] is None and result["coverage"] == 0.0 and result["n_without_cluster"] == 4


HOSTILE = [
    "<script>alert('text')</script>",
    "</script><img src=x onerror=alert(1)>",
    "a\0b",
    "\u202egnp",
    "'\"&<>",
    "emoji \U0001f4b3",
]


def test_report_shows_hostile_texts_and_runs_none(tmp_path, count):
    others = {"text": HOSTILE, "cluster_distance": [0.1] * 6, "pca": vector_array(np.eye(6, dtype=np.float32))}
    count([0] * 6, ["<script>alert('label')</script>"] * 6, n_clusters=1, others=others, examples_per_cluster=6)
    page = (tmp_path / "purity_report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<img src=x" not in page and "\0" not in page
    assert r"\u003cscript\u003ealert('text')\u003c/script\u003e" in page
    assert r"\u003cscript\u003ealert('label')\u003c/script\u003e" in page
    assert "emoji \U0001f4b3" in page
    assert "http://" not in page.replace("http://www.w3.org/", "") and "https://" not in page


def test_examples_are_the_nearest_texts(tmp_path, count):
    others = {"text": ["far away", "nearest of all", "", "near enough"], "cluster_distance": [0.9, 0.1, 0.0, 0.2]}
    count([0] * 4, ["a"] * 4, n_clusters=1, others=others, examples_per_cluster=2)
    page = (tmp_path / "purity_report.html").read_text(encoding="utf-8")
    assert page.index("nearest of all") < page.index("near enough")
    assert "far away" not in page


def test_examples_of_a_long_stream_are_the_nearest_of_all(tmp_path):
    """Several tables of a shard, of which the later ones hardly ever get in; the very nearest rows have no text."""
    n_rows = 2 * CHUNK_ROWS + 100
    distances = np.random.default_rng(0).permutation(n_rows).astype(np.float64)  # no two alike
    texts = [[None, "  "][int(distance) % 2] if distance < 40 else f"text {distance:.0f}" for distance in distances]
    clusters = [row % 3 if row % 4 else None for row in range(n_rows)]
    columns = {"cluster_id": clusters, "cluster_distance": distances, "text": texts, "teacher_label": ["a"] * n_rows}
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    (shard,) = open_shards(tmp_path, written_by="nobody").shards
    names = {"cluster_column": "cluster_id", "distance_column": "cluster_distance", "text_column": "text"}
    names |= {"label_column": "teacher_label", "vector_column": "pca"}
    samples = sample_shard((0, shard), **names, n_examples=5, map_share=0.0, seed=0)
    for cluster_id in range(3):
        with_text = (distances >= 40) & np.array([cluster == cluster_id for cluster in clusters])
        nearest = np.sort(distances[with_text])[:5]
        assert samples.examples[cluster_id] == [(distance, f"text {distance:.0f}") for distance in nearest]


def test_unknown_cluster_id_is_an_error(count):
    result = count([0, 1, 2, 7], ["a"] * 4, n_clusters=3)
    assert result.exit_code == 1
    assert "holds cluster id 7, which" in result.error and "predict with these centroids first" in result.error


@pytest.mark.parametrize("ids", [["x", "y"], [0.5, 1.0]])
def test_cluster_ids_that_are_no_whole_numbers(count, ids):
    result = count(ids, ["a", "b"], n_clusters=2)
    assert result.exit_code == 1 and "cluster ids must be whole numbers" in result.error


def test_columns_that_hold_something_else(count):
    vectors = {"cls": vector_array(np.ones((12, 2), np.float32)), "text": ["a"] * 12}
    nested = count(CLUSTERS, LABELS, others=vectors, teacher_label_column="cls")
    assert nested.exit_code == 1 and "column 'cls' holds fixed_size_list" in nested.error
    distances = count(CLUSTERS, LABELS, others=vectors, distance_column="text")
    assert (
        distances.exit_code == 1 and "column 'text' holds string, not numbers; check distance_column" in distances.error
    )


def test_ids_that_another_program_wrote_as_floats(tmp_path, count):
    floats = [math.nan if cluster is None else float(cluster) for cluster in CLUSTERS]
    assert count(floats, LABELS).json["n_without_cluster"] == 2
    assert centroids(tmp_path)["n_rows"] == [4, 3, 2, 0]


@pytest.mark.parametrize("ids", [[0, None], [0, -1], [0, 2**40], ["a", "b"], [1, 1]])
def test_centroids_whose_ids_are_none(tmp_path, count, ids):
    centers = vector_array(np.ones((2, 2), np.float32))
    write_parquet(tmp_path / "others.parquet", {"centroid_id": ids, "center": centers})
    result = count(CLUSTERS, LABELS, centroids_path=str(tmp_path / "others.parquet"))
    assert result.exit_code == 1 and "others.parquet" in result.error


def test_a_report_never_takes_the_place_of_centroids(tmp_path, count):
    result = count(CLUSTERS, LABELS, report_path=str(tmp_path / "centroids.parquet"))
    assert result.exit_code == 2 and "report_path" in result.error
    assert centroids(tmp_path)["centroid_id"] == [0, 1, 2, 3]


def test_missing_columns_name_the_stage_that_writes_them(count):
    result = count([0, 1], ["a", "b"], cluster_column="topic")
    assert result.exit_code == 1
    assert "has no column 'topic' (has: cluster_id, teacher_label)" in result.error
    assert "run cluster_train_clusters.py with train.run_mode=predict first" in result.error


def test_again_is_nothing_to_do_and_other_labels_need_overwrite(tmp_path, count):
    first = count(CLUSTERS, LABELS)
    own = {"shards_dir": str(tmp_path / "in"), "centroids_path": str(tmp_path / "centroids.parquet")}
    again = run_stage(SCRIPT, tmp_path, own)
    assert again.json == first.json and "nothing to do" in again.stderr
    other = run_stage(SCRIPT, tmp_path, own | {"random_state": 5})
    assert other.exit_code == 1 and "random_state: 0 -> 5" in other.error and "--overwrite" in other.error
    assert run_stage(SCRIPT, tmp_path, own | {"random_state": 5}, "--overwrite").exit_code == 0
    assert centroids(tmp_path)["purity"] == [0.75, 1.0, None, None]


def test_result_is_also_a_file_and_check_writes_nothing(tmp_path, count):
    plan = count(CLUSTERS, LABELS, "--check").json
    assert (plan["rows"], plan["clusters"]) == (12, 4)
    assert not (tmp_path / "purity_report.html").exists()
    assert "purity" not in centroids(tmp_path)
    result = count(CLUSTERS, LABELS).json
    assert json.loads((tmp_path / "purity_report.json").read_text()) == result
