"""Clio from facets to base clusters: embedding, clustering, scores, sweep, map, self-training and decoded means."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from common.commit import Identity
from common.config import ConfigError, UserError
from common.silhouette import silhouette_samples, silhouettes_of_rows
from llm_parts.clio import algorithms, measures, nearby
from llm_parts.clio.algorithms import Space, count_clusters, distinct_rows, label_rows, share_out
from llm_parts.clio.base_clusters import (
    centroid_directions,
    cluster_vectors,
    members_and_outsiders,
    nearest_members,
)
from llm_parts.clio.confident_rows import batches, choose_held_out, confident_rows, rivals
from llm_parts.clio.embedder_comparison import compare_embedders
from llm_parts.clio.embedding import embed_facets, embed_texts
from llm_parts.clio.map2d import place_on_map
from llm_parts.clio.measures import agreement_with_labels, as_row, better, mean_agreement, measure_clusters
from llm_parts.clio.patchscope import clean_name, decoder_layers, load_patchscope, mean_state
from llm_parts.clio.run_folder import RunFolder
from llm_parts.clio.self_training import check_self_training, self_train
from llm_parts.clio.sweep import check_sweep, correlate_scores, sweep_clusters, write_sweep_plot
from llm_parts.clio.vector_settings import PatchscopeSettings, SelfTrainingSettings, VectorSettings
from llm_parts.clio.vector_steps import VectorSteps, check_vector_settings
from tests.tiny_encoder import tiny_encoder, training_rows  # noqa: F401

SIZES = (12, 20, 16)
WORDS = "the user asks for a refund of money lost card stolen please help name it is about : ? ."


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def settings_of(**keys):
    keys.setdefault("clustering", {})
    keys["clustering"] = {"stability_runs": 2, "n_init": 2, **keys["clustering"]}
    return VectorSettings(**keys)


@pytest.fixture(scope="module")
def topics():
    """Unit vectors [48, 8] around three directions, and the direction of each."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), SIZES)
    vectors = unit(np.eye(8)[labels] + 0.15 * rng.normal(size=(len(labels), 8)))
    order = rng.permutation(len(labels))
    return vectors[order], labels[order]


