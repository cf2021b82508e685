"""Sort a folder of images into clean clusters: features, PCA + UMAP, HDBSCAN, purity, pictures, sorted folders.

Reads a folder of images (and the YOLO labels beside them). Writes to output_dir: clusters.parquet and clusters.csv,
bad_images.csv, metrics/ with the purity report, viz/ with pictures, exports/ for other tools, and after a y/n question
the images, sorted into one folder for each cluster. Files are never overwritten; --undo puts every one back.

    python image_cluster.py --config config.yaml input_dir=photos output_dir=runs/photos
    python image_cluster.py --config config.yaml input_dir=photos output_dir=runs/photos --undo
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import cli
from common.backend import choose_backend
from common.cli import Stopwatch
from common.commit import OutputLock
from common.config import UserError
from common.mapped import return_freed_memory
from common.neighbors import Neighbors
from image_parts.exports import EXPORT_DIR, FIFTYONE_NAME, write_exports, write_fiftyone
from image_parts.extractors import identify_model
from image_parts.features import Features, extract_features
from image_parts.journal import Stage
from image_parts.organize import FileReport, find_stage, organize, resume, undo
from image_parts.pipeline import cluster_features, expand_to_images, place_in_space
from image_parts.planner import plan_files
from image_parts.purity import PurityReport, feature_neighbors, measure_purity
from image_parts.question import ask, can_ask, format_clusters
from image_parts.records import BadImage, ClusteredImages, ImageRecord
from image_parts.scan import ScannedImages, check_folders, list_images, n_workers_of, scan_images
from image_parts.settings import ImageSettings
from image_parts.tables import (
    begin_results,
    find_finished,
    identify_run,
    read_tables,
    write_bad_images,
    write_purity,
    write_run,
    write_tables,
)
from image_parts.truth import TrueLabels, compare_with_truth, read_truth
from image_parts.visualize import draw_pictures

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The clusters of a run, and what was said about them."""

    clustered: ClusteredImages
    bad: list[BadImage]
    truth: TrueLabels | None
    summary: dict[str, Any]


def check(settings: ImageSettings) -> dict[str, Any]:
    """Validate folders and model; returns the plan: how many images there are and what would be done with them."""
    input_dir, output_dir = check_folders(settings.input_dir, settings.output_dir)
    identity = identify_model(settings.model)
    n_images, n_bytes = list_images(input_dir, extensions=settings.image_extensions)
    return {
        "images": n_images,
        "bytes": n_bytes,
        "model": identity.cache_key(),
        "mode": settings.mode,
        "output_dir": str(output_dir),
        "file_stage": find_stage(output_dir),
    }


def run(
    settings: ImageSettings,
    *,
    overwrite: bool = False,
    yes: bool = False,
    resume_files: bool = False,
    undo_files: bool = False,
) -> dict[str, Any]:
    """Cluster the images, then sort the files if the user agrees; or finish or undo the sorting of an earlier run."""
    if undo_files or resume_files:
        return _finish_files(settings, forward=resume_files)
    watch = Stopwatch()
    input_dir, output_dir = check_folders(settings.input_dir, settings.output_dir)
    stage = _refuse_half_sorted(output_dir)
    with OutputLock(output_dir):
        if stage == "finished" and _moved_all(input_dir, settings):
            log.info("all images were moved by an earlier run; --undo puts them back")
            return {"output_dir": str(output_dir), "files": {"stage": "finished", "n_changed": 0}}
        identity = identify_model(settings.model)
        scanned = scan_images(
            input_dir,
            extensions=settings.image_extensions,
            cache_dir=Path(settings.cache.cache_dir) if settings.cache.enabled else None,
            n_workers=n_workers_of(settings.model.num_workers),
            progress=settings.progress,
        )
        run_identity = identify_run(scanned, settings, identity)
        finished = find_finished(output_dir, run_identity, overwrite=overwrite)
        outcome = _reuse(finished, scanned, settings, input_dir, output_dir) if finished else None
        if outcome is None:
            _refuse_sorted(stage, output_dir)
            outcome = _compute(scanned, settings, input_dir, output_dir)
            write_run(run_identity, outcome.summary, output_dir=output_dir, settings=settings)
        log.info("%d images in %d clusters:\n%s", len(outcome.clustered.records), outcome.clustered.n_clusters,
                 format_clusters(outcome.clustered))  # fmt: skip
        files = _sort_files(outcome, settings, input_dir, output_dir, yes=yes)
    log.info("done in %.1f s: %s", watch.seconds, output_dir)
    result = {"output_dir": str(output_dir), **outcome.summary, "files": files}
    if settings.purity.fail_on_fail and outcome.summary.get("verdict") == "FAIL":
        raise UserError(
            f"the purity verdict is FAIL: {'; '.join(outcome.summary['reasons'])}; see metrics/ in {output_dir}"
        )
    return result


