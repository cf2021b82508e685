"""The section `tuning` of config.yaml. The file docs/iterative_tuning.md explains every key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from common.config import Section


class ScoreSettings(Section):
    """The weights of the one number that candidates are ranked by; image_parts/tuning/score.py has the formula."""

    weight_centroid_cosine: float = Field(1.15, ge=0, le=100, description="for clusters whose centroids differ")
    weight_silhouette: float = Field(0.75, ge=0, le=100, description="for images nearer to their own cluster")
    weight_cross_ratio: float = Field(0.25, ge=0, le=100, description="for neighbours in the same cluster")
    penalty_centroid_cosine: float = Field(2.2, ge=0, le=100, description="above purity.max_centroid_cosine")
    penalty_silhouette: float = Field(1.5, ge=0, le=100, description="below purity.min_silhouette")
    penalty_cross_ratio: float = Field(1.0, ge=0, le=100, description="above purity.max_nn_cross_ratio")
    penalty_noise: float = Field(3.0, ge=0, le=100, description="for images that HDBSCAN leaves out, squared")
    penalty_dominance: float = Field(3.0, ge=0, le=100, description="for a cluster above max_largest_share, squared")
    max_largest_share: float = Field(0.5, gt=0, lt=1, description="share of all images that one cluster may hold")


class TuningSettings(Section):
    """What is searched, how, and for how long."""

    search_strategy: Literal["grid", "evolution", "tpe"] = Field(
        "evolution", description="grid: every combination once; evolution: NSGA-II; tpe: a model of what scores well"
    )
    search_space: dict[str, tuple[Any, ...]] = Field({}, description="section.param: [values]")
    max_evaluations: int = Field(300, ge=1, description="candidates that are evaluated, both phases together")
    population_size: int = Field(20, ge=2, le=10_000, description="candidates of a generation")
    mutation_rate: float = Field(0.3, ge=0, le=1, description="evolution: chance that a parameter is drawn anew")
    seed: int = Field(42, ge=0, description="seed of the search and of the sample of phase 1")
    two_phase_enabled: bool = Field(False, description="search on a sample first, then on all images")
    phase1_fraction: float = Field(0.3, gt=0, lt=1, description="share of the images that phase 1 sees")
    phase1_budget_ratio: float = Field(0.6, gt=0, lt=1, description="share of max_evaluations for phase 1")
    phase2_top_k_seeds: int = Field(8, ge=1, description="best of phase 1 that phase 2 starts from")
    early_stop_enabled: bool = Field(False, description="end a phase that no longer finds anything better")
    early_stop_patience_generations: int = Field(5, ge=1, description="generations without a better score")
    early_stop_min_evaluations: int = Field(100, ge=1, description="evaluations of a phase before it may end early")
    stability_top_n: int = Field(5, ge=0, description="best candidates that are repeated with other UMAP seeds")
    stability_seeds: int = Field(3, ge=1, le=100, description="other seeds for each of them")
    stability_min_ari: float = Field(0.8, ge=0, le=1, description="below this ARI a candidate counts as unstable")
    generate_full_visuals_for_top_n: int = Field(1, ge=0, description="best candidates that are drawn in full")
    console_verbosity: Literal["full", "compact"] = Field("compact", description="full: a line for each evaluation")
    detailed_first_n_iters: int = Field(3, ge=0, description="first evaluations that are told in full all the same")
    timeout_s: float | None = Field(None, gt=0, description="seconds of search; started again, it goes on")
    n_jobs: int = Field(1, ge=-1, le=256, description="processes that evaluate; -1: one for each core")
    score: ScoreSettings = ScoreSettings()

    @field_validator("search_space", mode="before")
    @classmethod
    def _flatten(cls, value: Any) -> Any:
        """Accept `reduction.umap_components: [..]` and `reduction: {umap_components: [..]}` alike."""
        if not isinstance(value, Mapping):
            return value
        flat: dict[str, Any] = {}
        for name, inner in value.items():
            entries = {f"{name}.{key}": values for key, values in inner.items()} if isinstance(inner, Mapping) else None
            flat |= {str(name): inner} if entries is None else entries
        return {name: [values] if _is_single(values) else values for name, values in flat.items()}

    @field_validator("n_jobs")
    @classmethod
    def _refuse_no_process(cls, value: int) -> int:
        if value == 0:
            raise ValueError("0 processes do nothing; use 1, or -1 for one each core")
        return value


def _is_single(values: Any) -> bool:
    return isinstance(values, (str, int, float))