@pytest.fixture(scope="module")
def causal_model(tmp_path_factory):
    """A causal model of random weights and three layers, as a folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", *WORDS.split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("causal")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=None, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


# --- Scores ----------------------------------------------------------------------------------------------------------


def test_agreement_counts_noise_as_wrong():
    labels = np.array([0, 0, 0, 1, 1, -1])
    scores = agreement_with_labels(labels, ["a", "a", "b", "b", "b", "b"])
    assert scores["acc"] == pytest.approx(4 / 6)  # a, a, b, b are right; one is mixed in, one is noise
    assert scores["purity"] == pytest.approx(4 / 5)
    assert agreement_with_labels(np.array([0, 0, 1]), ["x", "x", "y"])["nmi"] == pytest.approx(1.0)


def test_scores_equal_scikit_learn(topics):
    from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score

    vectors, labels = topics
    scores = measure_clusters(vectors, labels, true_labels=labels.tolist())
    assert scores["silhouette"] == pytest.approx(silhouette_score(vectors, labels, metric="cosine"), abs=1e-5)
    assert scores["davies_bouldin"] == pytest.approx(davies_bouldin_score(vectors, labels), rel=1e-4)
    assert scores["calinski_harabasz"] == pytest.approx(calinski_harabasz_score(vectors, labels), rel=1e-4)
    assert scores["nmi"] == scores["acc"] == pytest.approx(1.0)
    assert scores["coherence_gain"] == pytest.approx(scores["local_coherence"] - scores["random_coherence"])
    mixed = measure_clusters(vectors, np.random.default_rng(0).permutation(labels))
    assert mixed["coherence_gain"] < scores["coherence_gain"] and mixed["silhouette"] < 0.1 < scores["silhouette"]


def test_a_row_of_scores_is_json_and_what_is_undefined_beats_nothing():
    row = as_row({"rows": 3.0, "noise": 0.0, "silhouette": math.nan, "nmi": 0.123456, "acc": 1.0})
    assert json.dumps(row, allow_nan=False) == '{"rows": 3, "noise": 0, "silhouette": null, "nmi": 0.1235, "acc": 1.0}'
    assert better(0.2, 0.1, name="silhouette") and better(0.1, 0.2, name="davies_bouldin")
    assert better(0.1, math.nan, name="nmi") and not better(math.nan, 0.1, name="nmi")
    assert mean_agreement([np.array([0, 0, 1, -1]), np.array([1, 1, 0, -1])]) == pytest.approx(1.0)
    assert math.isnan(mean_agreement([np.array([0])]))


# --- Base clusters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "keys"),
    [("kmeans", {"n_clusters": 3}), ("hdbscan", {"hdbscan_min_cluster_size": 8}), ("dbscan", {})],
)
def test_every_algorithm_finds_the_topics(topics, algorithm, keys):
    vectors, labels = topics
    settings = settings_of(algorithm=algorithm, clustering={"dbscan_eps": 0.25}, **keys)
    base = cluster_vectors(vectors, settings=settings, seed=3, true_labels=labels.tolist())
    assert base.n_clusters == 3 and base.scores["nmi"] > 0.9
    clustered = base.labels >= 0
    assert np.bincount(base.labels[clustered]).tolist() == sorted(np.bincount(base.labels[clustered]), reverse=True)
    assert np.allclose(np.linalg.norm(base.centroids, axis=1), 1.0, atol=1e-6)
    again = cluster_vectors(vectors, settings=settings, seed=3)
    assert np.array_equal(again.labels, base.labels) and np.array_equal(again.centroids, base.centroids)


@pytest.mark.parametrize(
    ("wanted", "n_rows", "expected"),
    [
        ("auto", 100_000, 1000),
        ("auto", 3, 2),
        ("auto", 1, 1),
        (0.05, 200, 10),
        (0.05, 10, 2),
        (7, 200, 7),
        (7, 3, 3),
        (9, 0, 1),
    ],
)
def test_number_of_clusters(wanted, n_rows, expected):
    assert count_clusters(VectorSettings(n_clusters=wanted), n_rows=n_rows) == expected


@pytest.mark.parametrize("wrong", [0, -3, 1.5, 0.0, "many", True])
def test_wrong_numbers_of_clusters_are_refused(wrong):
    with pytest.raises(ValueError, match="n_clusters"):
        VectorSettings(n_clusters=wrong)


def test_more_clusters_than_rows_and_equal_rows(caplog):
    three = unit(np.eye(4)[:3])
    base = cluster_vectors(three, settings=settings_of(n_clusters=50), seed=0)
    assert base.n_clusters == 3 and "clio.n_clusters is 50, but of 3 rows 3 differ" in caplog.text
    equal = np.repeat(three[:1], 40, axis=0)
    for algorithm in ("kmeans", "hdbscan", "dbscan"):
        base = cluster_vectors(equal, settings=settings_of(algorithm=algorithm), seed=0)
        assert base.labels.tolist() == [0] * 40 and math.isnan(base.scores["silhouette"])


def test_very_many_clusters_are_made_of_groups(monkeypatch):
    """As many clusters as asked for, nearly as tight as those of a comparison with all, in far fewer comparisons."""
    from common import kmeans_steps

    rng = np.random.default_rng(3)
    vectors = unit(rng.normal(size=(60, 16))[rng.integers(60, size=1500)] + 0.3 * rng.normal(size=(1500, 16)))
    settings = settings_of(n_clusters=0.1, clustering={"stability_runs": 1, "n_init": 1})
    n_compared = []
    nearest = kmeans_steps._nearest_numpy

    def counting(rows, centroids, **options):
        n_compared[-1] += len(rows) * len(centroids)
        return nearest(rows, centroids, **options)

    monkeypatch.setattr(kmeans_steps, "_nearest_numpy", counting)
    scores = []
    for most in (1 << 29, 1000):
        monkeypatch.setattr(algorithms, "MAX_COMPARED", most)
        n_compared.append(0)
        base = cluster_vectors(vectors, settings=settings, seed=0)
        assert base.n_clusters == 150 and (base.labels >= 0).all()
        scores.append(float(np.einsum("nd,nd->", vectors, base.centroids[base.labels])) / 1500)
    assert scores[1] > 0.98 * scores[0] and n_compared[1] < 0.4 * n_compared[0]
    assert np.array_equal(base.labels, cluster_vectors(vectors, settings=settings, seed=0).labels)


@pytest.mark.parametrize(
    ("n_clusters", "sizes", "expected"), [(7, [10, 3, 1, 0], [5, 1, 1, 0]), (4, [9, 1], [3, 1]), (5, [3, 2], [3, 2])]
)
def test_clusters_are_shared_out_by_size(n_clusters, sizes, expected):
    assert share_out(n_clusters, np.array(sizes)) == expected


def test_the_silhouette_of_very_many_rows_and_clusters_is_that_of_a_sample(topics, monkeypatch):
    vectors, labels = topics
    labels = np.where(np.arange(48) % 9 == 0, -1, labels)
    each = silhouette_samples(vectors, labels)
    rows = np.array([1, 4, 30])
    assert silhouettes_of_rows(vectors, labels, rows) == pytest.approx(each[rows])
    monkeypatch.setattr(measures, "MAX_COMPARED", 3 * 30)
    sampled = measure_clusters(vectors, labels)["silhouette"]
    assert sampled == pytest.approx(np.nanmean(each), abs=0.05) and sampled != np.nanmean(each)


@pytest.mark.parametrize("algorithm", ["hdbscan", "dbscan"])
def test_everything_noise_is_counted_and_says_what_to_change(topics, caplog, algorithm):
    settings = settings_of(
        algorithm=algorithm, hdbscan_min_cluster_size=400, clustering={"dbscan_eps": 1e-5, "dbscan_min_samples": 3}
    )
    base = cluster_vectors(topics[0], settings=settings, seed=0)
    assert base.n_clusters == 0 and base.centroids.shape == (0, 8) and base.scores["noise"] == 48
    assert "all 48 rows are noise" in caplog.text and "clio." in caplog.text
    assert members_and_outsiders(topics[0], base.labels, base.centroids, n_members=5, n_outsiders=5, seed=0) == []


def test_rows_without_a_direction_are_in_no_cluster(topics):
    vectors = np.vstack([np.zeros((2, 8), np.float32), topics[0]])
    base = cluster_vectors(vectors, settings=settings_of(n_clusters=3), seed=0)
    assert base.labels[:2].tolist() == [-1, -1] and (base.labels[2:] >= 0).all()
    for _, outsiders in members_and_outsiders(
        vectors, base.labels, base.centroids, n_members=3, n_outsiders=99, seed=0
    ):
        assert not {0, 1} & set(outsiders.tolist())
    nothing = cluster_vectors(np.zeros((4, 8), np.float32), settings=settings_of(), seed=0)
    assert nothing.labels.tolist() == [-1] * 4
    assert cluster_vectors(np.zeros((0, 8), np.float32), settings=settings_of(), seed=0).n_clusters == 0


def test_values_that_are_not_finite_are_an_error(topics):
    vectors = topics[0].copy()
    vectors[5, 2] = np.nan
    with pytest.raises(UserError, match="1 of 48 vectors have NaN or infinite values, row 5"):
        cluster_vectors(vectors, settings=settings_of(), seed=0)


def test_what_would_compare_all_pairs_is_refused(topics, monkeypatch):
    monkeypatch.setattr(algorithms, "MAX_ROWS_WITHOUT_UMAP", 40)
    with pytest.raises(UserError, match=r"compares all pairs; set clio\.clustering\.space: umap"):
        label_rows(Space(topics[0], seed=0), settings=settings_of(algorithm="hdbscan"))
    monkeypatch.setattr(algorithms, "MAX_ROWS_WITHOUT_UMAP", 100)
    monkeypatch.setattr(algorithms, "_MAX_NEIGHBORS_WITHIN_EPS", 1000)
    with pytest.raises(UserError, match=r"within 1\.9 of a row lie 48 of 48 rows .*lower it"):
        label_rows(Space(topics[0], seed=0), settings=settings_of(algorithm="dbscan", clustering={"dbscan_eps": 1.9}))


def test_members_and_outsiders_by_hand():
    angles = np.radians([0, 5, 10, 30, 90, 95, 180])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    labels = np.array([0, 0, 0, -1, 1, 1, -1])
    centroids = unit([vectors[:3].sum(axis=0), vectors[4:6].sum(axis=0)])
    groups = members_and_outsiders(vectors, labels, centroids, n_members=9, n_outsiders=2, seed=0)
    assert groups[0][0][0] == 1  # 5° is the centre of the first
    assert [sorted(own.tolist()) for own, _ in groups] == [[0, 1, 2], [4, 5]]
    assert [other.tolist() for _, other in groups] == [[3, 4], [3, 2]]
    few = members_and_outsiders(vectors, labels, centroids, n_members=2, n_outsiders=0, seed=0)
    assert [len(own) for own, _ in few] == [2, 2] and all(len(other) == 0 for _, other in few)
    assert nearest_members(vectors, labels, centroids, n=1)[0].tolist() == [1]


def test_outsiders_of_many_clusters_are_sought_nearby(monkeypatch):
    """Nearly all that a comparison with all rows finds; noise is outside of every cluster, empty rows are nowhere."""
    rng = np.random.default_rng(1)
    labels = np.concatenate([np.repeat(np.arange(99), 20), np.full(1000, 99)])  # one holds a third of all rows
    vectors = unit(rng.normal(size=(100, 8))[labels] + 0.5 * rng.normal(size=(len(labels), 8)))
    vectors[5::50] = 0
    labels[3::10] = labels[5::50] = -1
    centroids = centroid_directions(vectors, labels, n_clusters=100)
    keys = {"n_members": 6, "n_outsiders": 20, "seed": 0}
    exact = members_and_outsiders(vectors, labels, centroids, **keys)
    monkeypatch.setattr(nearby, "MAX_COMPARED", 1000)
    monkeypatch.setattr(nearby, "_among_all", None)
    found = members_and_outsiders(vectors, labels, centroids, **keys)
    shares = []
    for cluster, ((own, outside), (own_too, true)) in enumerate(zip(found, exact, strict=True)):
        assert np.array_equal(own, own_too) and len(outside) == 20 and (labels[outside] != cluster).all()
        assert vectors[outside].any(axis=1).all() and (np.diff(vectors[outside] @ centroids[cluster]) <= 1e-6).all()
        shares.append(len(np.intersect1d(outside, true)) / 20)
    assert np.mean(shares) > 0.9
    assert any((labels[outside] == -1).any() for _, outside in found)
    again = members_and_outsiders(vectors, labels, centroids, **keys)
    assert all(np.array_equal(one[1], other[1]) for one, other in zip(found, again, strict=True))


def test_umap_keeps_equal_rows_together_and_is_repeatable(topics):
    vectors, labels = topics
    heavy = np.vstack([vectors, np.repeat(vectors[:3], 30, axis=0)])  # more duplicates than neighbours
    true_labels = np.concatenate([labels, np.repeat(labels[:3], 30)])
    settings = settings_of(n_clusters=3, clustering={"space": "umap", "umap_n_components": 2, "stability_runs": 1})
    space = Space(heavy, seed=1)
    found = label_rows(space, settings=settings)
    assert agreement_with_labels(found, true_labels.tolist())["acc"] == pytest.approx(1.0)
    points = space.points(settings)
    assert np.array_equal(points[48:78], np.repeat(points[:1], 30, axis=0)) and space.n_distinct == 48
    assert np.array_equal(points, Space(heavy, seed=1).points(settings))
    few = cluster_vectors(vectors[:4], settings=settings, seed=0)  # too few for UMAP
    assert few.n_clusters == 3


def test_distinct_rows():
    firsts, places = distinct_rows(np.array([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4]], np.float32))
    assert firsts.tolist() == [0, 1, 3] and places.tolist() == [0, 1, 0, 2, 1]


# --- The map ---------------------------------------------------------------------------------------------------------


def test_map_shows_topics_apart_and_equal_facets_side_by_side(topics):
    vectors, labels = topics
    mixed = np.vstack([vectors, vectors[:1], np.zeros((2, 8), np.float32)])
    places = place_on_map(mixed, seed=0)
    assert places.shape == (51, 2) and places.dtype == np.float32 and np.isfinite(places).all()
    assert np.array_equal(places, place_on_map(mixed, seed=0))
    assert measure_clusters(places[:48] - places[:48].mean(axis=0), labels)["silhouette"] > 0.5
    gap, width = np.linalg.norm(places[48] - places[0]), float(np.ptp(places[:48], axis=0).max())
    assert 0 < gap < 0.01 * width
    assert np.array_equal(places[49], places[50]) and places[49, 1] < places[:49, 1].min()


def test_map_of_many_rows_compares_no_pairs_and_finds_no_eigenvectors(monkeypatch):
    """Neighbours come from cells, places from the main directions: equal seeds give equal maps of topics apart."""
    rng = np.random.default_rng(2)
    labels = rng.integers(4, size=500)
    vectors = unit(np.eye(12)[labels] + 0.15 * rng.normal(size=(500, 12)))
    monkeypatch.setattr(algorithms, "MAX_ROWS_COMPARED", 400)
    monkeypatch.setattr("common.density.exact_neighbors", None)
    monkeypatch.setattr("umap.umap_.spectral_layout", None)
    places = place_on_map(vectors, seed=0)
    assert np.array_equal(places, place_on_map(vectors, seed=0))
    assert measure_clusters(places - places.mean(axis=0), labels)["silhouette"] > 0.5
    monkeypatch.setattr(algorithms, "MAX_ROWS_COMPARED", 500)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):  # the control: few rows do
        place_on_map(vectors, seed=0)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_map_of_few_rows(n):
    places = place_on_map(unit(np.eye(4)[:n]) if n else np.zeros((0, 4), np.float32), seed=0)
    assert places.shape == (n, 2) and np.isfinite(places).all() and len(np.unique(places, axis=0)) == n
    equal = place_on_map(np.repeat(unit([[1.0, 2.0]]), 6, axis=0), seed=0)
    assert np.isfinite(equal).all() and len(np.unique(equal, axis=0)) == 6


# --- Embedding -------------------------------------------------------------------------------------------------------


def test_cosine_of_rows_is_the_weighted_mean_of_their_facets():
    settings = settings_of(embedding={"sentence_model": "words"})
    columns = {"request": ["lost card", "stolen card", ""], "task": ["block it", "block it", ""]}
    vectors = embed_facets(columns, settings=settings, weights={"request": 3.0, "task": 1.0})
    one = embed_texts(columns["request"], settings=settings)
    assert vectors.shape == (3, 2048) and not vectors[2].any()
    assert vectors[0] @ vectors[1] == pytest.approx(0.75 * float(one[0] @ one[1]) + 0.25, abs=1e-6)
    alone = embed_facets(columns, settings=settings, weights={"task": 0.0})
    assert np.array_equal(alone, one)
    with pytest.raises(UserError, match="none has a weight above 0"):
        embed_facets(columns, settings=settings, weights={"request": 0.0, "task": 0.0})
    with pytest.raises(ValueError, match="unequal lengths"):
        embed_facets({"a": ["x"], "b": ["x", "y"]}, settings=settings)


def test_sentence_model_embeds_equal_texts_once(tiny_encoder):  # noqa: F811
    settings = settings_of(embedding={"sentence_model": str(tiny_encoder)})
    texts = ["lose my card", "  ", "open an account", "lose my card", "pay the bill now"]
    vectors = embed_texts(texts, settings=settings)
    assert vectors.shape == (5, 32) and not vectors[1].any() and np.array_equal(vectors[0], vectors[3])
    assert np.allclose(np.linalg.norm(vectors[[0, 2, 4]], axis=1), 1.0, atol=1e-6)
    assert embed_texts([], settings=settings).shape == (0, 32)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_causal_model_gives_output_states_of_its_last_layer(causal_model, pooling):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["the user asks for a refund", "stolen card", "", "help"]
    settings = settings_of(embedder="llm", embedding={"llm_model": causal_model, "llm_pooling": pooling})
    vectors = embed_texts(texts, settings=settings)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(causal_model), AutoTokenizer.from_pretrained(causal_model)
    for text, vector in zip(texts, vectors, strict=True):
        if not text:
            assert not vector.any()
            continue
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        wanted, inputs = (
            (layer[0].mean(0) if pooling == "mean" else layer[0, -1]) for layer in (states[-1], states[0])
        )
        assert np.allclose(vector, unit([wanted.numpy()])[0], atol=1e-5)
        assert not np.allclose(vector, unit([inputs.numpy()])[0], atol=0.1)


def test_an_embedder_without_a_model_says_which_key_to_set(tmp_path):
    with pytest.raises(UserError, match=r"set clio\.embedding\.llm_model"):
        check_vector_settings(settings_of(embedder="llm"), has_labels=False)
    with pytest.raises(ConfigError, match=r"clio\.embedding\.compare needs a causal model"):
        check_vector_settings(settings_of(embedding={"compare": True}), has_labels=False)
    broken = settings_of(embedder="llm", embedding={"llm_model": str(tmp_path)})
    with pytest.raises(UserError, match=r"clio\.embedding\.llm_model: .*config\.json"):
        embed_texts(["a"], settings=broken)


def test_embedders_are_compared_on_the_same_data(causal_model):
    texts = ["lost card", "stolen card", "the card is lost", "refund of money", "money please", "a refund please"] * 2
    settings = settings_of(n_clusters=2, embedding={"sentence_model": "words", "llm_model": causal_model})
    rows = compare_embedders(
        {"request": texts}, settings=settings, seed=0, true_labels=["a", "a", "a", "b", "b", "b"] * 2
    )
    assert [(row["embedder"], row["dimension"]) for row in rows] == [("sentence", 1024), ("llm", 16)]
    assert rows[0]["shared_neighbors"] == rows[0]["agreement"] == 1.0 and rows[0]["nmi"] == 1.0
    assert 0 <= rows[1]["shared_neighbors"] <= 1 and rows[1]["effective_rank"] <= 6


# --- Sweep -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choose_by", ["silhouette", "davies_bouldin", "calinski_harabasz", "nmi"])
def test_sweep_finds_the_number_of_topics(topics, choose_by, tmp_path):
    vectors, labels = topics
    settings = settings_of(sweep={"grid": {"n_clusters": [2, 3, 6, 12]}, "choose_by": choose_by})
    result = sweep_clusters(vectors, settings=settings, seed=0, true_labels=labels.tolist())
    assert result.settings.n_clusters == 3 and [row["chosen"] for row in result.table()].index(True) == 1
    assert result.settings.sweep == settings.sweep and settings.n_clusters == "auto"
    assert {row["settings"] for row in result.correlations} == {4} and len(result.correlations) == 6
    path = write_sweep_plot(result, tmp_path / "sweep.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_sweep_over_two_keys_shares_the_tree(topics, tmp_path, monkeypatch):
    import common.density

    made = []
    make_tree = common.density.single_linkage_tree
    monkeypatch.setattr(common.density, "single_linkage_tree", lambda *a, **k: made.append(k) or make_tree(*a, **k))
    grid = {"hdbscan_min_cluster_size": [5, 8], "hdbscan_min_samples": [2, 4]}
    settings = settings_of(algorithm="hdbscan", sweep={"grid": grid})
    result = sweep_clusters(topics[0], settings=settings, seed=0)
    assert len(result.rows) == 4 and len(made) == 2
    assert result.settings.clustering.hdbscan_min_samples in (2, 4)
    write_sweep_plot(result, tmp_path / "sweep.png")


def test_correlation_by_hand():
    def row(coherence, silhouette, davies):
        return {
            "local_coherence": coherence, "coherence_gain": coherence, "silhouette": silhouette,
            "davies_bouldin": davies, "calinski_harabasz": 1.0,
        }  # fmt: skip

    rows = [row(0.1, 0.9, 3.0), row(0.2, 0.8, 2.0), row(0.3, 0.1, 1.0), row(math.nan, 0.5, 0.5)]
    found = {(one["local"], one["classical"]): one for one in correlate_scores(rows)}
    assert found["local_coherence", "silhouette"] == {
        "local": "local_coherence", "classical": "silhouette", "spearman": -1.0, "settings": 3,
    }  # fmt: skip
    assert found["local_coherence", "davies_bouldin"]["spearman"] == 1.0  # lower is better, so they agree
    assert found["coherence_gain", "calinski_harabasz"]["spearman"] is None  # does not vary


def test_a_sweep_that_cannot_be_made_is_refused_at_once():
    def problem(**sweep):
        with pytest.raises(ConfigError) as refused:
            check_sweep(settings_of(sweep=sweep), has_labels=False)
        return str(refused.value)

    assert "clio.sweep.grid.dbscan_eps: read by dbscan alone" in problem(grid={"dbscan_eps": [0.1]})
    assert "needs clio.clustering.space: umap" in problem(grid={"umap_min_dist": [0.1]})
    assert "nmi needs labels" in problem(grid={"n_clusters": [2]}, choose_by="nmi")
    assert "cannot be tried" in problem(grid={"n_clusters": [2, 2.5]})
    with pytest.raises(ValueError, match="combinations are too many"):
        settings_of(sweep={"grid": {"n_clusters": list(range(2, 200))}})
    with pytest.raises(ValueError, match="grid"):
        settings_of(sweep={"grid": {"n_cluster": [2]}})


# --- Self-training ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def requests():
    rows = training_rows(n_classes=4, n_per_class=10)
    return [str(text) for text in rows["text"]], [str(label) for label in rows["label"]]


def test_self_training_learns_without_the_held_out_rows_and_measures_the_gain(tiny_encoder, requests, tmp_path):  # noqa: F811
    texts, labels = requests
    settings = settings_of(
        n_clusters=4,
        embedding={"sentence_model": str(tiny_encoder)},
        self_training={"enabled": True, "epochs": 6, "learning_rate": 1e-3, "rows_per_cluster": 4},
    )
    before = embed_texts(texts, settings=settings)
    base = cluster_vectors(before, settings=settings, seed=0)
    trained = [
        self_train(texts, before, base, settings=settings, seed=0, model_dir=tmp_path / name, true_labels=labels)
        for name in ("one", "two")
    ]
    assert np.array_equal(embed_texts(texts, settings=settings), before)  # the shared model is as it was
    one, two = (embed_texts(texts, settings=each.settings) for each in trained)
    assert np.array_equal(one, two) and not np.allclose(one, before, atol=1e-3)
    assert trained[0].rows == trained[1].rows
    rows = {row["model"]: row for row in trained[0].rows}
    assert rows["before"]["rows"] == 8  # a fifth of 40
    learnt = [measure_clusters(vectors, base.labels)["silhouette"] for vectors in (before, one)]
    assert learnt[1] > learnt[0]  # what it was taught
    assert rows["gain"]["nmi"] == pytest.approx(rows["after"]["nmi"] - rows["before"]["nmi"], abs=2e-4)
    assert trained[0].n_learnt < 32 and not list(tmp_path.glob(".*"))


def test_confident_rows_rivals_and_batches(topics):
    vectors, _ = topics
    base = cluster_vectors(vectors, settings=settings_of(n_clusters=3), seed=0)
    texts = [f"text {row}" for row in range(48)]
    texts[1] = texts[0]
    held_out = choose_held_out(texts, share=0.25, seed=0)
    assert held_out.sum() in (12, 13) and held_out[0] == held_out[1]
    options = SelfTrainingSettings(confident_share=0.5, clusters_per_batch=2, rows_per_cluster=3, epochs=1)
    groups = confident_rows(vectors, base, texts, without=held_out, options=options)
    own = {cluster: set(rows.tolist()) for cluster, rows in groups.items()}
    learnt = set().union(*own.values())
    assert not learnt & set(np.flatnonzero(held_out).tolist()) and 1 not in learnt
    assert all(base.labels[row] == cluster for cluster, rows in own.items() for row in rows)
    near = rivals(unit(np.array([[1, 0], [1, 0.1], [-1, 0], [-1, 0.1]])), n=3)
    assert near == [{1}, {0}, {3}, {2}]
    four = {cluster: np.arange(4) + 4 * cluster for cluster in range(4)}
    for rows, codes in batches(four, near, options=options, seed=0):
        assert len(rows) == 6 and codes[-1] not in near[codes[0]] and codes[0] != codes[-1]


def test_nothing_to_tell_apart_is_an_error(topics):
    base = cluster_vectors(topics[0], settings=settings_of(n_clusters=1), seed=0)
    texts = [str(row) for row in range(48)]
    with pytest.raises(UserError, match="1 of 1 clusters have two different rows to learn from"):
        confident_rows(topics[0], base, texts, without=np.zeros(48, bool), options=SelfTrainingSettings())
    with pytest.raises(ConfigError, match="only a sentence model can be fine-tuned"):
        check_self_training(settings_of(embedding={"sentence_model": "words"}, self_training={"enabled": True}))


# --- Decoding a mean state -------------------------------------------------------------------------------------------


def test_a_state_in_the_last_layer_goes_on_as_its_own_text_would(causal_model):
    """Patched in behind the last layer at the prompt's end, a state says what its text would have gone on with."""
    import torch

    scope = load_patchscope(
        causal_model, settings=PatchscopeSettings(layer=1.0, prompt="name of {placeholder}", max_new_tokens=1)
    )
    texts = ["the user asks for refund", "stolen card help", "money", "it is about a card"]
    states = scope.states(texts)
    said = []
    for text, state in zip(texts, states, strict=True):
        ids = scope.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            next_id = int(scope.model(ids).logits[0, -1].argmax())
        said.append(scope.decode(state))
        assert said[-1] == clean_name(scope.tokenizer.decode([next_id]))
    assert len(set(said)) > 1  # the state decides, not the prompt
    assert not decoder_layers(scope.model)[-1]._forward_hooks  # nothing stays patched


