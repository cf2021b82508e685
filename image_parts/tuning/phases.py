"""The loop of a search: propose, evaluate what is new, learn; until the budget is spent or nothing gets better.

result = run_phase(search, evaluator, plan)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from common.config import EngineSettings
from common.engine import map_items
from common.progress import Progress
from image_parts.scan import n_workers_of
from image_parts.settings import ImageSettings
from image_parts.tuning.evaluate import Evaluation, Job, evaluate
from image_parts.tuning.records import Records, iteration_dir, read_evaluation, write_evaluation
from image_parts.tuning.samples import SampleHandle, Samples, open_stages
from image_parts.tuning.search import Outcome, Proposal, Search
from image_parts.tuning.settings import TuningSettings
from image_parts.tuning.space import Choice, SearchSpace, UnfitChoice, choice_key
from image_parts.tuning.stages import candidate_key, embedding_key

log = logging.getLogger(__name__)

# Batches in a row without anything new after which there is nothing new to find.
_MAX_IDLE_BATCHES = 25
# Sizes are not scaled below this, unless they were smaller already.
_LEAST_SIZE = 5
# A better score by less than this is rounding.
_LEAST_GAIN = 1e-9
# A worker that takes longer over one embedding and its candidates is taken for dead.
_TASK_TIMEOUT_S = 24 * 3600.0


class SearchTimeout(Exception):
    """tuning.timeout_s is over."""


@dataclass(frozen=True)
class Phase:
    """What one phase may do."""

    number: int  # 1: on a sample, 2: on all images
    budget: int  # new evaluations
    fraction: float | None = None  # of the images; None: all


@dataclass
class PhaseResult:
    """What a phase found, in the order of its evaluations."""

    evaluations: list[Evaluation] = field(default_factory=list)
    n_proposed: int = 0
    n_reused: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # reason: how many proposals
    stopped: str = ""  # why it ended
    score_by_choice: dict[str, float] = field(default_factory=dict)  # by choice_key, reused ones too

    @property
    def is_finished(self) -> bool:
        """Whether it ended for good, and not by the clock."""
        return self.stopped != "timeout"

    def best(self) -> Evaluation | None:
        """The first among the best."""
        scored = [evaluation for evaluation in self.evaluations if evaluation.score is not None]
        return min(scored, key=rank_key) if scored else None


def rank_key(evaluation: Evaluation) -> tuple[float, int]:
    """Sorts the best first; among equals the one that was found first."""
    return (-(evaluation.score if evaluation.score is not None else float("-inf")), evaluation.iteration)


# --- Evaluation, here or in workers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Candidates of one embedding, which one process evaluates one after the other."""

    tuning_dir: str
    sample: SampleHandle
    jobs: tuple[Job, ...]


def run_task(task: Task) -> list[Evaluation]:
    """Evaluate the candidates of a task that are not on disk yet; each is on disk before the next begins."""
    tuning_dir, done = Path(task.tuning_dir), []
    stages, measures = open_stages(task.sample)
    for job in task.jobs:
        evaluation = _finished(tuning_dir, job)
        if evaluation is None:
            evaluation, report = evaluate(job, stages, measures)
            write_evaluation(tuning_dir, evaluation, report)
        done.append(evaluation)
    return done


def _finished(tuning_dir: Path, job: Job) -> Evaluation | None:
    """The evaluation of this very job, where a worker that died later had written it."""
    if not iteration_dir(tuning_dir, job.iteration).exists():
        return None
    found = read_evaluation(tuning_dir, job.iteration)
    return found if found is not None and (found.phase, found.key) == (job.phase, job.key) else None


def evaluate_jobs(
    jobs: Sequence[tuple[SampleHandle, Job]],
    *,
    tuning_dir: Path,
    n_jobs: int,
    on_done: Callable[[Evaluation], None],
) -> None:
    """Evaluate candidates, those of one embedding together."""
    groups: dict[tuple[SampleHandle, str], list[Job]] = {}
    for sample, job in jobs:
        groups.setdefault((sample, embedding_key(job.settings.reduction, sample.shape)), []).append(job)
    tasks = [Task(str(tuning_dir), sample, tuple(members)) for (sample, _), members in groups.items()]
    n_workers = min(n_workers_of(n_jobs), len(tasks))
    if n_workers <= 1:
        tasks = [replace(task, jobs=(job,)) for task in tasks for job in task.jobs]  # so that each is told at once

    def collect(task: Task, evaluations: list[Evaluation]) -> None:
        for evaluation in evaluations:
            on_done(evaluation)

    map_items(run_task, tasks, EngineSettings(n_jobs=max(1, n_workers), timeout_s=_TASK_TIMEOUT_S), on_result=collect)


