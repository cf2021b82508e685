"""The one number that candidates are ranked by.

With c = max_centroid_cosine (0 where negative), s = silhouette and x = max_nn_cross_ratio, all in feature space, r =
the silhouette in the reduced space, u = the share of images that are in no cluster, h = the share that HDBSCAN called
noise and m = the share of the largest cluster:

    score = (1 - u) * (1.15 * (1 - c) + 0.75 * s + 0.25 * (1 - x))
            - 2.2 * over(c, max_centroid_cosine) - 1.5 * under(r, min_silhouette) - 1.0 * over(x, max_nn_cross_ratio)
            - 3.0 * h ** 2 - 3.0 * over(m, max_largest_share) ** 2

    over(v, t) = max(0, v - t) / (1 - t)          how far above the threshold, 1 at the worst
    under(v, t) = max(0, t - v) / (1 + t)         how far below

Points that are thrown away count in no measure, so what they bring there is taken by (1 - u) and by the penalty on
noise, which looks behind noise_handling; a cluster that swallows the others has fine measures, which the penalty on
dominance outweighs. Both are squared: a little costs next to nothing, a lot more than it can gain. Fewer than two
clusters are no clustering and get the least score that there is.
"""

from __future__ import annotations

from collections.abc import Mapping

from image_parts.settings import PuritySettings
from image_parts.tuning.settings import ScoreSettings


def score_of(metrics: Mapping[str, float | None], settings: ScoreSettings, thresholds: PuritySettings) -> float:
    """The score of the measures of one clustering; higher is better."""
    cosine, silhouette = metrics["max_centroid_cosine"], metrics["silhouette"]
    cross, reduced = metrics["max_nn_cross_ratio"], metrics["silhouette_reduced"]
    if cosine is None or silhouette is None or cross is None or reduced is None:
        return least_score(settings)
    unassigned, noise = metrics["unassigned_share"] or 0.0, metrics["noise_share"] or 0.0
    alike = max(0.0, cosine)
    quality = (
        settings.weight_centroid_cosine * (1 - alike)
        + settings.weight_silhouette * silhouette
        + settings.weight_cross_ratio * (1 - cross)
    )
    penalty = (
        settings.penalty_centroid_cosine * _over(alike, thresholds.max_centroid_cosine)
        + settings.penalty_silhouette * _under(reduced, thresholds.min_silhouette)
        + settings.penalty_cross_ratio * _over(cross, thresholds.max_nn_cross_ratio)
        + settings.penalty_noise * noise**2
        + settings.penalty_dominance * _over(metrics["largest_share"] or 0.0, settings.max_largest_share) ** 2
    )
    return (1 - unassigned) * quality - penalty


def least_score(settings: ScoreSettings) -> float:
    """Below every score that two clusters can get, however bad."""
    return -(
        1
        + settings.weight_silhouette
        + settings.penalty_centroid_cosine
        + settings.penalty_silhouette
        + settings.penalty_cross_ratio
        + settings.penalty_noise
        + settings.penalty_dominance
    )


def _over(value: float, threshold: float) -> float:
    return max(0.0, value - threshold) / (1 - threshold) if threshold < 1 else 0.0


def _under(value: float, threshold: float) -> float:
    return max(0.0, threshold - value) / (1 + threshold) if threshold > -1 else 0.0
