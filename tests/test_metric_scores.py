"""Recall@K, the k-NN vote, the bank's statistics and the choice of the best, by hand."""

import numpy as np
import pytest

from metric_parts.bank import Bank, Reference
from metric_parts.labels import NO_CLASS
from metric_parts.scores import (
    Hits,
    Queries,
    classification_scores,
    is_better,
    recall_at,
    retrieval_scores,
    search,
    vote,
)


def at(*degrees):
    angles = np.deg2rad(np.asarray(degrees, np.float64))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


REFERENCE = Reference(np.arange(5), at(0, 10, 20, 90, 100), np.array([0, 1, 1, 2, 2]), np.arange(5))


def queries(degrees, codes, text_keys=None):
    return Queries(at(*degrees), np.array(codes), np.array(text_keys or [100 + i for i in range(len(codes))]))


def test_recall_is_the_share_of_queries_with_a_hit_among_the_k_nearest():
    hits = search(queries([2, 95], [1, 2]), REFERENCE, k=3, distance="cos")
    assert hits.codes.tolist() == [[0, 1, 1], [2, 2, 1]]
    assert recall_at(hits, np.array([1, 2]), k=1) == 0.5
    assert recall_at(hits, np.array([1, 2]), k=2) == 1.0


@pytest.mark.parametrize("distance", ["cos", "l2"])
def test_a_row_is_not_its_own_neighbour_and_neither_is_a_row_with_its_text(distance):
    itself = Queries(REFERENCE.vectors, REFERENCE.codes, REFERENCE.text_keys)
    hits = search(itself, REFERENCE, k=1, distance=distance)
    assert hits.codes[:, 0].tolist() == [1, 0, 1, 2, 2]
    copies = Reference(np.arange(3), at(0, 0, 40), np.array([0, 0, 1]), np.array([7, 7, 8]))
    hits = search(queries([0], [0], [7]), copies, k=3, distance=distance)
    assert hits.codes.tolist() == [[1, NO_CLASS, NO_CLASS]]
    assert recall_at(hits, np.array([0]), k=3) == 0.0


def test_votes_are_weighted_and_the_nearest_decides_between_equals():
    hits = Hits(np.array([[3, 5, 5], [3, 5, 4], [4, 3, NO_CLASS]]), np.array([[1.0, 0.6, 0.6], [1, 1, 1], [1, 1, 0]]))
    assert vote(hits).tolist() == [5, 3, 4]


def test_k_larger_than_the_bank_takes_all_of_it_and_says_so(caplog):
    scores = retrieval_scores(queries([2], [1]), REFERENCE, recall_at_k=[1, 50], knn_k=99, distance="cos")
    assert scores["recall@50"] == 1.0
    assert "K is larger than the 5 vectors" in caplog.text


def test_a_label_that_the_reference_lacks_is_a_miss():
    scores = retrieval_scores(queries([2, 95], [NO_CLASS, 2]), REFERENCE, recall_at_k=[5], knn_k=2, distance="cos")
    assert scores["recall@5"] == 0.5 and scores["covered"] == 0.5 and scores["knn_acc"] == 0.5


def test_macro_f1_is_over_the_classes_of_the_truth():
    scores = classification_scores(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 7]))
    assert scores["acc"] == 0.75
    assert scores["f1"] == pytest.approx((1.0 + 2 / 3) / 2)
    assert np.isnan(classification_scores(np.zeros(0), np.zeros(0))["acc"])


def test_nan_is_never_the_best():
    assert not is_better(float("nan"), None, by="f1")
    assert not is_better(float("nan"), 0.1, by="f1") and not is_better(float("inf"), None, by="loss")
    assert is_better(0.2, None, by="f1") and is_better(0.2, 0.1, by="f1") and not is_better(0.1, 0.1, by="acc")
    assert is_better(0.1, 0.2, by="loss") and not is_better(0.3, 0.2, by="loss")


# --- The bank --------------------------------------------------------------------------------------------------------


def test_the_bank_keeps_the_newest_vector_of_a_row_and_forgets_old_steps():
    bank = Bank(n_steps=2, codes=np.array([0, 0, 1]), text_keys=np.array([5, 6, 7]))
    bank.add(np.array([0, 1]), at(0, 10), step=0)
    bank.add(np.array([2, 1]), at(90, 20), step=1)
    reference = bank.reference()
    assert reference.rows.tolist() == [0, 1, 2]
    assert np.allclose(reference.vectors, at(0, 20, 90))
    assert reference.codes.tolist() == [0, 0, 1] and reference.text_keys.tolist() == [5, 6, 7]
    bank.add(np.array([2]), at(80), step=2)
    assert bank.reference().rows.tolist() == [1, 2] and len(bank) == 3


def test_bank_statistics_by_hand():
    bank = Bank(n_steps=9, codes=np.array([0, 0, 1, 2]), text_keys=np.arange(4))
    bank.add(np.array([0, 1]), 2 * at(0, 60), step=0)
    bank.add(np.array([2, 2]), 2 * at(0, 90), step=3)
    statistics = bank.statistics(step=4, n_labels=3, drift_vectors=at(0, 60, 30))
    assert statistics["bank/rows"] == 4 and statistics["bank/unique_rows"] == 3
    assert statistics["bank/labels_covered"] == pytest.approx(2 / 3)
    assert statistics["bank/age_steps"] == pytest.approx((4 + 4 + 1) / 3)
    assert statistics["bank/drift"] == pytest.approx(1 - (1 + 1 + np.cos(np.deg2rad(60))) / 3, abs=1e-6)
    assert statistics["bank/intra_cosine"] == pytest.approx(0.5, abs=1e-6)
    assert statistics["bank/inter_cosine"] == pytest.approx((0 + np.cos(np.deg2rad(30))) / 2, abs=1e-6)
    assert statistics["bank/norm"] == pytest.approx(2.0)


def test_a_bank_comes_back_from_its_state():
    bank = Bank(n_steps=3, codes=np.zeros(4, np.int64), text_keys=np.arange(4))
    for step in range(3):
        bank.add(np.array([step, step + 1]), at(step, step + 1), step=step)
    twin = Bank(n_steps=3, codes=np.zeros(4, np.int64), text_keys=np.arange(4))
    twin.load_state_dict(bank.state_dict())
    assert np.array_equal(twin.reference().vectors, bank.reference().vectors)
    assert len(twin) == len(bank) == 6