# --- The loop --------------------------------------------------------------------------------------------------------


class PhaseRunner:
    """Runs one phase: the search proposes, this evaluates, counts and tells."""

    def __init__(
        self,
        search: Search,
        space: SearchSpace,
        phase: Phase,
        *,
        samples: Samples,
        records: Records,
        first_iteration: int,
        deadline: float | None,
        tell: Callable[[Evaluation, bool], None],
    ) -> None:
        self._search, self._space, self._phase = search, space, phase
        self._samples, self._records = samples, records
        self._first_iteration, self._deadline = first_iteration, deadline
        self._tell = tell
        self._iterations: dict[str, int] = {}  # key of a candidate: its iteration
        self._found: dict[int, Evaluation] = {}
        self.result = PhaseResult()

    @property
    def _tuning(self) -> TuningSettings:
        return self._space.base.tuning

    @property
    def _part(self) -> dict[str, float] | None:
        fraction = self._phase.fraction
        return None if fraction is None else {"fraction": fraction, "seed": self._tuning.seed}

    def run(self) -> PhaseResult:
        """Search until the budget is spent, the grid is through, nothing gets better, or time is over."""
        self._take_up()
        with Progress(
            self._phase.budget,
            label=f"phase {self._phase.number}",
            unit="evaluations",
            enabled=self._space.base.progress,
            done=len(self._iterations),
        ) as bar:
            while not (reason := self._why_stop()):
                proposals = self._search.propose()
                if not proposals:
                    reason = "every candidate was evaluated"
                    break
                try:
                    is_whole = self._evaluate_batch(proposals, bar)
                except SearchTimeout:
                    reason = "timeout"
                    break
                if not is_whole:
                    reason = "max_evaluations"
                    break
        self.result.stopped = reason
        self.result.evaluations = [self._found[iteration] for iteration in sorted(self._found)]
        return self.result

    def _take_up(self) -> None:
        """What the journal holds of an earlier run, with the evaluations that it speaks of."""
        for proposal, outcome in self._search.outcomes:
            self._count(proposal, outcome)
            if outcome.is_new and outcome.iteration is not None:
                evaluation = self._evaluation_of(proposal)
                self._iterations[evaluation.key] = outcome.iteration
                self._found[outcome.iteration] = evaluation
                self._tell(evaluation, True)

    def _evaluation_of(self, proposal: Proposal) -> Evaluation:
        _, job = self._job(proposal.choice, iteration=0)
        found = self._records.find(phase=self._phase.number, key=job.key)
        if found is None:
            raise JournalMismatch(f"trial {proposal.number} has no evaluation")
        return found

    def _evaluate_batch(self, proposals: Sequence[Proposal], bar: Progress) -> bool:
        """Evaluate what is new in a batch and tell the search; False where the budget ends within it."""
        planned = [self._plan(proposal.choice) for proposal in proposals]
        fresh: dict[str, tuple[SampleHandle, Job]] = {}
        for plan in planned:
            if isinstance(plan, tuple) and plan[1].key not in self._iterations:
                fresh.setdefault(plan[1].key, plan)
        n_left = self._phase.budget - len(self._iterations)
        keys = list(fresh)
        chosen = {key: self._first_iteration + len(self._iterations) + i for i, key in enumerate(keys[:n_left])}
        self._run_jobs([(fresh[key][0], replace(fresh[key][1], iteration=chosen[key])) for key in chosen], bar)
        self._iterations |= chosen
        if len(chosen) < len(keys):
            return False
        outcomes, told = [], set[str]()
        for plan in planned:
            outcomes.append(self._outcome(plan, is_new=isinstance(plan, tuple) and plan[1].key in chosen.keys() - told))
            told |= {plan[1].key} if isinstance(plan, tuple) else set()
        for proposal, outcome in zip(proposals, outcomes, strict=True):
            self._count(proposal, outcome)
        self._search.tell(proposals, outcomes)
        return True

    def _run_jobs(self, jobs: Sequence[tuple[SampleHandle, Job]], bar: Progress) -> None:
        todo = []
        for sample, job in jobs:
            known = self._records.find(phase=job.phase, key=job.key)
            if known is not None and known.iteration == job.iteration:
                self._keep(known, bar, is_reused=True)
            else:
                todo.append((sample, job))
        evaluate_jobs(
            todo,
            tuning_dir=self._records.tuning_dir,
            n_jobs=self._tuning.n_jobs,
            on_done=partial(self._keep, bar=bar, is_reused=False),
        )

    def _keep(self, evaluation: Evaluation, bar: Progress, *, is_reused: bool) -> None:
        self._records.add(evaluation)
        self._found[evaluation.iteration] = evaluation
        bar.update(1)
        self._tell(evaluation, is_reused)
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise SearchTimeout

    def _plan(self, choice: Choice) -> tuple[SampleHandle, Job] | UnfitChoice:
        try:
            return self._job(choice, iteration=0)
        except UnfitChoice as unfit:
            return unfit

    def _job(self, choice: Choice, *, iteration: int) -> tuple[SampleHandle, Job]:
        """The candidate of a choice; raises UnfitChoice where its values do not go together."""
        settings = self._space.settings_of(choice)
        if self._phase.fraction is not None:
            settings = scale_settings(settings, self._phase.fraction)
        sample = self._samples.of(settings)
        key = candidate_key(settings, sample.shape)
        return sample, Job(iteration, self._phase.number, key, choice, settings, self._part)

    def _outcome(self, plan: tuple[SampleHandle, Job] | UnfitChoice, *, is_new: bool) -> Outcome:
        if isinstance(plan, UnfitChoice):
            return Outcome(skipped=str(plan))
        iteration = self._iterations[plan[1].key]
        evaluation = self._found[iteration]
        return Outcome(evaluation.score, iteration, is_new, error=evaluation.error, labels=evaluation.labels_sha256)

    def _count(self, proposal: Proposal, outcome: Outcome) -> None:
        self.result.n_proposed += 1
        if outcome.score is not None:
            self.result.score_by_choice[choice_key(proposal.choice)] = outcome.score
        if outcome.skipped:
            self.result.skipped[outcome.skipped] = self.result.skipped.get(outcome.skipped, 0) + 1
        elif not outcome.is_new:
            self.result.n_reused += 1

    def _why_stop(self) -> str:
        n_done = len(self._iterations)
        if n_done >= self._phase.budget:
            return "max_evaluations"
        if self._search.n_idle >= _MAX_IDLE_BATCHES:
            return "nothing new to evaluate"
        if self._tuning.early_stop_enabled and self._is_on_plateau():
            return "early stop"
        return ""

    def _is_on_plateau(self) -> bool:
        """No better score in the last generations of `population_size` new evaluations each."""
        scores = [
            outcome.score if outcome.score is not None else float("-inf")
            for _, outcome in self._search.outcomes
            if outcome.is_new
        ]
        n_patient = self._tuning.early_stop_patience_generations * self._tuning.population_size
        if len(scores) < self._tuning.early_stop_min_evaluations or len(scores) <= n_patient:
            return False
        return max(scores[-n_patient:]) <= max(scores[:-n_patient]) + _LEAST_GAIN


class JournalMismatch(Exception):
    """The journal speaks of evaluations that are not on disk."""


def scale_settings(settings: ImageSettings, fraction: float) -> ImageSettings:
    """Settings for a share of the images: sizes and neighbours times the share, the rest as it is."""
    clustering, reduction = settings.clustering, settings.reduction
    size = scale_size(clustering.min_cluster_size, fraction)
    changes: dict[str, dict[str, Any]] = {
        "clustering": {
            "min_cluster_size": size,
            "min_samples": min(size, max(1, round(clustering.min_samples * fraction))),
        },
        "reduction": {"umap_n_neighbors": scale_size(reduction.umap_n_neighbors, fraction)},
    }
    values = settings.model_dump()
    for section, keys in changes.items():
        values[section] |= keys
    return ImageSettings.model_validate(values)


def scale_size(size: int, fraction: float) -> int:
    """A number of images in a share of them, five at least where it was not less before."""
    return max(round(size * fraction), min(size, _LEAST_SIZE))
