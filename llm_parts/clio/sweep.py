"""Many clusterings of one set of vectors: a table, a choice, a picture, and whether local and classical scores agree.

    result = sweep_clusters(vectors, settings=settings, seed=7, true_labels=labels)
    settings = result.settings                     # those of the best
    write_sweep_plot(result, output_dir / "sweep.png")

Settings that share a UMAP or a tree of HDBSCAN share its making.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from common.config import ConfigError
from common.progress import Progress
from llm_parts.clio.algorithms import Space
from llm_parts.clio.base_clusters import cluster_space, measure_stability
from llm_parts.clio.measures import LOWER_IS_BETTER, as_row, better
from llm_parts.clio.vector_settings import VectorSettings

log = logging.getLogger(__name__)

LOCAL_SCORES = ("local_coherence", "coherence_gain")
CLASSICAL_SCORES = ("silhouette", "davies_bouldin", "calinski_harabasz")
_LABEL_SCORES = ("nmi", "ari", "acc")
_TOP_LEVEL = ("n_clusters", "hdbscan_min_cluster_size")
_WHOLE_NUMBERS = (
    "hdbscan_min_cluster_size", "hdbscan_min_samples", "dbscan_min_samples", "umap_n_neighbors", "umap_n_components",
)  # fmt: skip
# Keys that only one algorithm reads.
_READ_BY = {"n_clusters": "kmeans", "hdbscan": "hdbscan", "dbscan": "dbscan"}


@dataclass(frozen=True)
class SweepResult:
    """What was tried, and what is best."""

    rows: list[dict[str, Any]]  # one for each setting: the swept keys, then the scores
    keys: tuple[str, ...]  # the swept keys
    chosen: int  # number of the best row
    choose_by: str
    settings: VectorSettings  # of the best row
    correlations: list[dict[str, Any]]  # Spearman's rho of each local with each classical score, and n

    def table(self) -> list[dict[str, Any]]:
        """The rows for a report, the chosen one marked."""
        return [{**as_row(row), "chosen": i == self.chosen} for i, row in enumerate(self.rows)]

    @classmethod
    def of(cls, rows: list[dict[str, Any]], *, settings: VectorSettings) -> SweepResult:
        """The result of a sweep by `settings` that gave `rows`."""
        keys, choose_by = tuple(settings.sweep.grid), settings.sweep.choose_by
        chosen = _choose(rows, choose_by)
        best = changed_settings(settings, {key: rows[chosen][key] for key in keys})
        return cls(rows, keys, chosen, choose_by, best, correlate_scores(rows))


def sweep_clusters(
    vectors: np.ndarray,
    *,
    settings: VectorSettings,
    seed: int,
    true_labels: Sequence[object] | None = None,
    progress: bool = False,
) -> SweepResult:
    """Try all combinations of `settings.sweep.grid` on unit vectors [n, d], and choose by `settings.sweep.choose_by`.

    Equal scores go to the setting that was named first, and so does a sweep in which the score is defined nowhere.
    Raises ConfigError for a key that the algorithm does not read, a value out of range, or a choice by labels that are
    not there.
    """
    check_sweep(settings, has_labels=true_labels is not None)
    space, rows = Space(vectors, seed=seed), []
    tried = list(_combinations(settings))
    with Progress(len(tried), label="sweep", unit="settings", enabled=progress) as bar:
        for values, changed in tried:
            scores = dict(cluster_space(space, settings=changed, true_labels=true_labels).scores)
            if settings.sweep.choose_by == "stability":
                scores["stability"] = measure_stability(vectors, settings=changed, seed=seed)
            rows.append({**values, **scores})
            bar.update(1)
    result = SweepResult.of(rows, settings=settings)
    best = {key: rows[result.chosen][key] for key in result.keys}
    log.info("sweep: %s is best by %s", best, result.choose_by)
    return result


def check_sweep(settings: VectorSettings, *, has_labels: bool) -> None:
    """Refuse a sweep that cannot be made, before anything else is; raises ConfigError."""
    sweep, problems = settings.sweep, []
    if not sweep.grid:
        problems.append("grid: empty; name a key and its values, such as n_clusters: [20, 50]")
    for key in sweep.grid:
        reader = _READ_BY.get(key) or _READ_BY.get(key.partition("_")[0])
        if reader and reader != settings.algorithm:
            problems.append(f"grid.{key}: read by {reader} alone, but clio.algorithm is {settings.algorithm}")
        if key.startswith("umap_") and settings.clustering.space != "umap":
            problems.append(f"grid.{key}: needs clio.clustering.space: umap")
    if sweep.choose_by in _LABEL_SCORES and not has_labels:
        problems.append(f"choose_by: {sweep.choose_by} needs labels; set clio.label_column")
    if problems:
        raise ConfigError("\n".join(f"clio.sweep.{problem}" for problem in problems))
    for _ in _combinations(settings):  # each is validated
        pass


def changed_settings(settings: VectorSettings, values: dict[str, float]) -> VectorSettings:
    """The settings with other values of swept keys, validated anew; the class stays that of `settings`.

    Raises ConfigError for values out of range.
    """
    from pydantic import ValidationError

    given: dict[str, Any] = {name: getattr(settings, name) for name in type(settings).model_fields}
    inner = settings.clustering.model_dump()
    for key, value in values.items():
        (given if key in _TOP_LEVEL else inner)[key] = value
    try:
        return type(settings)(**{**given, "clustering": inner})
    except ValidationError as invalid:
        reason = str(invalid.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"clio.sweep.grid: {values} cannot be tried: {reason}") from None


def correlate_scores(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spearman's rho of each local with each classical score over the settings that have both.

    None where fewer than three have, or one of them does not vary. Davies-Bouldin, better when lower, counts as its
    negative, so that agreement is positive everywhere.
    """
    return [
        {"local": local, "classical": classical, **_correlation(rows, local, classical)}
        for local, classical in product(LOCAL_SCORES, CLASSICAL_SCORES)
    ]


