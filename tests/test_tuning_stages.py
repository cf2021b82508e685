"""Staged and naive give the same labels and the same measures; and the comparison would see it if they did not."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest

from common.backend import CPU
from common.config import UserError
from common.density import approximate_neighbors
from common.silhouette import silhouette_score
from image_parts.cache import FeatureCache, RowKeys
from image_parts.features import Features
from image_parts.pipeline import cluster_features, graph_width, has_graph, is_pca_nested, project_pca
from image_parts.records import number_or_none
from image_parts.settings import ImageSettings, ReductionSettings
from image_parts.tuning import samples as samples_module
from image_parts.tuning import stages as stages_module
from image_parts.tuning.evaluate import Job, Measures, evaluate, labels_digest
from image_parts.tuning.samples import fingerprint_code, store_sample
from image_parts.tuning.stages import Sample, Stages, StageStore, candidate_key

ROOT = Path(__file__).resolve().parent.parent

CHOICES = {
    "reduction": {
        "pca_components": [5, 12],
        "umap_components": [2, 3],
        "umap_n_neighbors": [5, 8, 12],
        "umap_min_dist": [0.0, 0.3],
        "umap_metric": ["cosine", "euclidean"],
    },
    "clustering": {
        "min_cluster_size": [4, 7, 12],
        "min_samples": [1, 3, 4],
        "cluster_selection_epsilon": [0.0, 0.4],
        "cluster_selection_method": ["leaf", "eom"],
        "noise_handling": ["nearest", "separate"],
    },
}


@pytest.fixture(scope="module")
def features() -> Features:
    """110 images of 100 distinct vectors in five groups."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((5, 24)) * 1.2
    vectors = (means[np.arange(100) % 5] + rng.standard_normal((100, 24))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Features([], np.concatenate([np.arange(100), np.arange(10)]), vectors, [], None, 0, 100)


def random_settings(count: int) -> list[ImageSettings]:
    chooser = random.Random(7)
    drawn = []
    for _ in range(count):
        values = {
            section: {key: chooser.choice(options) for key, options in keys.items()}
            for section, keys in CHOICES.items()
        }
        drawn.append(ImageSettings.model_validate(values | {"purity": {"k_neighbors": 3}}))
    return drawn


def make_stages(features: Features, folder) -> Stages:
    sample = Sample(features.vectors, features.rows)
    return Stages(sample, StageStore(folder), backend=CPU, max_components=12)


def compare(features: Features, stages: Stages, settings: list[ImageSettings]) -> list[str]:
    """What differs between the staged way and image_cluster's own, with scikit-learn's measures."""
    from sklearn import metrics
    from sklearn.metrics.pairwise import cosine_similarity
    from sklearn.neighbors import NearestNeighbors

    near = NearestNeighbors(n_neighbors=4, metric="cosine").fit(features.vectors).kneighbors(features.vectors)[1][:, 1:]
    measures = Measures(stages)
    different = []
    for number, candidate in enumerate(settings):
        reduced, assignment = cluster_features(features, candidate, backend=CPU)
        labels = assignment.labels
        found, _ = evaluate(Job(1, 2, "", {}, candidate), stages, measures)
        if found.labels_sha256 != labels_digest(labels[features.rows]):
            different.append(f"{number}: labels")
            continue
        own = silhouette_score(reduced.embedding, labels, metric="euclidean")
        if found.metrics["silhouette_reduced"] != number_or_none(own):  # bit for bit, though clusters are shared
            different.append(f"{number}: silhouette of image_cluster")
        inside = labels >= 0
        if labels.max() < 1:
            assert found.metrics["silhouette"] is None
            continue
        sums = np.stack([features.vectors[labels == cluster].mean(axis=0) for cluster in range(labels.max() + 1)])
        crosses = (labels[near] >= 0) & (labels[near] != labels[:, None])
        naive = {
            "silhouette": metrics.silhouette_score(features.vectors[inside], labels[inside], metric="cosine"),
            "silhouette_reduced": metrics.silhouette_score(reduced.embedding[inside], labels[inside]),
            "max_centroid_cosine": (cosine_similarity(sums) - 2 * np.eye(len(sums))).max(),
            "max_nn_cross_ratio": max(crosses[labels == cluster].mean() for cluster in range(len(sums))),
            "unassigned_share": 1 - inside.mean(),
            "noise_share": (assignment.raw_labels < 0).mean(),
            "n_clusters": len(sums),
            "largest_share": np.bincount(labels[inside]).max() / len(labels),
        }
        different += [f"{number}: {key}" for key in naive if abs(naive[key] - found.metrics[key]) > 2e-5]
    return different


def test_staged_and_naive_agree_over_fifty_random_settings(features, tmp_path):
    assert compare(features, make_stages(features, tmp_path), random_settings(50)) == []
    names = [path.name for path in tmp_path.iterdir()]
    assert sum(name.startswith("pca-") for name in names) == 1  # one, at the largest size
    assert sum(name.startswith("graph-") for name in names) == 2 * 2  # sizes of PCA, metrics
    keys = {settings.reduction.model_dump_json() for settings in random_settings(50)}
    assert sum(name.startswith("umap-") for name in names) == len(keys)


def test_control_a_key_that_forgets_a_setting_is_caught(features, tmp_path, monkeypatch):
    real = stages_module._effective_reduction

    def forgetful(settings, shape):
        return {**real(settings, shape), "umap_n_neighbors": 0}

    monkeypatch.setattr(stages_module, "_effective_reduction", forgetful)
    assert compare(features, make_stages(features, tmp_path), random_settings(10)) != []


def test_a_stage_is_read_not_computed_again_and_a_damaged_one_is(features, tmp_path, caplog):
    settings = random_settings(1)[0]
    first = make_stages(features, tmp_path).cluster(settings).labels
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert (make_stages(features, tmp_path).cluster(settings).labels == first).all()
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    [tree] = tmp_path.glob("tree-*")
    tree.write_bytes(tree.read_bytes()[:100])
    [embedding] = tmp_path.glob("umap-*")
    with embedding.open("wb") as file:
        np.save(file, np.zeros((7, 2), np.float32))  # of other features
    assert (make_stages(features, tmp_path).cluster(settings).labels == first).all()
    assert caplog.text.count("is damaged and is computed again") == 2


def test_a_sample_that_is_damaged_is_written_again(tmp_path, caplog):
    sample = Sample(np.eye(8, dtype=np.float32), np.arange(8))
    path = Path(store_sample(sample, tmp_path, backend=CPU, max_components=4).folder) / "vectors.npy"
    whole = path.read_bytes()
    for damaged in (whole[:60], whole[:-8], b""):
        path.write_bytes(damaged)
        store_sample(sample, tmp_path, backend=CPU, max_components=4)
        assert path.read_bytes() == whole
    assert caplog.text.count("is damaged and is written again") == 3


def test_stages_of_other_code_are_not_taken_for_ours(tmp_path, monkeypatch):
    """Embeddings stay in the cache; a step of the layout that was changed gives other ones."""
    ours = fingerprint_code(ROOT)
    for name in samples_module._CODE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    assert fingerprint_code(tmp_path) == ours
    with (tmp_path / "common" / "umap_steps.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    fingerprint_code.cache_clear()
    assert fingerprint_code(tmp_path) != ours

    sample = Sample(np.ones((9, 3), np.float32), np.arange(9))
    before = store_sample(sample, tmp_path, backend=CPU, max_components=3).folder
    assert store_sample(sample, tmp_path, backend=CPU, max_components=3).folder == before
    monkeypatch.setattr(samples_module, "_ROOT", tmp_path)
    assert store_sample(sample, tmp_path, backend=CPU, max_components=3).folder != before


def test_all_code_that_a_stage_comes_from_is_in_its_fingerprint():
    """What the modules of the list import is in it too, but for modules in which no number is made."""
    no_numbers = {"backend", "commit", "config", "mapped", "progress", "threads"}
    imported = {
        name
        for path in samples_module._CODE
        for name in re.findall(r"^ *from common\.(\w+) import", (ROOT / path).read_text(encoding="utf-8"), re.M)
    }
    missing = imported - no_numbers - {Path(path).stem for path in samples_module._CODE}
    assert missing == {"condensed_tree"}  # cuts are not kept on disk


def test_a_cache_of_other_features_is_refused(tmp_path):
    """A folder of features that was renamed by hand: of the same images and, here, of the same length."""
    wanted, _ = RowKeys.of(["content"])
    ours, others = ({"model": {"source": "hog", "revision": name}, "image_size": 64} for name in ("1 4 9", "1 3 16"))
    cache = FeatureCache(tmp_path, others)
    with cache.writer(3) as writer:
        writer.add("content", np.ones(3, np.float32))
    assert cache.read_into(np.zeros((1, 3), np.float32), wanted).all()
    cache.folder.rename(FeatureCache(tmp_path, ours).folder)
    with pytest.raises(UserError, match=r"made in another way \(model.revision: .1 3 16. -> .1 4 9.\); remove this"):
        FeatureCache(tmp_path, ours).read_into(np.zeros((1, 3), np.float32), wanted)


def test_settings_that_are_capped_alike_are_one_candidate():
    wide = ImageSettings.model_validate({"reduction": {"umap_n_neighbors": 200}})
    wider = ImageSettings.model_validate({"reduction": {"umap_n_neighbors": 300, "pca_components": 60}})
    assert candidate_key(wide, (100, 24)) == candidate_key(wider, (100, 24))
    assert candidate_key(wide, (1000, 240)) != candidate_key(wider, (1000, 240))


@pytest.mark.parametrize("shape", [(90, 40), (30, 70)])
def test_fewer_components_are_the_first_of_more_bit_for_bit(shape):
    vectors = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    widest = project_pca(vectors, n_components=30, backend=CPU)
    assert is_pca_nested(shape, backend=CPU)
    for count in (1, 15, 16, 17, 29):
        assert np.array_equal(project_pca(vectors, n_components=count, backend=CPU), widest[:, :count])


def test_graphs_come_in_few_widths():
    assert [graph_width(k, n_rows=1000) for k in (2, 65, 66, 129, 130)] == [64, 64, 128, 128, 256]
    assert graph_width(15, n_rows=50) == 49


def test_one_graph_serves_unless_all_pairs_are_quicker():
    def has(n_rows: int, metric: str) -> bool:
        return has_graph(n_rows, ReductionSettings(umap_metric=metric), backend=CPU)

    assert [has(n_rows, "cosine") for n_rows in (2, 3, 50_000, 50_001)] == [False, True, True, True]
    assert [has(n_rows, "manhattan") for n_rows in (3, 4096, 4097, 50_001)] == [False, False, True, True]


@pytest.mark.soak  # compiles NN-descent, which takes half a minute
def test_an_approximate_graph_is_shared_and_gives_the_same_labels(tmp_path):
    rng = np.random.default_rng(5)
    vectors = (3 * rng.standard_normal((9, 12))[np.arange(4200) % 9] + rng.standard_normal((4200, 12))).astype(
        np.float32
    )
    features = Features([], np.arange(4200), vectors, [], None, 0, 4200)
    stages = Stages(Sample(vectors, features.rows), StageStore(tmp_path), backend=CPU, max_components=12)
    for n_neighbors in (10, 20):
        values = {"umap_metric": "manhattan", "umap_n_neighbors": n_neighbors, "umap_components": 2}
        settings = ImageSettings.model_validate({"reduction": {"pca_components": 12, **values}})
        _, plain = cluster_features(features, settings, backend=CPU)
        assert np.array_equal(stages.cluster(settings).labels, plain.labels)
    assert len(list(tmp_path.glob("graph-*"))) == 1
    found = approximate_neighbors(vectors, 10, metric="manhattan").indices
    from sklearn.neighbors import NearestNeighbors

    exact = NearestNeighbors(n_neighbors=10, metric="manhattan").fit(vectors).kneighbors(return_distance=False)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(found, exact, strict=True)]) > 9.5


def test_a_sample_holds_the_images_of_its_vectors():
    sample = Sample(np.arange(20, dtype=np.float32).reshape(10, 2), np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 3]))
    part = sample.take(0.5, seed=0)
    assert len(part.vectors) == 5 and part.fingerprint != sample.fingerprint
    assert set(part.rows.tolist()) == set(range(5))
    assert part.fingerprint == sample.take(0.5, seed=0).fingerprint != sample.take(0.5, seed=1).fingerprint
