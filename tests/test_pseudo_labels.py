"""The rules of stage 6 on rows whose decisions are worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.pseudo_labels import (
    CLASSIFIER,
    CLUSTER,
    GOLD,
    NONE,
    REASONS,
    ClassCuts,
    ClusterLabels,
    MostConfident,
    Rows,
    Rules,
    class_limits,
    decide,
)

REASONS_TO_USE = ("gold label", "pure cluster and sure classifier", "sure classifier")
NAN = np.nan
A, B = 0, 1

# cluster 2: purity 0.95, majority A, 20 labelled; cluster 5: purity 0.7, B, 10; cluster 9: no labels at all
CLUSTERS = ClusterLabels(
    ids=np.array([2, 5, 9]),
    majority=np.array([A, B, -1]),
    purity=np.array([0.95, 0.7, 0.0]),
    n_labeled=np.array([20, 10, 0]),
)
RULES = Rules(
    metric_purity=0.6,
    metric_max_prob=0.5,
    classification_purity=0.9,
    classification_max_prob=0.8,
    min_labeled=1,
    require_agreement=False,
    source="cluster",
)


def rows(*given: tuple) -> Rows:
    """Rows of (gold, cluster id, top probability, predicted), all with a text."""
    gold, cluster_ids, max_prob, predicted = zip(*given, strict=True)
    return Rows(
        np.array(gold), np.array(cluster_ids), np.array(max_prob, float), np.array(predicted), np.ones(len(given), bool)
    )


def one(row: tuple, rules: Rules = RULES, **changes) -> tuple:
    """Label, source, metric mask, classifier mask and reason of one row."""
    decided = decide(rows(row), CLUSTERS, replace(rules, **changes))
    return (
        int(decided.labels[0]),
        int(decided.source[0]),
        bool(decided.metric_mask[0]),
        bool(decided.classifier_mask[0]),
        REASONS[decided.reasons[0]],
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((B, 2, 0.1, A), (B, GOLD, True, True, "gold label")),  # whatever cluster and classifier say
        ((B, -1, NAN, -1), (B, GOLD, True, True, "gold label")),
        ((-1, 2, 0.9, B), (A, CLUSTER, True, True, "pure cluster and sure classifier")),
        ((-1, 2, 0.8, B), (A, CLUSTER, True, True, "pure cluster and sure classifier")),  # exactly at the threshold
        ((-1, 2, 0.79, B), (A, CLUSTER, True, False, "pure cluster and sure classifier")),
        ((-1, 2, 0.5, B), (A, CLUSTER, True, False, "pure cluster and sure classifier")),
        ((-1, 2, 0.49, B), (-1, NONE, False, False, "classifier is not sure enough")),
        ((-1, 2, NAN, -1), (-1, NONE, False, False, "classifier is not sure enough")),
        ((-1, 5, 0.99, B), (B, CLUSTER, True, False, "pure cluster and sure classifier")),  # 0.7 < 0.9
        ((-1, 9, 0.99, B), (-1, NONE, False, False, "cluster has too few labels")),
        ((-1, -1, 0.99, B), (-1, NONE, False, False, "no cluster")),
        ((-1, 7, 0.99, B), (-1, NONE, False, False, "no cluster")),  # an id that no centroid has
    ],
)
def test_decisions_by_hand(row, expected):
    assert one(row) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metric_purity": 0.71}, (False, False, "cluster is not pure enough")),
        ({"metric_purity": 0.7}, (True, False, "pure cluster and sure classifier")),
        ({"classification_purity": 0.7}, (True, True, "pure cluster and sure classifier")),
        (
            {"classification_purity": 0.7, "classification_max_prob": 0.91},
            (True, False, "pure cluster and sure classifier"),
        ),
        ({"metric_purity": 0.71, "classification_purity": 0.5}, (False, True, "pure cluster and sure classifier")),
        ({"min_labeled": 10}, (True, False, "pure cluster and sure classifier")),
        ({"min_labeled": 11}, (False, False, "cluster has too few labels")),
        ({"metric_max_prob": 0.91, "classification_purity": 0.1}, (False, True, "pure cluster and sure classifier")),
    ],
)
def test_each_threshold_alone(changes, expected):
    _, _, metric, classifier, reason = one((-1, 5, 0.9, B), **changes)
    assert (metric, classifier, reason) == expected


def test_without_probabilities_only_a_threshold_of_zero_is_met():
    zero = {"metric_max_prob": 0.0, "classification_max_prob": 0.0}
    assert one((-1, 2, NAN, -1), **zero)[:4] == (A, CLUSTER, True, True)
    assert one((-1, 2, NAN, -1), **zero | {"classification_max_prob": 0.01})[:4] == (A, CLUSTER, True, False)


def test_agreement():
    assert one((-1, 2, 0.9, A), require_agreement=True)[:4] == (A, CLUSTER, True, True)
    assert one((-1, 2, 0.9, B), require_agreement=True) == (
        -1, NONE, False, False, "cluster and classifier disagree",
    )  # fmt: skip
    assert one((-1, 2, 0.9, -1), require_agreement=True)[1] == NONE
    assert one((-1, 9, 0.9, -1), require_agreement=True)[1] == NONE  # no label on either side is no agreement


def test_labels_of_the_classifier():
    from_classifier = {"source": "classifier"}
    assert one((-1, 2, 0.9, B), **from_classifier)[:4] == (B, CLASSIFIER, True, True)
    assert one((-1, -1, 0.9, B), **from_classifier)[:4] == (B, CLASSIFIER, True, True)  # purity does not count here
    assert one((-1, 2, 0.6, B), **from_classifier)[:4] == (B, CLASSIFIER, True, False)
    assert one((-1, 2, 0.9, -1), **from_classifier)[4] == "no prediction"
    assert one((A, 2, 0.9, B), **from_classifier)[:2] == (A, GOLD)
    both = from_classifier | {"require_agreement": True}
    assert one((-1, 2, 0.9, A), **both)[:4] == (A, CLASSIFIER, True, True)
    assert one((-1, 5, 0.9, B), **both)[:4] == (B, CLASSIFIER, True, False)  # with agreement purity counts again
    assert one((-1, 2, 0.9, B), **both)[4] == "cluster and classifier disagree"


def test_row_without_a_text_takes_no_part_and_keeps_its_gold_label():
    given = rows((B, 2, 0.9, B), (-1, 2, 0.9, B))
    decided = decide(replace(given, usable=np.array([False, False])), CLUSTERS, RULES)
    assert decided.labels.tolist() == [B, -1]
    assert not decided.used.any()
    assert [REASONS[code] for code in decided.reasons] == ["no text", "no text"]


def test_confidence_is_purity_times_probability_and_gold_above_all():
    decided = decide(rows((-1, 2, 0.8, A), (-1, 5, 0.5, A), (A, 9, 0.1, B), (-1, 2, NAN, -1)), CLUSTERS, RULES)
    assert np.allclose(decided.confidence, [0.95 * 0.8, 0.7 * 0.5, 2.0, 0.95])


def test_rows_in_the_share_are_not_said_to_be_in_by_agreement():
    """Cluster 2 says A to all three; the metric share takes the first two, the head the first, agreement the last."""
    given = rows((-1, 2, 0.9, A), (-1, 2, 0.8, A), (-1, 2, 0.7, A))
    cuts = ClassCuts(metric=np.array([0.8, 0.8, np.inf]), classification=np.array([0.9, 0.9, np.inf]))
    decided = decide(given, CLUSTERS, replace(RULES, source="classifier", agreement_in_metric=True), cuts=cuts)
    assert [REASONS[reason] for reason in decided.reasons] == [*["sure classifier"] * 2, "cluster and classifier agree"]
    assert decided.metric_mask.tolist() == [True] * 3 and decided.classifier_mask.tolist() == [True, False, False]


def test_reasons_tell_the_same_as_the_masks():
    rng = np.random.default_rng(0)
    n_rows = 5000
    given = Rows(
        gold=rng.choice([-1, -1, -1, A, B], n_rows),
        cluster_ids=rng.choice([-1, 2, 5, 7, 9], n_rows),
        max_prob=np.where(rng.random(n_rows) < 0.1, NAN, rng.random(n_rows)),
        predicted=rng.choice([-1, A, B], n_rows),
        usable=rng.random(n_rows) < 0.9,
    )
    for source in ("cluster", "classifier"):
        for agreement in (False, True):
            decided = decide(given, CLUSTERS, replace(RULES, source=source, require_agreement=agreement))
            used_by_reason = np.isin(decided.reasons, [REASONS.index(reason) for reason in REASONS_TO_USE])
            assert np.array_equal(decided.used, used_by_reason)
            assert np.array_equal(decided.labels[given.gold >= 0], given.gold[given.gold >= 0])
            assert ((decided.source == NONE) == (decided.labels < 0)).all()


# --- Balance ---------------------------------------------------------------------------------------------------------


def test_most_confident_rows_of_each_class_over_batches():
    kept = MostConfident(np.array([2, 1]))
    kept.add(0, np.array([A, A, B]), np.array([0.5, 0.9, 0.2]), np.array([True, True, True]))
    kept.add(3, np.array([B, A, A, B]), np.array([0.3, 0.7, 0.99, 0.9]), np.array([True, True, True, False]))
    assert kept.rows().tolist() == [1, 3, 5]


def test_of_equal_rows_the_earlier_stay_however_the_stream_is_cut():
    labels, confidence, used = np.zeros(9, int), np.full(9, 0.5), np.ones(9, bool)
    for cut in range(10):
        kept = MostConfident(np.array([4]))
        kept.add(0, labels[:cut], confidence[:cut], used[:cut])
        kept.add(cut, labels[cut:], confidence[cut:], used[cut:])
        assert kept.rows().tolist() == [0, 1, 2, 3]


def test_nothing_kept():
    assert MostConfident(np.zeros(0, np.int64)).rows().tolist() == []
    assert MostConfident(np.array([3])).rows().tolist() == []


@pytest.mark.parametrize(
    ("counts", "downsample", "max_per_class", "limits"),
    [
        ([10, 3, 7], True, None, [3, 3, 3]),
        ([10, 0, 7], True, None, [7, 0, 7]),  # a class that nobody has does not empty the others
        ([10, 3, 7], False, 5, [5, 3, 5]),
        ([10, 3, 7], True, 2, [2, 2, 2]),
        ([0, 0], True, None, [0, 0]),
        ([], True, None, []),
        ([10, 3], False, None, [10, 3]),
    ],
)
def test_limits_of_classes(counts, downsample, max_per_class, limits):
    found = class_limits(np.array(counts, np.int64), downsample=downsample, max_per_class=max_per_class)
    assert found.tolist() == limits


def test_left_out_rows_lose_pseudo_labels_and_keep_gold():
    decided = decide(rows((B, 2, 0.9, A), (-1, 2, 0.9, A), (-1, 2, 0.1, A)), CLUSTERS, RULES)
    after = decided.without(np.array([True, True, True]))
    assert after.labels.tolist() == [B, -1, -1]
    assert after.source.tolist() == [GOLD, NONE, NONE]
    assert not after.used.any()
    assert [REASONS[code] for code in after.reasons] == [
        "left out to balance the classes", "left out to balance the classes", "classifier is not sure enough",
    ]  # fmt: skip
