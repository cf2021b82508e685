"""The page and the pictures of a tuning run: progress, importance, parallel coordinates, Pareto front, ranking."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.charts import format_number, percent
from common.figures import write_bars_png, write_lines_png, write_parallel_png, write_points_png
from common.report import Column, Report
from image_parts.tuning.evaluate import Evaluation
from image_parts.tuning.samplers import distribution_of, to_params
from image_parts.tuning.space import SearchSpace
from image_parts.tuning.stability import Stability
from image_parts.tuning.tuner import SearchResult

REPORT = "tuning_report.html"
PLOTS = "plots"
_N_TABLE = 100
# Fewer evaluations than this say nothing about importance.
_MIN_FOR_IMPORTANCE = 10
_SEPARATION = "max_centroid_cosine"
_FORMULA = (
    "Weights on separation of centroids, silhouette and cross ratio, all in feature space and so comparable between "
    "candidates of the same features; soft penalties beyond the thresholds of purity, on noise, and on a single "
    "dominant cluster. docs/iterative_tuning.md has the formula."
)


def parameter_importances(evaluations: Sequence[Evaluation], space: SearchSpace) -> dict[str, float]:
    """How much each parameter decides about the score (PED-ANOVA), largest first; empty where too little is known."""
    import optuna

    scored = [found for found in evaluations if found.score is not None]
    if len(scored) < _MIN_FOR_IMPORTANCE:
        return {}
    study = optuna.create_study(direction="maximize")
    for found in scored:
        study.add_trial(_as_trial(found, space))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is called experimental
        found_importances = optuna.importance.get_param_importances(study)
    return {name: float(value) for name, value in found_importances.items()}


def draw_plots(result: SearchResult, space: SearchSpace, importances: Mapping[str, float], *, folder: Path) -> None:
    """Draw progress.png, importance.png, parallel_coordinates.png and pareto.png."""
    scored = [found for found in result.whole.evaluations if found.score is not None]
    write_lines_png(
        folder / "progress.png",
        progress_series(result),
        title="Best score so far",
        x_label="evaluations",
        y_label="score",
    )
    write_bars_png(folder / "importance.png", _by_key(importances), title="Importance for the score", y_label="share")
    draw_parallel(scored, space, folder / "parallel_coordinates.png")
    draw_pareto(scored, folder / "pareto.png")


def draw_parallel(scored: Sequence[Evaluation], space: SearchSpace, path: Path) -> Path:
    """One line for each candidate through its values."""
    places = [
        [
            _place(parameter.values.index(found.choice[parameter.name]), len(parameter.values))
            if parameter.name in found.choice
            else float("nan")
            for parameter in space.parameters
        ]
        for found in scored
    ]
    return write_parallel_png(
        path,
        [parameter.name.partition(".")[2] for parameter in space.parameters],
        [[str(value) for value in parameter.values] for parameter in space.parameters],
        places,
        values=_shares_worse([_score(found) for found in scored]),  # a few bad scores would leave the rest one colour
        title="Candidates by their values",
        value_label="share of candidates with a lower score",
    )


def draw_pareto(scored: Sequence[Evaluation], path: Path) -> Path:
    """Separation of centroids against silhouette, and the candidates that no other beats in both."""
    known = [
        found for found in scored if found.metrics[_SEPARATION] is not None and found.metrics["silhouette"] is not None
    ]
    points = [(1 - float(found.metrics[_SEPARATION] or 0), float(found.metrics["silhouette"] or 0)) for found in known]
    return write_points_png(
        path,
        points,
        values=[_score(found) for found in known],
        front=pareto_front(points),
        title="Separation against silhouette",
        x_label="1 - max_centroid_cosine",
        y_label="silhouette",
        value_label="score",
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats or equals in one and beats in the other, by rising x; higher is better."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def progress_series(result: SearchResult) -> dict[str, list[tuple[float, float]]]:
    """The best score after each evaluation, by phase; a phase begins anew, as its scores are of other images."""
    series = {}
    for name, phase in (("phase 1, sample", result.sample), ("all images", result.whole)):
        if phase is None:
            continue
        steps: list[tuple[float, float]] = []
        for found in phase.evaluations:
            if found.score is not None and (not steps or found.score > steps[-1][1]):
                steps += [(float(found.iteration), steps[-1][1])] if steps else []
                steps.append((float(found.iteration), found.score))
        series[name] = [*steps, (float(phase.evaluations[-1].iteration), steps[-1][1])] if steps else []
    return series


def write_report(
    result: SearchResult,
    stability: Mapping[int, Stability],
    space: SearchSpace,
    summary: Mapping[str, Any],
    *,
    output_dir: Path,
) -> Path:
    """Write tuning_report.html, one file that works offline, and return its path."""
    ranking = result.ranking
    base = space.base
    report = Report("Tuning", f"{Path(base.input_dir).name} · {base.tuning.search_strategy}")
    report.add_facts(_facts(result, stability, summary))
    report.add_text(_story(result, stability, summary))
    report.add_lines("Progress", progress_series(result), x_label="evaluation", y_label="best score")
    if summary["importances"]:
        report.add_bars("Importance for the score", _by_key(summary["importances"]), as_percent=True,
                        note="Share of the differences in score that goes back to each key (PED-ANOVA).")  # fmt: skip
    folder = output_dir / PLOTS
    report.add_image((folder / "parallel_coordinates.png").read_bytes(), title="Candidates by their values",
                     alt="Parallel coordinates: one line for each candidate, coloured by score")  # fmt: skip
    report.add_image((folder / "pareto.png").read_bytes(), title="Separation against silhouette",
                     note="The line joins the candidates that no other beats in both.",
                     alt="Scatter of candidates with the Pareto front")  # fmt: skip
    rows = [_row(rank, found, stability) for rank, found in enumerate(ranking[:_N_TABLE], start=1)]
    details = [_details(found, stability) for found in ranking[:_N_TABLE]]
    title = f"The best {len(rows)} of {len(ranking):,}" if len(rows) < len(ranking) else "All candidates"
    report.add_table(title, _COLUMNS, rows, note=_FORMULA, details=details, details_title="Values")
    failed = [found for found in result.evaluations if found.error]
    if failed:
        errors = [[found.iteration, found.error, _values_text(found)] for found in failed]
        report.add_table("Failed", [Column("Iteration", "number"), Column("Error"), Column("Values")], errors)
    return report.write(output_dir / REPORT)


_COLUMNS = [
    Column("Rank", "number"),
    Column("Iteration", "number"),
    Column("Score", "number", 4),
    Column("Verdict", note="as image_cluster.py says with these settings"),
    Column("Seeds", note="whether other UMAP seeds give the same clusters"),
    Column("Mean ARI", "number", 3, "with other UMAP seeds"),
    Column("Least ARI", "number", 3, "with other UMAP seeds"),
    Column("Clusters", "number"),
    Column("Centroid cosine", "number", 3, "of the two most similar clusters"),
    Column("Silhouette", "number", 3, "by cosine, in feature space"),
    Column("Cross ratio", "number", 3, "of the worst cluster"),
    Column("Noise", "percent", note="images that HDBSCAN left out"),
    Column("Largest", "percent", note="share of the largest cluster"),
]


def _row(rank: int, found: Evaluation, stability: Mapping[int, Stability]) -> list[object]:
    metrics, repeated = found.metrics, stability.get(found.iteration)
    values = repeated.to_dict() if repeated else {}
    said = "" if repeated is None else "stable" if repeated.is_stable else "flipped"
    names = (_SEPARATION, "silhouette", "max_nn_cross_ratio", "noise_share", "largest_share")
    return [
        rank, found.iteration, found.score, found.verdict, said, values.get("mean_ari"), values.get("least_ari"),
        metrics["n_clusters"], *(metrics[name] for name in names),
    ]  # fmt: skip


def _details(found: Evaluation, stability: Mapping[int, Stability]) -> dict[str, list[str]]:
    shown = {"Values": [f"{name}: {value}" for name, value in found.choice.items()]}
    if found.reasons:
        shown["Why FAIL"] = found.reasons
    if repeated := stability.get(found.iteration):
        runs = zip(repeated.seeds, repeated.aris, repeated.scores, repeated.n_clusters, strict=True)
        shown["Other seeds"] = [
            f"seed {seed}: ARI {ari:.3f}, score {score:.4f}, {count} clusters" for seed, ari, score, count in runs
        ]
    return shown


def _facts(result: SearchResult, stability: Mapping[int, Stability], summary: Mapping[str, Any]) -> dict[str, object]:
    facts: dict[str, object] = {"Evaluations": summary["n_evaluations"], "Points in the space": summary["n_points"]}
    if result.ranking:
        best = result.ranking[0]
        facts |= {"Best score": _score(best), "Verdict": str(best.verdict), "Clusters": best.metrics["n_clusters"]}
        if repeated := stability.get(best.iteration):
            facts["Least ARI over seeds"] = min(repeated.aris)
    facts |= {"Passed": summary["n_passed"], "Failed": summary["n_failed"]}
    if result.rank_correlation is not None:
        facts["Rank correlation of phases"] = result.rank_correlation
    if truth := summary["truth"]:
        facts |= {"ACC, tuned": percent(truth["best"]["acc"]), "ACC before": percent(truth["base"]["acc"])}
    return facts


def _story(result: SearchResult, stability: Mapping[int, Stability], summary: Mapping[str, Any]) -> str:
    parts = []
    for phase in summary["phases"]:
        name = "Phase 1, on a sample" if phase["phase"] == 1 else "On all images"
        parts.append(
            f"{name}: {phase['n_evaluations']:,} evaluations; {phase['n_reused']:,} proposals were known already and "
            f"{phase['n_skipped']:,} had values that do not go together. It ended by: {phase['stopped']}."
        )
    if result.rank_correlation is not None:
        parts.append(
            f"The ranks of the {result.n_pairs} candidates that both phases saw correlate by "
            f"{result.rank_correlation:.2f} (Spearman): near 1, the sample was a good guide; near 0, it was none."
        )
    if result.ranking and (repeated := stability.get(result.ranking[0].iteration)) and not repeated.is_stable:
        parts.append(
            f"The best candidate is flipped by a seed: with another one its ARI falls to {min(repeated.aris):.2f}. "
            f"Prefer a stable one further down, or see whether the images have clear clusters at all."
        )
    return "\n\n".join(parts)


def _as_trial(found: Evaluation, space: SearchSpace) -> Any:
    import optuna

    params = to_params(found.choice, space)
    kinds = {parameter.name: distribution_of(parameter) for parameter in space.parameters if parameter.name in params}
    return optuna.trial.create_trial(value=_score(found), params=params, distributions=kinds)


def _by_key(importances: Mapping[str, float]) -> dict[str, float]:
    """Without the section, for which there is no room; no two sections that are tuned share a key."""
    return {name.partition(".")[2]: share for name, share in importances.items()}


def _shares_worse(scores: Sequence[float]) -> list[float]:
    """For each score the share of scores below it."""
    ordered = sorted(scores)
    return [bisect.bisect_left(ordered, score) / max(len(ordered) - 1, 1) for score in scores]


def _place(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 0.5


def _score(found: Evaluation) -> float:
    return float("-inf") if found.score is None else found.score


def _values_text(found: Evaluation) -> str:
    return ", ".join(
        f"{name}={format_number(value) if isinstance(value, float) else value}" for name, value in found.choice.items()
    )
