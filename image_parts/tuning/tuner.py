"""The whole search: one phase on all images, or one on a sample that leads to one on all.

found = search_candidates(space, scanned, records, backend=backend, stage_root=root, tell=console.tell)
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.backend import Backend
from common.config import UserError
from image_parts.scan import ScannedImages
from image_parts.tuning.evaluate import Evaluation
from image_parts.tuning.phases import (
    JournalMismatch,
    Phase,
    PhaseResult,
    PhaseRunner,
    rank_key,
    scale_size,
)
from image_parts.tuning.records import Records
from image_parts.tuning.samples import Samples
from image_parts.tuning.search import Search
from image_parts.tuning.space import Choice, SearchSpace, choice_key

log = logging.getLogger(__name__)

JOURNAL = "study.journal"

# Fewer pairs than this say nothing about a rank correlation.
_MIN_PAIRS = 3


@dataclass(frozen=True)
class SearchResult:
    """All evaluations of both phases, and how far phase 1 could be trusted."""

    sample: PhaseResult | None  # phase 1
    whole: PhaseResult  # phase 2, or the only one
    rank_correlation: float | None  # Spearman's, of the candidates that both phases saw
    n_pairs: int
    samples: Samples  # of all images

    @property
    def evaluations(self) -> list[Evaluation]:
        """Of both phases, in the order of iterations."""
        return [*(self.sample.evaluations if self.sample else []), *self.whole.evaluations]

    @property
    def ranking(self) -> list[Evaluation]:
        """The evaluations on all images that have a score, best first."""
        return sorted((found for found in self.whole.evaluations if found.score is not None), key=rank_key)


@dataclass(frozen=True)
class _Surroundings:
    space: SearchSpace
    scanned: ScannedImages
    records: Records
    backend: Backend
    stage_root: Path
    deadline: float | None
    tell: Callable[[Evaluation, bool], None]

    def samples(self, fraction: float | None) -> Samples:
        return Samples(
            self.scanned,
            self.stage_root,
            fraction=fraction,
            seed=self.space.base.tuning.seed,
            backend=self.backend,
            max_components=_largest(self.space, "reduction.pca_components"),
        )


def search_candidates(
    space: SearchSpace,
    scanned: ScannedImages,
    records: Records,
    *,
    backend: Backend,
    stage_root: Path,
    tell: Callable[[Evaluation, bool], None],
) -> SearchResult:
    """Search as the settings say; what an earlier run evaluated is taken up, and the end is the same.

    Raises UserError where a sample is too small to cluster, or where time is over before phase 2.
    """
    timeout_s = space.base.tuning.timeout_s
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    around = _Surroundings(space, scanned, records, backend, stage_root, deadline, tell)
    path = records.tuning_dir / JOURNAL
    try:
        return _search(around)
    except JournalMismatch as problem:
        log.warning("%s does not fit the evaluations that are there (%s); it is made anew from them", path, problem)
    except (ValueError, KeyError, TypeError) as damage:
        if not _is_damaged(path):
            raise
        log.warning("%s is damaged (%s); it is made anew from the evaluations that are there", path, damage)
    path.unlink()
    return _search(around)


def _search(around: _Surroundings) -> SearchResult:
    tuning = around.space.base.tuning
    if not tuning.two_phase_enabled:
        samples = around.samples(None)
        whole = _run(around, samples, Phase(2, tuning.max_evaluations), forced=(), n_before=0)
        return SearchResult(None, whole, None, 0, samples)
    sample = _search_sample(around)
    samples = around.samples(None)
    seeds = _best_choices(sample, tuning.phase2_top_k_seeds)
    is_grid = tuning.search_strategy == "grid"
    budget = max(1, tuning.max_evaluations - len(sample.evaluations))
    forced = spread(around.space, seeds, limit=budget, n_rounds=None if is_grid else 1)
    whole = _run(around, samples, Phase(2, budget), forced=forced, n_before=len(sample.evaluations))
    correlation, n_pairs = correlate(sample, whole)
    return SearchResult(sample, whole, correlation, n_pairs, samples)


def _search_sample(around: _Surroundings) -> PhaseResult:
    """Phase 1."""
    tuning = around.space.base.tuning
    samples = around.samples(tuning.phase1_fraction)
    shape = samples.of(around.space.base).shape
    check_fraction(around.space, n_distinct=shape[0])
    budget = max(1, min(round(tuning.max_evaluations * tuning.phase1_budget_ratio), tuning.max_evaluations - 1))
    log.info("phase 1: up to %d evaluations on %d distinct images", budget, shape[0])
    found = _run(around, samples, Phase(1, budget, tuning.phase1_fraction), forced=(), n_before=0)
    if not found.is_finished:
        raise UserError(
            f"tuning.timeout_s {tuning.timeout_s:g} was over in phase 1, after {len(found.evaluations)} evaluations; "
            f"start the same command again to go on"
        )
    if found.best() is None:
        errors = [evaluation.error for evaluation in found.evaluations if evaluation.error]
        why = errors[0] if errors else "no combination of the search space fits together"
        raise UserError(
            f"none of the {len(found.evaluations)} evaluations of phase 1 succeeded; the first error: {why}"
        )
    return found


def _run(
    around: _Surroundings,
    samples: Samples,
    phase: Phase,
    *,
    forced: Sequence[Choice],
    n_before: int,
) -> PhaseResult:
    tuning = around.space.base.tuning
    search = Search(
        around.space,
        tuning,
        name=f"phase {phase.number}",
        journal_path=around.records.tuning_dir / JOURNAL,
        n_evaluations=phase.budget,
        forced=forced,
        only_forced=bool(forced) and tuning.search_strategy == "grid",
    )
    runner = PhaseRunner(
        search,
        around.space,
        phase,
        samples=samples,
        records=around.records,
        first_iteration=n_before + 1,
        deadline=around.deadline,
        tell=around.tell,
    )
    result = runner.run()
    log.info(
        "phase %d: %d evaluations, %d proposals were known already, %d did not fit together; ended by: %s",
        phase.number, len(result.evaluations), result.n_reused, sum(result.skipped.values()), result.stopped,
    )  # fmt: skip
    return result


def spread(space: SearchSpace, seeds: Sequence[Choice], *, limit: int, n_rounds: int | None) -> list[Choice]:
    """The seeds, then their neighbours, then theirs, without repeats and misfits, up to `limit`."""
    found: dict[str, Choice] = {}
    ring = list(seeds)
    rounds = 0
    while ring:
        fresh = {choice_key(choice): choice for choice in ring if space.fits(choice)}
        new = [choice for key, choice in fresh.items() if key not in found]
        found |= fresh
        if len(found) >= limit or rounds == n_rounds:
            break
        ring = [neighbor for choice in new for neighbor in space.neighbors(choice)]
        rounds += 1
    return list(found.values())[:limit]


def correlate(sample: PhaseResult, whole: PhaseResult) -> tuple[float | None, int]:
    """Spearman's rank correlation of the scores of candidates that both phases saw, and how many those are."""
    shared = [key for key in whole.score_by_choice if key in sample.score_by_choice]
    if len(shared) < _MIN_PAIRS:
        return None, len(shared)
    from scipy.stats import rankdata

    left = rankdata([sample.score_by_choice[key] for key in shared])
    right = rankdata([whole.score_by_choice[key] for key in shared])
    spread_of_both = math.sqrt(float(((left - left.mean()) ** 2).sum() * ((right - right.mean()) ** 2).sum()))
    if spread_of_both == 0:
        return None, len(shared)
    return float(((left - left.mean()) * (right - right.mean())).sum()) / spread_of_both, len(shared)


