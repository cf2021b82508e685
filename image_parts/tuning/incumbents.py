"""New candidates from the best that are known: crossed where the stages meet, or one step away.

A good cut is often good on other embeddings too, and embeddings differ by chance more than by their values, so that no
step from one to the next leads to the best of them. Both halves of a crossing have been evaluated, so its embedding is
there already: it costs milliseconds, where a new embedding costs seconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from image_parts.tuning.space import Choice, SearchSpace, choice_key

# How far down the ranking of distinct clusterings something new is sought.
_N_BEST = 10


class Scored(NamedTuple):
    """A candidate with its score."""

    choice: Choice
    score: float
    labels: str | None  # equal for equal clusters


def cross_stages(
    scored: Iterable[Scored], space: SearchSpace, *, is_known: Callable[[str], bool], seed: int
) -> Choice | None:
    """The cut of the best candidate on an embedding of another, drawn by the seed; where all are known the next best's.

    None where the ten best distinct clusterings leave nothing to try.
    """
    scored = list(scored)
    embeddings = {choice_key(part): part for part in (_part(found.choice, of_cut=False) for found in scored)}
    drawn = list(embeddings.values())
    random.Random(seed).shuffle(drawn)
    for found in best_clusterings(scored):
        cut = _part(found.choice, of_cut=True)
        for embedding in drawn:
            crossed = space.complete({**cut, **embedding})
            if not is_known(choice_key(crossed)) and space.fits(crossed):
                return crossed
    return None


def step_from_best(
    scored: Iterable[Scored], space: SearchSpace, *, is_known: Callable[[str], bool], seed: int
) -> Choice | None:
    """A choice one step from the best candidate, drawn by the seed; where all are known, from the next best.

    None where those of the ten best distinct clusterings are all known.
    """
    for found in best_clusterings(scored):
        drawn = space.neighbors(found.choice)
        random.Random(seed).shuffle(drawn)
        for choice in drawn:
            if not is_known(choice_key(choice)) and space.fits(choice):
                return choice
    return None


def best_clusterings(scored: Iterable[Scored]) -> list[Scored]:
    """The first candidates of the ten best distinct clusterings, best first."""
    distinct: dict[tuple[str, float], Scored] = {}
    for number, found in enumerate(scored):
        distinct.setdefault((found.labels or str(number), found.score), found)
    return sorted(distinct.values(), key=lambda found: -found.score)[:_N_BEST]  # stable: the first of equals


def _part(choice: Mapping[str, object], *, of_cut: bool) -> Choice:
    return {name: value for name, value in choice.items() if name.startswith("clustering.") == of_cut}
