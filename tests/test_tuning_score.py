"""The score, by hand: what it is, and that neither throwing away nor merging wins."""

from __future__ import annotations

import itertools

import pytest

from image_parts.settings import PuritySettings
from image_parts.tuning.score import least_score, score_of
from image_parts.tuning.settings import ScoreSettings

WEIGHTS, THRESHOLDS = ScoreSettings(), PuritySettings()


def score(cosine, silhouette, cross, *, reduced=0.5, noise=0.0, unassigned=0.0, largest=0.2) -> float:
    metrics = {
        "max_centroid_cosine": cosine,
        "silhouette": silhouette,
        "max_nn_cross_ratio": cross,
        "silhouette_reduced": reduced,
        "noise_share": noise,
        "unassigned_share": unassigned,
        "largest_share": largest,
    }
    return score_of(metrics, WEIGHTS, THRESHOLDS)


def test_the_formula_without_penalties():
    assert score(0.8, 0.4, 0.2) == pytest.approx(1.15 * 0.2 + 0.75 * 0.4 + 0.25 * 0.8)
    assert score(-0.5, 0.4, 0.2) == pytest.approx(1.15 + 0.75 * 0.4 + 0.25 * 0.8)  # opposite is not better than apart


@pytest.mark.parametrize(("values", "penalty"), [
    ({"cosine": 0.9825}, 2.2 * 0.5 + 1.15 * (0.9825 - 0.8)),  # half way from 0.965 to 1
    ({"reduced": -0.375}, 1.5 * 0.5),  # half way from 0.25 to -1
    ({"cross": 0.75}, 1.0 * 0.5 + 0.25 * (0.75 - 0.2)),  # half way from 0.5 to 1
    ({"noise": 0.2}, 3 * 0.04),  # HDBSCAN's noise, although all of it was assigned
    ({"noise": 0.2, "unassigned": 0.2}, 3 * 0.04 + 0.2 * 0.73),  # not assigned: the measures count for less, too
    ({"largest": 0.75}, 3 * 0.25),  # half way from 0.5 to 1, squared
])  # fmt: skip
def test_each_penalty(values, penalty):
    best = {"cosine": 0.8, "silhouette": 0.4, "cross": 0.2}
    assert score(**best) - score(**{**best, **values}) == pytest.approx(penalty)


def test_throwing_points_away_never_wins():
    plain = score(0.9, 0.3, 0.2, noise=0.05, unassigned=0.05)
    for share, gain in [(0.2, 0.1), (0.4, 0.2), (0.6, 0.4), (0.9, 0.6)]:
        thrown = score(0.9 - gain, 0.3 + gain, max(0, 0.2 - gain), noise=share, unassigned=share)
        assert thrown < plain, share
    # Even a perfect rest does not pay for losing half of the images.
    assert score(0.0, 1.0, 0.0, noise=0.5, unassigned=0.5) < score(0.95, 0.25, 0.3) + 0.3
    assert score(0.0, 1.0, 0.0, noise=0.6, unassigned=0.6) < score(0.95, 0.25, 0.3)


def test_merging_everything_never_wins():
    plain = score(0.9, 0.3, 0.2)
    assert score(0.2, 0.9, 0.0, largest=0.95) < plain
    assert score(0.0, 0.9, 0.0, largest=0.9) < plain
    assert score(None, None, 0.0, largest=1.0) == least_score(WEIGHTS)  # a single cluster
    assert score(None, None, None, noise=1.0, unassigned=1.0, largest=0.0) == least_score(WEIGHTS)  # all noise


def test_two_clusters_however_bad_beat_none():
    extremes = itertools.product((-1.0, 1.0), (-1.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (0.0, 1.0), (0.0, 1.0), (0.0, 1.0))
    worst = min(
        score(cosine, silhouette, cross, reduced=reduced, noise=noise, unassigned=lost, largest=largest)
        for cosine, silhouette, cross, reduced, noise, lost, largest in extremes
    )
    assert worst > least_score(WEIGHTS)


def test_thresholds_at_the_ends_divide_by_nothing():
    ends = PuritySettings(max_centroid_cosine=1, min_silhouette=-1, max_nn_cross_ratio=1)
    metrics = {"max_centroid_cosine": 1.0, "silhouette": 0.0, "max_nn_cross_ratio": 1.0, "silhouette_reduced": -1.0,
               "noise_share": 0.0, "unassigned_share": 0.0, "largest_share": 0.5}  # fmt: skip
    assert score_of(metrics, WEIGHTS, ends) == 0.0