def test_a_mean_is_patched_into_a_middle_layer_and_kept_at_length(causal_model):
    settings = PatchscopeSettings(layer=0.4, prompt="it is about : {placeholder}", max_new_tokens=4)
    scope = load_patchscope(causal_model, settings=settings)
    states = scope.states(["the user asks for refund", "", "money please"])
    assert states.shape == (2, 16)
    mean = mean_state(states)
    assert np.linalg.norm(mean) == pytest.approx(np.linalg.norm(states, axis=1).mean(), rel=1e-5)
    assert np.allclose(mean_state(states, keep_length=False), states.mean(axis=0), atol=1e-6)
    name = scope.name(["the user asks for refund", "money please"])
    assert name == scope.decode(mean) == scope.name(["the user asks for refund", "money please"])
    others = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32) * np.abs(mean).max()
    assert len({name, *map(scope.decode, others)}) > 2
    with pytest.raises(UserError, match="all texts are empty"):
        scope.states(["", " "])
    with pytest.raises(UserError, match="16 finite numbers"):
        scope.decode(np.full(16, np.nan, np.float32))


def test_clean_name():
    assert clean_name('\n\n  "Refund requests."  \nmore') == "Refund requests"
    assert clean_name(" ".join(map(str, range(20)))) == "0 1 2 3 4 5 6 7 8 9"
    assert clean_name(" \n ") == ""