@dataclass(frozen=True, eq=False)
class Found:
    """What is known of the images when they are clustered; the way there is not kept."""

    clustered: ClusteredImages
    pca: np.ndarray  # [u, p] float32
    neighbors: Neighbors | None  # of distinct images, by their features
    report: PurityReport | None


def _compute(scanned: ScannedImages, settings: ImageSettings, input_dir: Path, output_dir: Path) -> Outcome:
    """The whole way from images to tables, report, pictures and exports."""
    features = extract_features(scanned, settings, progress=settings.progress)
    return_freed_memory()
    truth = _truth(features.records, settings, input_dir)
    found = _cluster(features, settings)
    clustered = found.clustered
    scores = compare_with_truth(clustered.labels, truth) if truth else None
    if scores:
        log.info(
            "true labels: %s", ", ".join(f"{name} {_brief(scores[name])}" for name in ("acc", "nmi", "ari", "purity"))
        )

    begin_results(output_dir)
    if found.report:
        write_purity(found.report, scores, output_dir=output_dir)
    write_bad_images(features.bad, output_dir=output_dir)
    write_tables(clustered, output_dir=output_dir, truth=truth.labels if truth else None)
    return_freed_memory()
    if settings.visualization.enabled:
        viz_dir = output_dir / settings.visualization.viz_dir
        draw_pictures(clustered, settings=settings, viz_dir=viz_dir, n_workers=n_workers_of(settings.model.num_workers))
    write_exports(
        clustered, features=features, pca=found.pca, neighbors=found.neighbors, settings=settings, output_dir=output_dir
    )
    return Outcome(clustered, features.bad, truth, _summarize(features, clustered, found.report, scores))


def _cluster(features: Features, settings: ImageSettings) -> Found:
    """Reduce and cluster the features, and measure how pure the clusters are."""
    backend = choose_backend(settings.acceleration.backend)
    reduced, assignment = cluster_features(features, settings, backend=backend)
    clustered = expand_to_images(features, assignment, place_in_space(reduced, settings, backend=backend))
    return_freed_memory()
    neighbors = None
    if settings.purity.enabled or settings.exports.embedding_atlas:
        neighbors = feature_neighbors(features.vectors, settings.purity, device=backend.device)
    report = None
    if settings.purity.enabled and neighbors is not None:
        report = _measure(features, reduced.embedding, assignment.labels, clustered, neighbors, settings)
    return Found(clustered, reduced.pca, neighbors, report)


def _measure(
    features: Features,
    embedding: np.ndarray,
    labels: np.ndarray,
    clustered: ClusteredImages,
    neighbors: Neighbors,
    settings: ImageSettings,
) -> PurityReport:
    watch = Stopwatch()
    report = measure_purity(
        features.vectors,
        embedding,
        labels,
        settings.purity,
        image_sizes=clustered.cluster_sizes,
        neighbors=neighbors,
    )
    shown = ", ".join(f"{name} {_brief(report.metrics[name])}" for name in list(report.metrics)[:3])
    log.info("purity: %s (%s), %.1f s", report.verdict, shown, watch.seconds)
    for reason in report.reasons:
        log.info("purity: %s", reason)
    return report


def _truth(records: Sequence[ImageRecord], settings: ImageSettings, input_dir: Path) -> TrueLabels | None:
    if settings.purity.truth is None:
        return None
    subdir = settings.annotations.image_subdir
    return read_truth(records, settings.purity.truth, input_dir=input_dir, image_subdir=subdir)


def _summarize(
    features: Features, clustered: ClusteredImages, report: PurityReport | None, scores: dict[str, Any] | None
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "n_images": len(features.records),
        "n_distinct": len(features.vectors),
        "n_bad": len(features.bad),
        "n_clusters": clustered.n_clusters,
        "n_noise": clustered.n_noise,
    }
    if report:
        summary |= {"verdict": report.verdict, "reasons": report.reasons, "metrics": report.metrics}
    return summary | ({"truth": scores} if scores else {})


