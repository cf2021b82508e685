"""Reduction, noise, numbering, the purity report and true labels, with values worked out by hand."""

from __future__ import annotations

import json
import math
import sys
import types

import numpy as np
import pytest

from common.backend import CPU, Backend
from common.config import UserError
from image_parts.features import Features
from image_parts.pipeline import (
    ClusterAssignment,
    ReducedFeatures,
    assign_noise,
    check_enough_images,
    expand_to_images,
    find_clusters,
    number_by_size,
    place_in_space,
    project_pca,
)
from image_parts.purity import measure_purity
from image_parts.records import NOISE, ImageRecord, cluster_name
from image_parts.settings import ClusteringSettings, ImageSettings, PuritySettings
from image_parts.truth import TrueLabels, compare_with_truth, read_truth


def record(name: str) -> ImageRecord:
    from pathlib import Path

    return ImageRecord(Path("/in") / name, name, "0" * 64, 8, 8, 100, 0)


# Two clusters on a line with centroids at 0 and 10, and two points that HDBSCAN left out.
LINE = np.array([[-1.0], [1.0], [9.0], [11.0], [4.0], [30.0]], np.float32)
RAW = np.array([0, 0, 1, 1, NOISE, NOISE])
STRENGTH = np.array([1, 0.5, 1, 0.5, 0, 0], np.float32)


def test_noise_joins_the_nearest_centroid():
    assigned = assign_noise(LINE, RAW, STRENGTH, settings=ClusteringSettings(noise_handling="nearest"))
    assert assigned.labels.tolist() == [0, 0, 1, 1, 0, 1]
    assert assigned.distances.tolist() == [1, 1, 1, 1, 4, 20]
    assert assigned.raw_labels.tolist() == RAW.tolist() and assigned.probabilities.tolist() == STRENGTH.tolist()


def test_noise_stays_apart():
    assigned = assign_noise(LINE, RAW, STRENGTH, settings=ClusteringSettings(noise_handling="separate"))
    assert assigned.labels.tolist() == RAW.tolist()
    assert np.isnan(assigned.distances[4:]).all() and (assigned.distances[:4] == 1).all()


@pytest.mark.parametrize("handling", ["nearest", "separate"])
def test_all_noise_stays_noise(handling):
    nothing = np.full(6, NOISE)
    assigned = assign_noise(
        LINE, nothing, np.zeros(6, np.float32), settings=ClusteringSettings(noise_handling=handling)
    )
    assert (assigned.labels == NOISE).all() and np.isnan(assigned.distances).all()


def test_clusters_are_numbered_by_images_and_duplicates_are_expanded():
    # Cluster 1 holds fewer distinct vectors than cluster 0, but more images.
    assignment = ClusterAssignment(
        raw_labels=np.array([0, 0, 1, NOISE]),
        probabilities=np.array([1, 0.9, 0.8, 0], np.float32),
        labels=np.array([0, 0, 1, NOISE]),
        distances=np.array([1, 2, 3, np.nan], np.float32),
    )
    rows = np.array([2, 0, 2, 1, 3, 2])  # six images of four distinct vectors
    features = Features([record(f"{i}.png") for i in range(6)], rows, np.eye(4, dtype=np.float32), [], None, 0, 4)
    numbered = number_by_size(assignment, rows)
    clustered = expand_to_images(features, numbered, np.arange(12, dtype=np.float32).reshape(4, 3))
    assert clustered.labels.tolist() == [0, 1, 0, 1, NOISE, 0]
    assert clustered.raw_labels.tolist() == [0, 1, 0, 1, NOISE, 0]
    assert clustered.cluster_sizes.tolist() == [3, 2] and clustered.n_noise == 1
    assert clustered.cluster_names == ["cluster_000", "cluster_001"]
    assert clustered.members(0).tolist() == [0, 2, 5]
    assert clustered.coordinates[0].tolist() == [6, 7, 8] and clustered.distances[:2].tolist() == [3, 1]


def test_numbering_without_any_cluster():
    nothing = np.full(3, NOISE)
    assignment = ClusterAssignment(nothing, np.zeros(3, np.float32), nothing, np.full(3, np.nan, np.float32))
    assert number_by_size(assignment, np.arange(3)).labels.tolist() == [NOISE] * 3
    assert cluster_name(NOISE) == "noise" and cluster_name(1234) == "cluster_1234"


