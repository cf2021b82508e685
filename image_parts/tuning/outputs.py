"""What a tuning run leaves: a table of all evaluations, a summary, and configs that image_cluster.py runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.commit import make_folder, sync_folder, write_bytes, write_json
from common.config import settings_to_yaml
from common.outputs import library_versions
from image_parts.settings import ImageSettings
from image_parts.tuning.evaluate import METRICS, Evaluation
from image_parts.tuning.space import SearchSpace
from image_parts.tuning.stability import Stability
from image_parts.tuning.tuner import SearchResult

SUMMARY = "tuning_summary_latest.json"
RESULTS = "tuning_results_all.csv"
BEST = "best.yaml"
TOP_CONFIGS = "top_configs"
TOP = "top"
_N_TOP = 20
# Sections whose keys every row of the table holds.
_TABLE_SECTIONS = ("model", "preprocessing", "reduction", "clustering", "purity")


def write_results(result: SearchResult, *, output_dir: Path) -> None:
    """Write tuning_results_all.csv: one row for each evaluation, with all settings that it ran with."""
    names = [
        f"{section}.{key}"
        for section in _TABLE_SECTIONS
        for key in type(getattr(ImageSettings(), section)).model_fields
    ]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["iteration", "phase", "score", "verdict", *METRICS, "error", "labels_sha256", *names])
    for found in result.evaluations:
        settings = {f"{s}.{k}": value for s in _TABLE_SECTIONS for k, value in found.settings[s].items()}
        measures = [found.metrics.get(name) for name in METRICS]
        head = [found.iteration, found.phase, found.score, found.verdict, *measures, found.error, found.labels_sha256]
        writer.writerow(_cell(value) for value in [*head, *(settings[name] for name in names)])
    write_bytes(output_dir / RESULTS, text.getvalue().encode())


def write_configs(ranking: Sequence[Evaluation], space: SearchSpace, *, output_dir: Path) -> list[Path]:
    """Write best.yaml and top_configs/, replacing those of an earlier run; returns the paths, best first."""
    folder = make_folder(output_dir / TOP_CONFIGS)
    for old in folder.glob("rank_*.yaml"):
        old.unlink()
    paths = []
    for rank, found in enumerate(ranking[:_N_TOP], start=1):
        name = f"rank_{rank:02d}"
        settings = runnable_settings(space.settings_of(found.choice), output_dir / TOP / name)
        paths.append(folder / f"{name}.yaml")
        write_bytes(paths[-1], settings_to_yaml(settings).encode())
    if ranking:
        settings = runnable_settings(space.settings_of(ranking[0].choice), output_dir / "best")
        write_bytes(output_dir / BEST, settings_to_yaml(settings).encode())
    else:
        (output_dir / BEST).unlink(missing_ok=True)
    sync_folder(output_dir)
    return paths


def runnable_settings(settings: ImageSettings, output_dir: Path) -> ImageSettings:
    """Settings that run from any folder: absolute paths, and an output folder of their own."""
    values = settings.model_dump()
    values["input_dir"] = str(Path(settings.input_dir).expanduser().resolve())
    values["output_dir"] = str(output_dir)
    values["cache"]["cache_dir"] = str(Path(settings.cache.cache_dir).expanduser().resolve())
    truth = settings.purity.truth
    if truth is not None and Path(truth).expanduser().is_file():
        values["purity"]["truth"] = str(Path(truth).expanduser().resolve())
    if Path(settings.model.name).is_dir():
        values["model"]["name"] = str(Path(settings.model.name).resolve())
    return ImageSettings.model_validate(values)


def summarize(
    result: SearchResult,
    stability: Mapping[int, Stability],
    space: SearchSpace,
    *,
    identity: Mapping[str, Any],
    importances: Mapping[str, float],
    truth: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of tuning_summary_latest.json."""
    ranking = result.ranking
    return {
        "complete": result.whole.is_finished,
        "best": describe(ranking[0], stability) if ranking else None,
        "top": [{"rank": rank, **describe(found, stability)} for rank, found in enumerate(ranking[:_N_TOP], start=1)],
        "n_evaluations": len(result.evaluations),
        "n_failed": sum(found.error is not None for found in result.evaluations),
        "n_passed": sum(found.verdict == "PASS" for found in result.whole.evaluations),
        "n_points": space.n_points,
        "phases": [_describe_phase(phase) for phase in (result.sample, result.whole) if phase is not None],
        "rank_correlation": result.rank_correlation,
        "rank_correlation_pairs": result.n_pairs,
        "importances": dict(importances),
        "truth": truth,
        "settings": space.base.model_dump(mode="json"),
        "versions": library_versions() | _tuning_versions(),
        "identity": dict(identity),
    }


def describe(found: Evaluation, stability: Mapping[int, Stability]) -> dict[str, Any]:
    """One candidate in the ranking."""
    repeated = stability.get(found.iteration)
    return {
        "iteration": found.iteration,
        "score": found.score,
        "verdict": found.verdict,
        "reasons": found.reasons,
        "metrics": found.metrics,
        "choice": found.choice,
        "labels_sha256": found.labels_sha256,
        "stability": repeated.to_dict() if repeated else None,
    }


def write_summary(summary: Mapping[str, Any], *, output_dir: Path) -> None:
    """Write tuning_summary_latest.json, the last file of a run."""
    write_json(output_dir / SUMMARY, summary)


def _describe_phase(phase: Any) -> dict[str, Any]:
    return {
        "phase": phase.evaluations[0].phase if phase.evaluations else None,
        "n_evaluations": len(phase.evaluations),
        "n_proposed": phase.n_proposed,
        "n_reused": phase.n_reused,
        "n_skipped": sum(phase.skipped.values()),
        "skipped": phase.skipped,
        "stopped": phase.stopped,
    }


def _tuning_versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("umap-learn", "hdbscan", "optuna")}


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else value