def write_sweep_plot(result: SweepResult, path: str | Path) -> Path:
    """Draw the scores over the values of the first swept key as PNG, each scaled to 0..1, higher is better.

    Where several keys are swept, the score that chooses is drawn, one line for each setting of the others.
    """
    from common.figures import write_lines_png

    if len(result.keys) == 1:
        scores = [
            name for name in (*LOCAL_SCORES, *CLASSICAL_SCORES, *_LABEL_SCORES, "stability") if _varies(result, name)
        ]
        series = {name: _scaled(result, name) for name in scores}
        y_label = "score, scaled to 0..1, higher is better"
    else:
        series, y_label = _lines_of_choice(result), result.choose_by
    title = f"Sweep: {', '.join(f'{key} {result.rows[result.chosen][key]:g}' for key in result.keys)} is chosen"
    return write_lines_png(path, series, title=title, x_label=result.keys[0], y_label=y_label)


# --- The grid --------------------------------------------------------------------------------------------------------


def _combinations(settings: VectorSettings) -> Iterator[tuple[dict[str, float], VectorSettings]]:
    """The swept values of each combination, and the settings with them; raises ConfigError for values out of range."""
    grid = settings.sweep.grid
    for values in product(*grid.values()):
        named: dict[str, float] = {key: _as_number(key, value) for key, value in zip(grid, values, strict=True)}
        yield named, changed_settings(settings, named)


def _as_number(key: str, value: float) -> float:
    is_whole = float(value).is_integer() and (key in _WHOLE_NUMBERS or (key == "n_clusters" and value >= 1))
    return int(value) if is_whole else value


def _choose(rows: Sequence[dict[str, Any]], name: str) -> int:
    best = 0
    for number, row in enumerate(rows):
        if better(row[name], rows[best][name], name=name):
            best = number
    if math.isnan(rows[best][name]):
        log.warning("sweep: %s is defined for none of the %d settings; the first one is taken", name, len(rows))
    return best


# --- Correlation and picture -----------------------------------------------------------------------------------------


def _correlation(rows: Sequence[dict[str, Any]], local: str, classical: str) -> dict[str, Any]:
    pairs = np.array([[row[local], _oriented(row, classical)] for row in rows], float).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if len(pairs) < 3 or (np.ptp(pairs, axis=0) == 0).any():
        return {"spearman": None, "settings": len(pairs)}
    from scipy.stats import spearmanr

    return {"spearman": round(float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic), 4), "settings": len(pairs)}


def _oriented(row: dict[str, Any], name: str) -> float:
    """The score with the sign by which higher is better."""
    return -row[name] if name in LOWER_IS_BETTER else row[name]


def _varies(result: SweepResult, name: str) -> bool:
    values = [row[name] for row in result.rows if name in row and math.isfinite(row[name])]
    return len(set(values)) > 1


def _scaled(result: SweepResult, name: str) -> list[tuple[float, float]]:
    points = [(row[result.keys[0]], _oriented(row, name)) for row in result.rows if math.isfinite(row[name])]
    low, high = min(y for _, y in points), max(y for _, y in points)
    return sorted((x, (y - low) / (high - low)) for x, y in points)


def _lines_of_choice(result: SweepResult) -> dict[str, list[tuple[float, float]]]:
    first, *others = result.keys
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result.rows:
        if math.isfinite(row[result.choose_by]):
            name = ", ".join(f"{key} {row[key]:g}" for key in others)
            lines.setdefault(name, []).append((row[first], row[result.choose_by]))
    return {name: sorted(points) for name, points in lines.items()}