def _reuse(
    finished: dict[str, Any], scanned: ScannedImages, settings: ImageSettings, input_dir: Path, output_dir: Path
) -> Outcome | None:
    """The result of an earlier run of the same images and settings."""
    tables = read_tables(output_dir, scanned)
    if tables is None:
        return None
    clustered, undecoded = tables
    log.info("nothing changed since the last run: its clusters in %s are used again", output_dir)
    bad = [*scanned.bad, *(BadImage(record.path, record.relative_path, "cannot be decoded") for record in undecoded)]
    return Outcome(clustered, bad, _truth(clustered.records, settings, input_dir), finished["summary"])


# --- The files -------------------------------------------------------------------------------------------------------


def _sort_files(
    outcome: Outcome, settings: ImageSettings, input_dir: Path, output_dir: Path, *, yes: bool
) -> dict[str, Any]:
    """Ask, plan and sort; says what was done, or why nothing was."""
    if not yes and not can_ask():
        log.info("no terminal to ask on and no --yes: no file was touched")
        return {"stage": "none", "reason": "no terminal and no --yes"}
    verb = {"copy": "Copy", "move": "Move", "hardlink": "Hard-link", "symlink": "Link"}[settings.mode]
    if not yes and not ask(f"{verb} {len(outcome.clustered.records):,} images into cluster folders in {output_dir}?"):
        log.info("no file was touched")
        return {"stage": "none", "reason": "the answer was no"}
    plan = plan_files(
        outcome.clustered,
        input_dir=input_dir,
        output_dir=output_dir,
        mode=settings.mode,
        annotations=settings.annotations,
        other_images=[image.path for image in outcome.bad],
    )
    report = organize(plan, progress=settings.progress)
    truth = outcome.truth.labels if outcome.truth else None
    write_tables(outcome.clustered, output_dir=output_dir, truth=truth, targets=plan.image_targets)
    if settings.exports.fiftyone:
        path = output_dir / EXPORT_DIR / FIFTYONE_NAME
        write_fiftyone(outcome.clustered, path=path, targets=plan.image_targets, target_dir=output_dir)
    return _tell(report)


def _finish_files(settings: ImageSettings, *, forward: bool) -> dict[str, Any]:
    """`--resume` and `--undo` need nothing but the output folder: its plan knows the rest."""
    if not settings.output_dir:
        raise UserError("output_dir is empty; give the folder of the run whose files are meant")
    output_dir = Path(settings.output_dir).expanduser().resolve()
    if find_stage(output_dir) == "none":
        raise UserError(f"no files were sorted into {output_dir}: it holds no plan.jsonl; check output_dir")
    with OutputLock(output_dir):
        report = (resume if forward else undo)(output_dir, progress=settings.progress)
    if report.stage == "undoing":
        _tell(report)
        path, reason = report.skipped[0]
        what = "one file was" if len(report.skipped) == 1 else f"{len(report.skipped):,} files were"
        raise UserError(
            f"{what} not put back, the others were: {path}: {reason}; mend that for each (all are logged above) and "
            f"start --undo again"
        )
    return {"output_dir": str(output_dir), "files": _tell(report)}


def _refuse_half_sorted(output_dir: Path) -> Stage:
    stage = find_stage(output_dir)
    if stage in ("unfinished", "undoing"):
        remedy = "--resume finishes it, --undo takes it back" if stage == "unfinished" else "--undo finishes it"
        raise UserError(f"the files in {output_dir} are half sorted ({stage}); start again with one option: {remedy}")
    return stage


def _refuse_sorted(stage: Stage, output_dir: Path) -> None:
    """New clusters must not stand beside folders of old ones."""
    if stage == "finished":
        raise UserError(
            f"{output_dir} holds files that were sorted by another result; put them back with --undo, or choose "
            f"another output_dir"
        )


def _moved_all(input_dir: Path, settings: ImageSettings) -> bool:
    if settings.mode != "move":
        return False
    try:
        list_images(input_dir, extensions=settings.image_extensions)
    except UserError:
        return True
    return False


def _tell(report: FileReport) -> dict[str, Any]:
    log.info("files: %s", report.summary)
    for path, reason in report.skipped:
        log.warning("left where it is: %s: %s", path, reason)
    return report.to_dict() | {"skipped": len(report.skipped)}


def _brief(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this script takes on top of the arguments that all scripts share."""
    parser.add_argument("--yes", action="store_true", help="sort the files without asking")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--resume", dest="resume_files", action="store_true", help="finish sorting that was cut short")
    files.add_argument("--undo", dest="undo_files", action="store_true", help="put every sorted file back")


if __name__ == "__main__":
    sys.exit(
        cli.main(
            ImageSettings,
            run,
            doc=__doc__,
            section=None,
            check=check,
            add_arguments=add_arguments,
            default_config="config.yaml",
        )
    )
