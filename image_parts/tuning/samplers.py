"""Optuna's samplers as the search uses them: each made anew for one trial, none proposing what is known already.

    study.sampler = fresh(tpe_sampler(seed=seed, population_size=20), space, is_known=known.__contains__, seed=seed)
    trial = study.ask()
    choice = suggest_choice(trial, space)

Optuna's samplers repeat themselves: on a grid of few values a model that has found a good point proposes it over and
over. `FreshSampler` moves such a proposal to the nearest choice that is not known, which searches around what the model
holds to be good instead of throwing the proposal away.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from image_parts.tuning.space import Choice, Parameter, SearchSpace, choice_key

if TYPE_CHECKING:
    import optuna

# Steps, each of one parameter, that a known proposal is moved at most: what is further is no neighbour of it any more.
_MAX_STEPS = 3


def evolution_sampler(*, seed: int, population_size: int, mutation_prob: float) -> optuna.samplers.BaseSampler:
    """NSGA-II for one objective: it keeps the best, crosses and mutates."""
    from optuna.samplers import NSGAIISampler

    class SteadyNsga(NSGAIISampler):
        """Parents in the order of trials: as Optuna reads them from its cache, but not as it first selects them."""

        def select_parent(self, study: optuna.Study, generation: int) -> list[optuna.trial.FrozenTrial]:
            return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)

    return SteadyNsga(seed=seed, population_size=population_size, mutation_prob=mutation_prob)


def tpe_sampler(*, seed: int, population_size: int) -> optuna.samplers.BaseSampler:
    """TPE over all parameters jointly, after a population at random: with fewer it settles on what it met first."""
    from optuna.samplers import TPESampler

    return TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=max(10, population_size))


def fresh(
    inner: optuna.samplers.BaseSampler, space: SearchSpace, *, is_known: Callable[[str], bool], seed: int
) -> optuna.samplers.BaseSampler:
    """The sampler `inner`, whose proposals are moved to the nearest choice whose key is not known."""
    import optuna

    class FreshSampler(optuna.samplers.BaseSampler):
        """Asks `inner` for a whole choice, so that it can be looked at before the trial takes it."""

        def reseed_rng(self) -> None:
            inner.reseed_rng()

        def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            inner.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {parameter.name: distribution_of(parameter) for parameter in space.parameters}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            proposed = inner.sample_relative(study, trial, inner.infer_relative_search_space(study, trial))
            choice: Choice = {}
            for parameter in space.parameters:
                if space.matters(parameter.name, choice):
                    choice[parameter.name] = from_param(
                        parameter,
                        proposed[parameter.name]
                        if parameter.name in proposed
                        else self.sample_independent(study, trial, parameter.name, search_space[parameter.name]),
                    )
            return to_params(move_to_unknown(choice, space, is_known=is_known, seed=seed), space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return inner.sample_independent(study, trial, param_name, param_distribution)

    return FreshSampler()


def move_to_unknown(choice: Choice, space: SearchSpace, *, is_known: Callable[[str], bool], seed: int) -> Choice:
    """The choice itself if it is not known, or one of the fewest steps away that is not; itself if there is none.

    Among equally near ones it is drawn by the seed; those that do not fit together are passed over.
    """
    if not is_known(choice_key(choice)):
        return choice
    ring, seen = [choice], {choice_key(choice)}
    for _ in range(_MAX_STEPS):
        further = {choice_key(found): found for near in ring for found in space.neighbors(near)}
        ring = [found for key, found in further.items() if key not in seen]
        seen |= further.keys()
        unknown = [found for found in ring if not is_known(choice_key(found)) and space.fits(found)]
        if unknown:
            return random.Random(seed).choice(unknown)
    return choice


# --- Choices as Optuna's parameters ----------------------------------------------------------------------------------


def distribution_of(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    """Numbers by their place in the list, so that near values are near to the sampler too."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if parameter.is_numeric:
        return IntDistribution(0, len(parameter.values) - 1)
    return CategoricalDistribution(parameter.values)


def suggest_choice(trial: optuna.Trial, space: SearchSpace) -> Choice:
    """Ask a trial for a value of every parameter that matters."""
    choice: Choice = {}
    for parameter in space.parameters:
        if space.matters(parameter.name, choice):
            choice[parameter.name] = _suggest(trial, parameter)
    return choice


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Any:
    if parameter.is_numeric:
        return parameter.values[trial.suggest_int(parameter.name, 0, len(parameter.values) - 1)]
    return trial.suggest_categorical(parameter.name, parameter.values)


def from_param(parameter: Parameter, value: Any) -> Any:
    """The value that one of Optuna's means."""
    return parameter.values[value] if parameter.is_numeric else value


def to_params(choice: Mapping[str, Any], space: SearchSpace) -> dict[str, Any]:
    """A choice as Optuna's parameters."""
    return {
        parameter.name: parameter.values.index(choice[parameter.name])
        if parameter.is_numeric
        else choice[parameter.name]
        for parameter in space.parameters
        if parameter.name in choice
    }
