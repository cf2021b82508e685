"""What to try next: Optuna's samplers, asked in batches, each a pure function of the seed and of what was found before.

    search = Search(space, settings.tuning, name="phase 2", journal_path=path)
    for proposals in iter(search.propose, []):
        search.tell(proposals, outcomes)

A sampler is made anew for every trial, seeded by the seed of the search and the number of the trial, so that no state
of a random generator has to survive a kill. A batch is proposed as a whole before its first score is known; how many
processes evaluate it changes nothing.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from image_parts.tuning.incumbents import Scored, cross_stages, step_from_best
from image_parts.tuning.journal import copy_trial, flush_journal, journal_study, open_journal
from image_parts.tuning.samplers import evolution_sampler, fresh, suggest_choice, to_params, tpe_sampler
from image_parts.tuning.settings import TuningSettings
from image_parts.tuning.space import Choice, SearchSpace, choice_key

if TYPE_CHECKING:
    import optuna

_GRID_BATCH = 64
# Proposals of the model that are made before it learns from the first of them.
_TPE_BATCH = 5
# Who proposes by turns once a population is evaluated; None is the sampler.
_TURNS = (None, cross_stages, cross_stages, step_from_best)
# Of the evaluations, those that look around at random before the best are followed. Where the best embedding goes with
# cuts of its own, a search that follows the first good cut from the start does not come by it.
_EXPLORED_SHARE = 1 / 3
_OUTCOME = "outcome"  # user attribute of a trial


@dataclass(frozen=True)
class Proposal:
    """A choice that the search wants to know the score of."""

    number: int  # of the trial
    choice: Choice


@dataclass(frozen=True)
class Outcome:
    """What became of a proposal: a score, or the reason why it has none."""

    score: float | None = None
    iteration: int | None = None  # of the evaluation, also where an earlier one was reused
    is_new: bool = False
    skipped: str | None = None  # why it was not evaluated
    error: str | None = None
    labels: str | None = None  # equal for equal clusters


class Search:
    """One phase of a search."""

    def __init__(
        self,
        space: SearchSpace,
        tuning: TuningSettings,
        *,
        name: str,
        journal_path: Path,
        n_evaluations: int,
        forced: Sequence[Choice] = (),
        only_forced: bool = False,
    ) -> None:
        """Take up what the journal holds; `forced` choices come first, and with them nothing is left to explore."""
        import optuna

        self._space, self._tuning, self._name = space, tuning, name
        self._forced, self._only_forced = list(forced), only_forced
        self._n_explored = 0 if forced else max(tuning.population_size, round(_EXPLORED_SHARE * n_evaluations))
        self._journal_path = journal_path
        self._stored = journal_study(open_journal(journal_path), name)
        self._study = optuna.create_study(direction="maximize")
        self._n_idle = 0  # batches in a row that brought nothing new
        self.outcomes: list[tuple[Proposal, Outcome]] = []
        self._asked: set[str] = set()  # keys of all choices that were proposed
        self._results: set[tuple[str | None, float | None]] = set()  # labels and scores that the sampler was told
        self._restore()

    @property
    def batch_size(self) -> int:
        """Trials that are proposed at once."""
        sizes = {"grid": _GRID_BATCH, "evolution": self._tuning.population_size, "tpe": _TPE_BATCH}
        return sizes[self._tuning.search_strategy]

    @property
    def n_idle(self) -> int:
        """Batches in a row that brought nothing new."""
        return self._n_idle

    def propose(self) -> list[Proposal]:
        """The next batch; empty where a grid has been gone through."""
        first = len(self.outcomes)
        n_trials = self.batch_size
        if self._only_forced:
            n_trials = min(n_trials, len(self._forced) - first)
        elif self._tuning.search_strategy == "grid":
            n_trials = min(n_trials, self._space.n_points - first)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's notes on options that are called experimental
            return [self._ask(first + offset) for offset in range(n_trials)]

    def tell(self, proposals: Sequence[Proposal], outcomes: Sequence[Outcome]) -> None:
        """Learn what became of a batch, and keep it in the journal."""
        import optuna

        # A sampler must not draw from its generator here, nor stop a loop that it does not run.
        self._study.sampler = optuna.samplers.RandomSampler(seed=0)
        n_stored = len(self._stored.get_trials(deepcopy=False))
        for proposal, outcome in zip(proposals, outcomes, strict=True):
            self._tell(proposal, outcome)
            if proposal.number >= n_stored:
                trial = self._study.get_trials(deepcopy=False)[proposal.number]
                self._stored.add_trial(copy_trial(trial))
        flush_journal(self._journal_path)
        self._note(proposals, outcomes)

    def _ask(self, number: int) -> Proposal:
        self._study.sampler = self._sampler(number)
        fixed = self._fixed_choice(number)
        if fixed is not None:
            self._study.enqueue_trial(to_params(fixed, self._space))
        choice = suggest_choice(self._study.ask(), self._space)
        self._asked.add(choice_key(choice))
        return Proposal(number, choice)

    def _fixed_choice(self, number: int) -> Choice | None:
        """A choice that the sampler is not asked for: the forced ones first, later those from the best, by turns."""
        if number < len(self._forced):
            return self._forced[number]
        if self._tuning.search_strategy == "grid" or number < max(self._n_explored, self._tuning.population_size):
            return None
        derive = _TURNS[number % len(_TURNS)]
        if derive is None:
            return None
        scored = [Scored(p.choice, o.score, o.labels) for p, o in self.outcomes if o.score is not None]
        seed = trial_seed(self._tuning.seed, self._name, number)
        return derive(scored, self._space, is_known=self._asked.__contains__, seed=seed)

    def _tell(self, proposal: Proposal, outcome: Outcome) -> None:
        from optuna.trial import TrialState

        trial_id = self._study.get_trials(deepcopy=False)[proposal.number]._trial_id
        storage = self._study._storage
        storage.set_trial_user_attr(trial_id, _OUTCOME, {k: v for k, v in outcome.__dict__.items() if v is not None})
        storage.set_trial_user_attr(trial_id, "choice", proposal.choice)
        if outcome.score is None:
            self._study.tell(proposal.number, state=TrialState.PRUNED if outcome.skipped else TrialState.FAIL)
        elif self._is_copy(outcome):
            self._study.tell(proposal.number, state=TrialState.FAIL)  # which no sampler looks at
        else:
            self._study.tell(proposal.number, outcome.score)
            self._results.add((outcome.labels, outcome.score))

    def _is_copy(self, outcome: Outcome) -> bool:
        """Whether equal clusters with an equal score were told before.

        Often a parameter changes nothing. Copies would fill a population, or what TPE takes for its best tenth, with
        one point many times over, and the search would stay there; so only the first of equals is told.
        """
        return not outcome.is_new or (outcome.labels is not None and (outcome.labels, outcome.score) in self._results)

    def _note(self, proposals: Sequence[Proposal], outcomes: Sequence[Outcome]) -> None:
        self.outcomes += zip(proposals, outcomes, strict=True)
        self._results |= {(outcome.labels, outcome.score) for outcome in outcomes if outcome.score is not None}
        self._n_idle = 0 if any(outcome.is_new for outcome in outcomes) else self._n_idle + 1

    def _restore(self) -> None:
        """Take up the whole batches of the journal; one that was cut short is proposed and told again."""
        trials = self._stored.get_trials(deepcopy=False)
        n_whole = len(trials) // self.batch_size * self.batch_size
        for first in range(0, n_whole, self.batch_size):
            batch = trials[first : first + self.batch_size]
            for trial in batch:
                self._study.add_trial(copy_trial(trial))
            proposals = [Proposal(trial.number, trial.user_attrs["choice"]) for trial in batch]
            self._asked |= {choice_key(proposal.choice) for proposal in proposals}
            self._note(proposals, [Outcome(**trial.user_attrs[_OUTCOME]) for trial in batch])

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        from optuna.samplers import RandomSampler

        strategy = self._tuning.search_strategy
        if strategy == "grid" and not self._only_forced:
            return self._grid
        seed = trial_seed(self._tuning.seed, self._name, number)
        if strategy == "grid":
            return RandomSampler(seed=seed)  # of forced choices, which leave nothing to draw
        sampler: optuna.samplers.BaseSampler
        population_size, rate = self._tuning.population_size, self._tuning.mutation_rate
        if number < self._n_explored or self._n_idle > 0:  # after an idle batch: one at random
            sampler = RandomSampler(seed=seed)
        elif strategy == "evolution":
            sampler = evolution_sampler(seed=seed, population_size=population_size, mutation_prob=rate)
        else:
            sampler = tpe_sampler(seed=seed, population_size=population_size)
        return fresh(sampler, self._space, is_known=self._asked.__contains__, seed=seed)

    @cached_property
    def _grid(self) -> optuna.samplers.GridSampler:
        from optuna.samplers import GridSampler

        return GridSampler(
            {
                parameter.name: list(range(len(parameter.values)) if parameter.is_numeric else parameter.values)
                for parameter in self._space.parameters
            },
            seed=self._tuning.seed,
        )


def trial_seed(seed: int, name: str, number: int) -> int:
    """The seed of one trial: 32 bits that differ for every trial, phase and seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}:{number}".encode()).digest()[:4], "big")