@pytest.mark.parametrize("shape", [(200, 20), (15, 40)])
def test_pca_is_that_of_scikit_learn_up_to_signs(shape):
    from sklearn.decomposition import PCA

    vectors = np.random.default_rng(0).normal(size=shape).astype(np.float32) + 3
    ours = project_pca(vectors, n_components=50, backend=CPU)
    expected = PCA(n_components=min(shape), svd_solver="full").fit_transform(vectors.astype(np.float64))
    assert ours.shape == (shape[0], min(shape)) and ours.dtype == np.float32
    n = min(shape) - 1  # with few rows the last direction is all rounding
    np.testing.assert_allclose(np.abs(ours[:, :n]), np.abs(expected[:, :n]), atol=2e-4)


def test_pca_by_cuml_keeps_to_its_signature(monkeypatch):
    calls = {}

    class FakePCA:
        def __init__(self, *, n_components: int, output_type: str) -> None:
            calls.update(n_components=n_components, output_type=output_type)

        def fit_transform(self, vectors: np.ndarray) -> np.ndarray:
            return vectors[:, : calls["n_components"]].astype(np.float64)

    stand_in = types.ModuleType("cuml.decomposition")
    stand_in.PCA = FakePCA
    monkeypatch.setitem(sys.modules, "cuml", types.ModuleType("cuml"))
    monkeypatch.setitem(sys.modules, "cuml.decomposition", stand_in)
    projected = project_pca(np.eye(6, dtype=np.float32), n_components=3, backend=Backend("cuml", "cuda", "test"))
    assert calls == {"n_components": 3, "output_type": "numpy"}
    assert projected.shape == (6, 3) and projected.dtype == np.float32


def test_blobs_are_found_and_placed():
    rng = np.random.default_rng(0)
    embedding = (np.repeat(np.eye(4) * 20, 30, axis=0) + rng.normal(size=(120, 4))).astype(np.float32)
    found = find_clusters(embedding, ClusteringSettings(min_cluster_size=10, min_samples=3), backend=CPU)
    assert len(set(found.labels)) == 4 and (np.bincount(found.labels) == 30).all()
    space = place_in_space(ReducedFeatures(embedding, embedding), ImageSettings(), backend=CPU)
    assert space.shape == (120, 3)
    flat = place_in_space(ReducedFeatures(embedding, embedding[:, :2]), ImageSettings(), backend=CPU)
    assert np.array_equal(flat, np.pad(embedding[:, :2], ((0, 0), (0, 1))))


def test_too_few_images_are_named_with_the_keys_to_change():
    settings = ImageSettings()
    with pytest.raises(UserError, match=r"12 distinct images are too few.*min_cluster_size 50.*at least 50"):
        check_enough_images(12, settings)
    check_enough_images(50, settings)


def purity_of(vectors, embedding, labels, **changes):
    settings = PuritySettings(k_neighbors=1, **changes)
    return measure_purity(np.array(vectors, np.float32), np.array(embedding, np.float32), np.array(labels), settings)


def test_purity_by_hand():
    # Unit vectors at 0, 10, 90, 100 and 96 degrees; the last belongs to cluster 0, far from its fellows.
    angles = np.radians([0, 10, 90, 100, 96])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    labels = [0, 0, 1, 1, 0]
    embedding = [[0.0], [1.0], [10.0], [11.0], [1.0]]
    report = purity_of(vectors, embedding, labels, max_nn_cross_ratio=0.4)
    means = [vectors[[0, 1, 4]].mean(axis=0), vectors[[2, 3]].mean(axis=0)]
    cosine = float(means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1]))
    assert report.metrics["max_centroid_cosine"] == pytest.approx(cosine, abs=1e-6)
    np.testing.assert_allclose(report.centroid_cosine_matrix, [[1, cosine], [cosine, 1]], atol=1e-6)
    # Cluster 0: only the stray one of three has its neighbour outside. Cluster 1: both are nearest to the stray one.
    assert [cluster.cross_ratio for cluster in report.clusters] == pytest.approx([1 / 3, 1.0])
    assert report.metrics["max_nn_cross_ratio"] == 1.0
    # Silhouettes: a is the mean distance to the fellows, b to the other cluster.
    parts = [(1.0, 10.5), (0.5, 9.5), (1.0, 10 - 2 / 3), (1.0, 11 - 2 / 3), (0.5, 9.5)]
    assert report.metrics["silhouette"] == pytest.approx(np.mean([(b - a) / b for a, b in parts]), abs=1e-6)
    assert report.verdict == "FAIL" and report.reasons == ["max_nn_cross_ratio 1.0000 is above 0.4"]
    assert report.clusters[1].dominant_neighbor == "cluster_000" and report.clusters[1].nearest_cluster == "cluster_000"
    assert report.leakage_candidates == [
        {"clusters": ["cluster_001", "cluster_000"], "reason": "neighbours lie in the other cluster", "value": 1.0}
    ]
    assert purity_of(vectors, embedding, labels, max_nn_cross_ratio=1.0).verdict == "PASS"