def check_fraction(space: SearchSpace, *, n_distinct: int) -> None:
    """Raise UserError where the sample of phase 1 has fewer images than the candidates need."""
    fraction = space.base.tuning.phase1_fraction
    neighbors = scale_size(_largest(space, "reduction.umap_n_neighbors"), fraction)
    size = scale_size(_smallest(space, "clustering.min_cluster_size"), fraction)
    needed = max(neighbors + 1, 2 * size)
    if n_distinct < needed:
        raise UserError(
            f"tuning.phase1_fraction {fraction:g} leaves {n_distinct} distinct images, but {neighbors} neighbours and "
            f"clusters of {size} need {needed}; raise phase1_fraction, or set two_phase_enabled: false"
        )


def _best_choices(sample: PhaseResult, count: int) -> list[Choice]:
    scored = [found for found in sample.evaluations if found.score is not None]
    return [found.choice for found in sorted(scored, key=rank_key)[:count]]


def _values_of(space: SearchSpace, name: str) -> list[int]:
    section, _, key = name.partition(".")
    searched = [parameter.values for parameter in space.parameters if parameter.name == name]
    return list(searched[0]) if searched else [getattr(getattr(space.base, section), key)]


def _largest(space: SearchSpace, name: str) -> int:
    return max(_values_of(space, name))


def _smallest(space: SearchSpace, name: str) -> int:
    return min(_values_of(space, name))


def _is_damaged(path: Path) -> bool:
    """Whether a line of the journal is no JSON."""
    import json

    try:
        for line in path.read_bytes().splitlines():
            json.loads(line)
    except ValueError:
        return True
    return False
