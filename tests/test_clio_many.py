"""Where clusters are a share of the conversations, what compares clusters with clusters is bounded, and still right."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import davies_bouldin_score

from common.cells import label_cells
from common.grouping import cluster_sums
from common.separation import davies_bouldin
from common.silhouette import silhouette_samples, silhouettes_of_rows
from llm_parts.clio import levels, measures, nearby
from llm_parts.clio.confident_rows import _thinned
from llm_parts.clio.levels import neighborhoods
from llm_parts.clio.masking import Masker
from llm_parts.clio.measures import measure_clusters, sampled_scores
from llm_parts.clio.naming import RIVALS, NameEvidence, Namer
from llm_parts.clio.nearby import nearest_others, nearest_outside, nearest_rows
from llm_parts.clio.parent_names import name_level
from llm_parts.clio.run_tables import score_table
from llm_parts.clio.taxonomy import ClusterName


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def topics(n_rows, n_topics, *, spread=0.4, seed=0):
    rng = np.random.default_rng(seed)
    own = rng.integers(n_topics, size=n_rows)
    return unit(rng.normal(size=(n_topics, 16))[own] + spread * rng.normal(size=(n_rows, 16))), own


# --- What lies nearest -----------------------------------------------------------------------------------------------


def test_the_nearest_by_hand():
    angles = np.radians([0, 10, 25, 90, 100])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert nearest_others(points, 2).tolist() == [[1, 2], [0, 2], [1, 0], [4, 2], [3, 2]]
    assert nearest_others(points, 9, rows=np.array([3])).tolist() == [[4, 2, 1, 0]]
    assert nearest_others(points[:1], 3).shape == (1, 0)
    assert [rows.tolist() for rows in nearest_rows(points, points[[4]], 2)] == [[4, 3]]  # nothing is its own
    outside = nearest_outside([np.array([0, 1]), np.array([2]), np.array([4, 3])], points, 2)
    assert [rows.tolist() for rows in outside] == [[2, 3], [1, 0], [2, 1]]


@pytest.mark.parametrize("is_one_of_them", [True, False])
def test_very_many_are_sought_in_cells_which_finds_nearly_all(monkeypatch, is_one_of_them):
    points, _ = topics(3000, 60)
    own = np.arange(3000) if is_one_of_them else None
    exact = list(nearest_rows(points, points, 5, own=own))
    monkeypatch.setattr(nearby, "MAX_COMPARED", 1000)
    monkeypatch.setattr(nearby, "_among_all", None)
    found = list(nearest_rows(points, points, 5, own=own))
    share = np.mean([len(np.intersect1d(ours, true)) / 5 for ours, true in zip(found, exact, strict=True)])
    assert share > 0.95 and all(len(rows) == 5 for rows in found)
    assert sum(row in rows for row, rows in enumerate(found)) == (0 if is_one_of_them else 3000)
    monkeypatch.setattr(nearby, "_LEAST_CELLS", 1)
    monkeypatch.setattr(nearby, "_SOUGHT", 1)
    few = list(nearest_rows(points, points, 5, own=own))
    assert np.mean([len(np.intersect1d(ours, true)) / 5 for ours, true in zip(few, exact, strict=True)]) < share - 0.1


def test_more_clusters_than_cells_are_no_cells():
    points, _ = topics(900, 30)
    assert len(label_cells(points, np.arange(900) % 120)) == 120  # four times the root
    each_its_own = label_cells(points, np.arange(900))
    assert len(each_its_own) < 200 and sorted(each_its_own.order.tolist()) == list(range(900))


# --- Scores ----------------------------------------------------------------------------------------------------------


def test_davies_bouldin_of_a_sample_of_the_clusters(monkeypatch):
    points, own = topics(4000, 200)
    exact = davies_bouldin_score(points, own)
    assert davies_bouldin(points, own, sample_size=200) == pytest.approx(exact, rel=1e-6)
    sampled = [davies_bouldin(points, own, sample_size=50, random_state=seed) for seed in range(20)]
    assert len(set(sampled)) > 10 and np.mean(sampled) == pytest.approx(exact, rel=0.02)
    assert sampled[3] == davies_bouldin(points, own, sample_size=50, random_state=3)
    assert davies_bouldin(np.ones((6, 2)), np.arange(6) % 3, sample_size=1) == 0.0
    told = {row["score"]: row["value"] for row in score_table(measure_clusters(points, own))}
    assert told["Davies-Bouldin (lower is better)"] == pytest.approx(exact, rel=1e-6)
    monkeypatch.setattr(measures, "MAX_CLUSTER_PAIRS", 50 * 200)
    scores = measure_clusters(points, own, seed=3)
    assert scores["davies_bouldin"] == sampled[3] and sampled_scores(scores) == {"davies_bouldin"}
    assert "Davies-Bouldin (lower is better), of a sample" in [row["score"] for row in score_table(scores)]


def test_silhouettes_and_sums_do_not_hang_on_the_parts_they_are_made_in(monkeypatch):
    points, own = topics(6000, 40)
    each, rows = silhouette_samples(points, own), np.arange(0, 6000, 7)
    monkeypatch.setattr("common.silhouette._CHUNK_ELEMENTS", 40 * 100)
    assert silhouette_samples(points, own) == pytest.approx(each)
    assert silhouettes_of_rows(points, own, rows) == pytest.approx(each[rows])
    alone = np.arange(6000)  # as many clusters as rows, more than are turned to float64 at a time
    assert np.array_equal(cluster_sums(points, alone, 6000), points.astype(np.float64))


# --- Hierarchies and names -------------------------------------------------------------------------------------------


def test_very_many_vectors_are_cut_into_neighbourhoods_part_by_part(monkeypatch):
    points, own = topics(2000, 50, spread=0.05)
    sizes = {}
    for most in (levels.MAX_COMPARED, 20_000):
        monkeypatch.setattr(levels, "MAX_COMPARED", most)
        groups = neighborhoods(points, seed=0)
        assert sorted(np.concatenate(groups).tolist()) == list(range(2000))
        sizes[most] = len(groups)
        alike = sum(Counter(own[group].tolist()).most_common(1)[0][1] for group in groups)
        assert alike / 2000 > 0.85  # what is alike lies together either way
    assert all(45 <= n <= 55 for n in sizes.values())
    assert len(neighborhoods(np.ones((600, 4)), seed=0)) == 1


class OneName:
    """Answers every question with one name, and remembers the prompts."""

    def __init__(self):
        self.prompts = []

    def ask(self, prompts, *, schema, **_):
        self.prompts += prompts
        values = {"reasoning": "", "summary": "All alike.", "name": "Same name"}
        return [schema(**values) for _ in prompts]


def test_prompts_do_not_grow_with_how_many_clusters_bear_one_name():
    longest, told_apart = [], []
    for n in (60, 240):
        evidence = [NameEvidence([f"word{row} alone"], []) for row in range(n)]
        questions = OneName()
        names = Namer(questions, method="summarize", masker=Masker()).name_clusters(evidence)
        told_apart.append(len({name.name for name in names}))
        longest.append(max(prompt.count("word") for prompt in questions.prompts))
    assert told_apart == [60, 240] and longest[0] == longest[1] <= 1 + RIVALS


def test_parents_of_one_name_are_told_apart_whatever_their_number():
    children = [ClusterName(f"child {row}", "") for row in range(480)]
    parents, sizes, points = np.arange(480) // 2, np.ones(480), topics(480, 9)[0]
    questions = OneName()
    level = name_level(children, parents, sizes=sizes, vectors=points, questions=questions, step="linkage_rename")
    assert len({name.name for name in level.names}) == 240
    assert max(prompt.count("child ") for prompt in questions.prompts) <= 2 + 20 + 1


def test_clusters_that_are_learnt_from_are_bounded_too():
    groups = {cluster: np.arange(5) + 5 * cluster for cluster in range(100)}
    assert sum(map(len, _thinned(groups, max_rows=250, seed=0).values())) == 200  # two of each
    few = _thinned(groups, max_rows=60, seed=0)
    assert len(few) == 30 and all(len(rows) == 2 for rows in few.values())
    assert list(few) == sorted(few) == list(_thinned(groups, max_rows=60, seed=0))
    assert _thinned(groups, max_rows=500, seed=0) is groups