# --- The steps of a run ----------------------------------------------------------------------------------------------


def run_steps(folder, texts, labels, settings):
    with RunFolder(folder, Identity("clio", {"key": 1}, {})) as run:
        run.begin()
        steps = VectorSteps(settings, folder=run, seed=0, true_labels=labels)
        vectors = steps.embed({"request": texts}, weights={"request": 1.0})
        found, centroids = steps.cluster(vectors)
    return vectors, found, centroids, steps


def test_steps_are_kept_and_taken_up_again(tiny_encoder, requests, tmp_path, monkeypatch):  # noqa: F811
    from llm_parts.clio import base_clusters, embedding, self_training, sweep

    texts, labels = requests
    settings = settings_of(
        embedding={"sentence_model": str(tiny_encoder)},
        sweep={"grid": {"n_clusters": [2, 4]}},
        self_training={"enabled": True, "epochs": 1, "learning_rate": 1e-3},
    )
    first = run_steps(tmp_path / "run", texts, labels, settings)
    assert [title for title, _ in first[3].tables] == [
        "Self-training", "Sweep", "Local and classical scores", "Base clusters",
    ]  # fmt: skip
    (tmp_path / "run" / "sweep.png").unlink()
    monkeypatch.setattr(base_clusters, "cluster_space", None)  # nothing is computed again
    monkeypatch.setattr(embedding, "embed_texts", None)
    monkeypatch.setattr(self_training, "self_train", None)
    monkeypatch.setattr(sweep, "sweep_clusters", None)
    again = run_steps(tmp_path / "run", texts, labels, settings)
    assert all(np.array_equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert again[3].tables == first[3].tables and (tmp_path / "run" / "sweep.png").is_file()
    json.dumps(again[3].tables, allow_nan=False)
    assert again[3].settings == first[3].settings and again[3].settings.n_clusters in (2, 4)


def test_an_embedding_that_was_killed_goes_on_with_its_next_part(tmp_path, monkeypatch):
    from llm_parts.clio import embedding

    texts = [f"text number {number}" for number in range(23)] * 2
    settings = settings_of(embedding={"sentence_model": "words"})
    whole = embed_texts(texts, settings=settings)
    real, embedded = embedding._by_words, []

    def dies_in_the_third_part(part, *, on_progress):
        if len(embedded) == 2:
            raise KeyboardInterrupt
        embedded.append(len(part))
        return real(part, on_progress=on_progress)

    monkeypatch.setattr(embedding, "PART_TEXTS", 8)
    monkeypatch.setattr(embedding, "_by_words", dies_in_the_third_part)
    with RunFolder(tmp_path / "run", Identity("clio", {}, {})) as run:
        run.begin()
        steps = VectorSteps(settings, folder=run, seed=0)
        with pytest.raises(KeyboardInterrupt):
            steps.embed({"request": texts}, weights={"request": 1.0})
        embedded[:] = [0]
        assert np.array_equal(steps.embed({"request": texts}, weights={"request": 1.0}), whole)
        assert embedded == [0, 7]
        assert [path.name for path in run.steps.glob("vectors*")] == ["vectors.safetensors"]