def test_each_threshold_fails_alone():
    angles = np.radians([0, 1, 30, 31])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    embedding, labels = [[0.0], [1.0], [9.0], [10.0]], [0, 0, 1, 1]
    assert purity_of(vectors, embedding, labels).verdict == "PASS"
    alike = purity_of(vectors, embedding, labels, max_centroid_cosine=0.8)
    assert alike.verdict == "FAIL" and "max_centroid_cosine" in alike.reasons[0]
    assert alike.leakage_candidates[0]["clusters"] == ["cluster_000", "cluster_001"]
    assert "silhouette" in purity_of(vectors, embedding, labels, min_silhouette=0.95).reasons[0]


@pytest.mark.parametrize(("labels", "reason"), [([0, 0, 0, 0], "only one cluster"), ([-1] * 4, "all images are noise")])
def test_undefined_measures_are_null_and_fail(labels, reason):
    report = purity_of(np.eye(4), np.eye(4), labels)
    assert report.verdict == "FAIL" and reason in report.reasons[0]
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["metrics"]["silhouette"] is None and values["metrics"]["max_centroid_cosine"] is None


def test_noise_is_left_out_of_every_measure():
    angles = np.radians([0, 1, 30, 31, 15, 16])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    embedding = [[0.0], [1.0], [9.0], [10.0], [4.0], [5.0]]
    report = purity_of(vectors, embedding, [0, 0, 1, 1, -1, -1])
    without = purity_of(vectors[:4], embedding[:4], [0, 0, 1, 1])
    for name in ("max_centroid_cosine", "silhouette", "max_nn_cross_ratio"):
        assert report.metrics[name] == pytest.approx(without.metrics[name])
    assert report.metrics["noise_share"] == pytest.approx(2 / 6)


def test_the_silhouette_sample_is_seeded():
    rng = np.random.default_rng(0)
    vectors, labels = rng.normal(size=(300, 4)), rng.integers(0, 3, 300)
    scores = [
        purity_of(vectors, vectors, labels, silhouette_sample_size=50, silhouette_random_state=seed).metrics[
            "silhouette"
        ]
        for seed in (1, 1, 2)
    ]
    assert scores[0] == scores[1] != scores[2]


def test_truth_from_folders_passes_over_the_image_subfolder(tmp_path):
    records = [record(name) for name in ("cat/1.png", "cat/img/2.png", "a/dog/img/1.png", "loose.png")]
    truth = read_truth(records, "parent_folder", input_dir=tmp_path, image_subdir="img")
    assert truth.labels == ["cat", "cat", "dog", None]


def test_truth_from_a_csv(tmp_path):
    records = [record(name) for name in ("a/1.png", "a/2.png", "b/1.png", "b/3.png")]
    path = tmp_path / "truth.csv"
    path.write_text(
        'path,label,more\na/1.png,cat,x\n/in/a/2.png,"dog, big",x\n1.png,wrong,x\n3.png,cat,x\ngone.png,cat,x\n'
    )
    truth = read_truth(records, str(path), input_dir=tmp_path, image_subdir="img")
    # 1.png stands for two files, so the bare name is none of them.
    assert truth.labels == ["cat", "dog, big", None, "cat"] and truth.n_unmatched == 2
    for content, message in (("file,label\na,b\n", "needs path and label"), ("path,label\nx.png,b\n", "none of its 1")):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_truth(records, str(path), input_dir=tmp_path, image_subdir="img")
    with pytest.raises(UserError, match="is no file"):
        read_truth(records, str(tmp_path / "absent.csv"), input_dir=tmp_path, image_subdir="img")
    path.write_bytes(b"path,label\n\xff\xfe,b\n")
    with pytest.raises(UserError, match="UTF-8"):
        read_truth(records, str(path), input_dir=tmp_path, image_subdir="img")


def test_scores_against_true_labels_by_hand():
    labels = np.array([0, 0, 0, 1, 1, NOISE])
    truth = TrueLabels(["a", "a", "b", "b", None, "b"], "x.csv", 0)
    scores = compare_with_truth(labels, truth)
    # Five labelled, four of them clustered: three fit the best match of clusters and labels.
    assert scores["n_labeled"] == 5 and scores["coverage"] == pytest.approx(4 / 5)
    assert scores["acc"] == pytest.approx(3 / 5) and scores["purity"] == pytest.approx(3 / 4)
    perfect = compare_with_truth(np.array([1, 1, 0, 0]), TrueLabels(["a", "a", "b", "b"], "x", 0))
    assert perfect["acc"] == perfect["ari"] == 1 and math.isclose(perfect["nmi"], 1)
