"""The pictures of a run: an interactive scatter, a grid of clusters, their sizes, and the preprocessing by example.

    draw_pictures(clustered, settings=settings, viz_dir=output_dir / "viz")

Drawn before any file is moved, from the images where the scan found them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import Stopwatch
from common.commit import make_folder
from common.figures import write_bars_png
from image_parts.decode import UnreadableImage, as_rgb, read_image
from image_parts.grids import caption, choose_grid, write_cluster_grid, write_comparison
from image_parts.preprocess import prepare_image
from image_parts.records import NOISE_NAME, ClusteredImages, ImageRecord
from image_parts.scatter_html import build_scatter, choose_points, write_scatter
from image_parts.settings import ImageSettings, PreprocessingSettings
from image_parts.sprites import load_thumbnails

log = logging.getLogger(__name__)

SCATTER_NAME = "interactive_scatter.html"
GRID_NAME = "cluster_grid.png"
SIZES_NAME = "cluster_sizes.png"
COMPARISON_NAME = "preprocessing_comparison.png"


@dataclass(frozen=True)
class Pictures:
    """What was drawn."""

    paths: list[Path]
    n_points: int  # in the scatter


def draw_pictures(
    clustered: ClusteredImages, *, settings: ImageSettings, viz_dir: Path, n_workers: int = 1
) -> Pictures:
    """Draw all pictures into `viz_dir`; each is written whole or not at all."""
    watch = Stopwatch()
    wanted = settings.visualization
    make_folder(viz_dir)
    points = choose_points(clustered, max_points=wanted.max_points)
    grid = choose_grid(clustered, n_samples=wanted.samples_per_cluster)
    # Those of the scatter first: they are a part of the thumbnails, and no copy of theirs.
    rows = np.concatenate([points, np.setdiff1d(np.concatenate([points, *grid.values()]), points)])
    thumbnails = load_thumbnails(
        [clustered.records[row] for row in rows],
        size=wanted.thumbnail_size,
        value_range=clustered.value_range,
        n_workers=n_workers,
        progress=settings.progress,
    )
    title = Path(settings.input_dir).name or "Images"
    page = build_scatter(clustered, points, thumbnails[: len(points)], title=title)
    paths = [
        write_scatter(page, viz_dir / SCATTER_NAME),
        write_cluster_grid(viz_dir / GRID_NAME, clustered, grid, dict(zip(rows.tolist(), thumbnails, strict=True))),
        draw_sizes(clustered, viz_dir / SIZES_NAME),
        draw_comparison(clustered, settings=settings, path=viz_dir / COMPARISON_NAME),
    ]
    log.info("pictures: %d points, %d pictures in %s, %.1f s", page.n_points, len(paths), viz_dir, watch.seconds)
    return Pictures(paths, page.n_points)


def draw_sizes(clustered: ClusteredImages, path: Path) -> Path:
    """Draw the number of images in each cluster, noise last."""
    sizes = dict(zip(clustered.cluster_names, clustered.cluster_sizes.tolist(), strict=True))
    if clustered.n_noise:
        sizes[NOISE_NAME] = clustered.n_noise
    title = f"{len(clustered.records):,} images in {clustered.n_clusters:,} clusters"
    return write_bars_png(path, sizes, title=title, x_label="" if len(sizes) <= 25 else "cluster", y_label="images")


def draw_comparison(clustered: ClusteredImages, *, settings: ImageSettings, path: Path) -> Path:
    """Draw some images as they are, equalised, and inverted: what the model sees of them."""
    preprocessing = settings.preprocessing
    samples, names = [], []
    for record in _spread(clustered, n_samples=settings.visualization.clahe_comparison_samples):
        try:
            pixels = read_image(record.path, value_range=clustered.value_range)
        except UnreadableImage as problem:
            log.warning("not in the comparison: %s: %s", record.shown_path, problem)
            continue
        planes = prepare_image(pixels, preprocessing, image_size=settings.model.image_size)  # [p, s, s, c]
        stages = {"original": pixels, _name_of(preprocessing): _plane(planes[0])}
        if len(planes) > 1:
            stages["inverted"] = _plane(planes[1])
        samples.append(stages)
        names.append(caption(record))
    if not samples:
        samples, names = [{"original": np.full((8, 8, 3), 255, np.uint8)}], ["no image could be read"]
    return write_comparison(path, samples, names=names, subtitle=_describe(preprocessing, settings.model.image_size))


def _spread(clustered: ClusteredImages, *, n_samples: int) -> Sequence[ImageRecord]:
    """Images of as many clusters as possible, in the order of the clusters."""
    order = np.argsort(clustered.labels, kind="stable")
    places = np.linspace(0, len(order) - 1, min(n_samples, len(order))).astype(np.int64)
    return [clustered.records[row] for row in order[places]]


def _plane(pixels: np.ndarray) -> np.ndarray:
    """One polarity [s, s, 1 or 3] as RGB."""
    return as_rgb(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _name_of(preprocessing: PreprocessingSettings) -> str:
    return "equalised" if preprocessing.effective_equalization != "none" else "resized"


def _describe(preprocessing: PreprocessingSettings, image_size: int) -> str:
    kind = preprocessing.effective_equalization
    equalization = {
        "clahe": f"CLAHE, clip limit {preprocessing.clahe_clip_limit:g}, {preprocessing.clahe_grid_size} x "
        f"{preprocessing.clahe_grid_size} tiles",
        "he": "histogram equalisation",
        "none": "no equalisation",
    }[kind]
    return f"{image_size} x {image_size} pixels, {preprocessing.resize}; {equalization}"
