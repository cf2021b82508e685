"""What to try next: Optuna's samplers, asked in batches, each a pure function of the seed and of what was found before.

    search = Search(space, settings.tuning, study_name="phase 2", journal_path=path)
    for proposals in iter(search.propose, []): search.tell(proposals, outcomes)

A sampler is made anew for every trial, seeded by the seed of the search and the number of the trial, so that no state
of a random generator has to survive a kill. A batch is proposed as a whole before its first score is known; how many
processes evaluate it changes nothing.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_parts.tuning.journal import copy_trial, flush_journal, journal_study, open_journal
from image_parts.tuning.settings import TuningSettings
from image_parts.tuning.space import Choice, Parameter, SearchSpace

if TYPE_CHECKING:
    import optuna

_GRID_BATCH = 64
# Proposals of the model that are made before it learns from the first of them.
_TPE_BATCH = 5
_STEP = "step"  # user attributes of a trial
_OUTCOME = "outcome"


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


class Search:
    """One phase of a search."""

    def __init__(
        self,
        space: SearchSpace,
        tuning: TuningSettings,
        *,
        name: str,
        journal_path: Path,
        forced: Sequence[Choice] = (),
        only_forced: bool = False,
    ) -> None:
        import optuna

        self._space, self._tuning, self._name = space, tuning, name
        self._forced, self._only_forced = list(forced), only_forced
        self._journal_path = journal_path
        self._stored = journal_study(open_journal(journal_path), name)
        self._study = optuna.create_study(direction="maximize")
        self._n_idle = 0  # batches in a row that brought nothing new
        self.outcomes: list[tuple[Proposal, Outcome]] = []
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
        if number < len(self._forced):
            self._study.enqueue_trial(self._to_params(self._forced[number]))
        trial = self._study.ask()
        choice: Choice = {}
        for parameter in self._space.parameters:
            if self._space.matters(parameter.name, choice):
                choice[parameter.name] = _suggest(trial, parameter)
        return Proposal(number, choice)

    def _tell(self, proposal: Proposal, outcome: Outcome) -> None:
        from optuna.trial import TrialState

        trial_id = self._study.get_trials(deepcopy=False)[proposal.number]._trial_id
        storage = self._study._storage
        storage.set_trial_user_attr(trial_id, _OUTCOME, {k: v for k, v in outcome.__dict__.items() if v is not None})
        storage.set_trial_user_attr(trial_id, "choice", proposal.choice)
        # An evolution would fill its population with copies of one candidate; only the first of equals lives in it.
        is_copy = self._tuning.search_strategy == "evolution" and not outcome.is_new
        if outcome.score is not None and not is_copy:
            self._study.tell(proposal.number, outcome.score)
        else:
            state = TrialState.FAIL if outcome.error else TrialState.PRUNED
            self._study.tell(proposal.number, state=state)

    def _note(self, proposals: Sequence[Proposal], outcomes: Sequence[Outcome]) -> None:
        self.outcomes += zip(proposals, outcomes, strict=True)
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
            self._note(proposals, [Outcome(**trial.user_attrs[_OUTCOME]) for trial in batch])

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        from optuna.samplers import RandomSampler, TPESampler

        seed = trial_seed(self._tuning.seed, self._name, number)
        strategy, is_idle = self._tuning.search_strategy, self._n_idle > 0  # after an idle batch: one at random
        if strategy == "evolution":
            rate = 1.0 if is_idle else self._tuning.mutation_rate
            return _evolution(seed=seed, population_size=self._tuning.population_size, mutation_prob=rate)
        if strategy == "grid" and not self._only_forced:
            return self._grid
        if is_idle or self._only_forced:
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=_n_startup(self._tuning))

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

    def _to_params(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        return {
            parameter.name: parameter.values.index(choice[parameter.name])
            if parameter.is_numeric
            else choice[parameter.name]
            for parameter in self._space.parameters
            if parameter.name in choice
        }


def _evolution(**options: Any) -> optuna.samplers.BaseSampler:
    from optuna.samplers import NSGAIISampler

    class SteadyNsga(NSGAIISampler):
        """Parents in the order of trials: as Optuna reads them from its cache, but not as it first selects them."""

        def select_parent(self, study: optuna.Study, generation: int) -> list[optuna.trial.FrozenTrial]:
            return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)

    return SteadyNsga(**options)


def trial_seed(seed: int, name: str, number: int) -> int:
    """The seed of one trial: 32 bits that differ for every trial, phase and seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}:{number}".encode()).digest()[:4], "big")


def _n_startup(tuning: TuningSettings) -> int:
    """Trials at random before TPE's model takes over: with fewer it settles on what it met first."""
    return max(10, tuning.population_size)


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Any:
    """A value; numbers by their place in the list, so that near values are near to the sampler too."""
    if parameter.is_numeric:
        return parameter.values[trial.suggest_int(parameter.name, 0, len(parameter.values) - 1)]
    return trial.suggest_categorical(parameter.name, parameter.values)
