"""After the search: the best drawn by the code of image_cluster.py, true labels, and an iteration reproduced."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.backend import Backend
from common.commit import atomic_file, save_array
from common.config import UserError
from image_parts.features import Features, extract_features
from image_parts.pipeline import ReducedFeatures, cluster_features, expand_to_images, place_in_space
from image_parts.purity import feature_neighbors, measure_purity
from image_parts.records import ClusteredImages
from image_parts.scan import ScannedImages, n_workers_of
from image_parts.settings import ImageSettings
from image_parts.tables import write_purity, write_tables
from image_parts.truth import compare_with_truth, read_truth
from image_parts.tuning.evaluate import Evaluation, labels_digest
from image_parts.tuning.outputs import TOP, runnable_settings
from image_parts.tuning.records import iteration_dir, require_evaluation
from image_parts.tuning.samples import Samples, open_stages, whole_sample
from image_parts.tuning.space import SearchSpace
from image_parts.tuning.stages import Sample
from image_parts.visualize import draw_pictures

log = logging.getLogger(__name__)

LABELS = "labels.npy"


@dataclass(frozen=True)
class Clustering:
    """Clusters of all images, computed as image_cluster.py computes them: nothing is shared with the search."""

    features: Features
    reduced: ReducedFeatures
    labels: np.ndarray  # [u] of distinct vectors
    clustered: ClusteredImages


def cluster_plainly(scanned: ScannedImages, settings: ImageSettings, *, backend: Backend) -> Clustering:
    """Cluster all images under settings, step by step as image_cluster.py does."""
    features = extract_features(scanned, settings, progress=False)
    reduced, assignment = cluster_features(features, settings, backend=backend)
    clustered = expand_to_images(features, assignment, place_in_space(reduced, settings, backend=backend))
    return Clustering(features, reduced, assignment.labels, clustered)


def draw_best(
    ranking: Sequence[Evaluation], space: SearchSpace, scanned: ScannedImages, *, backend: Backend, output_dir: Path
) -> list[Path]:
    """Draw the best candidates in full, each in a folder of its own with its tables and its purity report."""
    drawn = []
    for rank, found in enumerate(ranking[: space.base.tuning.generate_full_visuals_for_top_n], start=1):
        folder = output_dir / TOP / f"rank_{rank:02d}"
        settings = runnable_settings(space.settings_of(found.choice), folder)
        whole = cluster_plainly(scanned, settings, backend=backend)
        if labels_digest(whole.clustered.labels) != found.labels_sha256:
            log.warning("rank %d: clustered anew it has other labels than iteration %d", rank, found.iteration)
        _write_best(whole, settings, folder)
        drawn.append(folder)
    return drawn


def _write_best(whole: Clustering, settings: ImageSettings, folder: Path) -> None:
    neighbors = feature_neighbors(whole.features.vectors, settings.purity)
    report = measure_purity(
        whole.features.vectors,
        whole.reduced.embedding,
        whole.labels,
        settings.purity,
        image_sizes=whole.clustered.cluster_sizes,
        neighbors=neighbors,
    )
    write_purity(report, None, output_dir=folder)
    write_tables(whole.clustered, output_dir=folder)
    viz_dir = folder / settings.visualization.viz_dir
    draw_pictures(
        whole.clustered, settings=settings, viz_dir=viz_dir, n_workers=n_workers_of(settings.model.num_workers)
    )


def score_against_truth(
    best: Evaluation, space: SearchSpace, samples: Samples, scanned: ScannedImages, *, input_dir: Path
) -> dict[str, Any] | None:
    """Scores of the best and of the base settings against true labels, which the search never saw; None without any."""
    base = space.base
    if base.purity.truth is None:
        return None
    scores = {}
    for name, settings in (("best", space.settings_of(best.choice)), ("base", base)):
        records = extract_features(scanned, settings, progress=False).records
        truth = read_truth(records, base.purity.truth, input_dir=input_dir, image_subdir=base.annotations.image_subdir)
        stages, _ = open_stages(samples.of(settings))
        scores[name] = compare_with_truth(stages.cluster(settings).labels[stages.sample.rows], truth)
    return scores


def reproduce(tuning_dir: Path, iteration: int, scanned: ScannedImages, *, backend: Backend) -> dict[str, Any]:
    """Compute one iteration anew from its files, without anything that the search kept, and compare the labels.

    Writes labels.npy into its folder. Raises UserError where labels are others, or where there is no such iteration.
    """
    found = require_evaluation(tuning_dir, iteration)
    if found.labels_sha256 is None:
        raise UserError(f"iteration {iteration} failed, so it has no labels: {found.error}")
    settings = ImageSettings.model_validate(found.settings)
    features = extract_features(scanned, settings, progress=False)
    if found.sample is not None:
        part = whole_sample(features).take(found.sample["fraction"], seed=int(found.sample["seed"]))
        features = _features_of(part, features)
    _, assignment = cluster_features(features, settings, backend=backend)
    labels = assignment.labels[features.rows]
    path = iteration_dir(tuning_dir, iteration) / LABELS
    with atomic_file(path) as file:
        save_array(file, labels)
    if labels_digest(labels) != found.labels_sha256:
        raise UserError(
            f"iteration {iteration} gives other labels than it did: images, libraries or processor changed since; the "
            f"labels of now are in {path}"
        )
    n_clusters = int(labels.max(initial=-1)) + 1
    return {"iteration": iteration, "same_labels": True, "n_clusters": n_clusters, "labels": str(path)}


def _features_of(sample: Sample, features: Features) -> Features:
    return Features([], sample.rows, sample.vectors, [], features.value_range, features.n_cached, features.n_computed)
