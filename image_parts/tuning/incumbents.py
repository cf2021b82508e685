"""New candidates from the best that are known: crossed where the stages meet, or one step away.

A good cut is often good on other embeddings too, and embeddings differ by chance more than by their values, so that no
step from one to the next leads to the best of them. Both halves of a crossing have been evaluated, so its embedding is
there already: it costs milliseconds, where a new embedding costs seconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

from image_parts.tuning.space import Choice, SearchSpace, choice_key

# How far down the ranking something new is sought, and how much less likely each is drawn than the one above it. Never
# the best alone: it may be the best only among what was met, and keep the search from what goes with other cuts.
_N_BEST = 30
_FALL = 0.7

Ranked = TypeVar("Ranked")


class Scored(NamedTuple):
    """A candidate with its score."""

    choice: Choice
    score: float
    labels: str | None  # equal for equal clusters


def cross_stages(
    scored: Iterable[Scored], space: SearchSpace, *, is_known: Callable[[str], bool], seed: int
) -> Choice | None:
    """A cut of one of the best candidates on an embedding of another, drawn by the seed: the better, the likelier.

    None where the thirty best cuts leave nothing to try.
    """
    scored, draw = list(scored), random.Random(seed)
    embeddings = _distinct(_part(found.choice, of_cut=False) for found in scored)
    draw.shuffle(embeddings)
    ranked = sorted(scored, key=lambda found: -found.score)  # stable: the first of equals
    for cut in _likely_first(_distinct(_part(found.choice, of_cut=True) for found in ranked)[:_N_BEST], draw):
        for embedding in embeddings:
            crossed = space.complete({**cut, **embedding})
            if not is_known(choice_key(crossed)) and space.fits(crossed):
                return crossed
    return None


def step_from_best(
    scored: Iterable[Scored], space: SearchSpace, *, is_known: Callable[[str], bool], seed: int
) -> Choice | None:
    """A choice one step from one of the best candidates, drawn by the seed: the better, the likelier.

    None where all around the thirty best distinct clusterings is known.
    """
    draw = random.Random(seed)
    for found in _likely_first(best_clusterings(scored), draw):
        near = space.neighbors(found.choice)
        draw.shuffle(near)
        for choice in near:
            if not is_known(choice_key(choice)) and space.fits(choice):
                return choice
    return None


def best_clusterings(scored: Iterable[Scored]) -> list[Scored]:
    """The first candidates of the thirty best distinct clusterings, best first."""
    distinct: dict[tuple[str, float], Scored] = {}
    for number, found in enumerate(scored):
        distinct.setdefault((found.labels or str(number), found.score), found)
    return sorted(distinct.values(), key=lambda found: -found.score)[:_N_BEST]  # stable: the first of equals


def _likely_first(ranked: list[Ranked], draw: random.Random) -> list[Ranked]:
    """The same, best first, in an order by chance: each comes next with 0.7 of the likelihood of the one above it."""
    waits = [draw.expovariate(_FALL**rank) for rank in range(len(ranked))]
    return [ranked[rank] for rank in sorted(range(len(ranked)), key=waits.__getitem__)]


def _distinct(parts: Iterable[Choice]) -> list[Choice]:
    """Each of equal ones once, in the order in which they are first met."""
    distinct: dict[str, Choice] = {}
    for part in parts:
        distinct.setdefault(choice_key(part), part)
    return list(distinct.values())


def _part(choice: Mapping[str, object], *, of_cut: bool) -> Choice:
    return {name: value for name, value in choice.items() if name.startswith("clustering.") == of_cut}
