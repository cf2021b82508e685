"""The search space: which keys of config.yaml are varied, over which values, and what a point of it means.

    space = read_space(settings)              # raises ConfigError with every mistake
    space.settings_of({"reduction.umap_components": 5})

A point is a choice: a mapping from `section.param` to a value. Parameters that cannot matter in it are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from common.config import ConfigError, Section, canonical_json, did_you_mean
from image_parts.settings import HOG, ImageSettings

Choice = dict[str, Any]

# Sections whose keys change clusters. Those of `purity` would move the goal, the others change no cluster.
TUNED_SECTIONS = ("model", "preprocessing", "reduction", "clustering")
# Keys of these sections that say how something is computed, not what.
_WITHOUT_EFFECT = ("model.batch_size", "model.device", "model.num_workers")
# Grid search holds the whole grid; more points than this are never gone through anyway.
MAX_GRID_POINTS = 100_000


def _uses_hog(values: Mapping[str, Any]) -> bool:
    return bool(values["model.name"] == HOG)


def _uses_clahe(values: Mapping[str, Any]) -> bool:
    return bool(values["preprocessing.clahe"] and values["preprocessing.equalization"] == "clahe")


# When a parameter matters, given the values of the others; those asked about come first in a choice.
_MATTERS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "model.hog_cells": _uses_hog,
    "model.hog_orientations": _uses_hog,
    "model.pooling": lambda values: not _uses_hog(values),
    "model.revision": lambda values: not _uses_hog(values),
    "model.dtype": lambda values: not _uses_hog(values),
    "preprocessing.equalization": lambda values: bool(values["preprocessing.clahe"]),
    "preprocessing.clahe_clip_limit": _uses_clahe,
    "preprocessing.clahe_grid_size": _uses_clahe,
}
_DECIDES = ("model.name", "preprocessing.clahe", "preprocessing.equalization")


class UnfitChoice(ValueError):
    """Values that are fine one by one, but not together."""


@dataclass(frozen=True)
class Parameter:
    """One key that is varied."""

    name: str  # section.param
    values: tuple[Any, ...]  # distinct; ascending where they are numbers

    @property
    def is_numeric(self) -> bool:
        """Whether the values have an order that a search can use."""
        return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in self.values)


@dataclass(frozen=True)
class SearchSpace:
    """All choices: every value of every parameter with every other, as far as they matter."""

    base: ImageSettings
    parameters: tuple[Parameter, ...]  # those that decide whether others matter come first

    @cached_property
    def n_points(self) -> int:
        """Combinations of all values, those that differ in nothing that matters counted too."""
        return math.prod(len(parameter.values) for parameter in self.parameters)

    def matters(self, name: str, choice: Mapping[str, Any]) -> bool:
        """Whether a parameter changes anything, given the ones that decide that."""
        condition = _MATTERS.get(name)
        return condition is None or condition({**self._base_values, **choice})

    def settings_of(self, choice: Mapping[str, Any]) -> ImageSettings:
        """The settings of a choice; raises UnfitChoice where its values do not go together."""
        values = self.base.model_dump()
        for name, value in choice.items():
            section, _, key = name.partition(".")
            values[section][key] = value
        try:
            return ImageSettings.model_validate(values)
        except ValidationError as problem:
            raise UnfitChoice(
                "; ".join(error["msg"].removeprefix("Value error, ") for error in problem.errors())
            ) from None

    def fits(self, choice: Mapping[str, Any]) -> bool:
        """Whether the values of a choice go together."""
        try:
            self.settings_of(choice)
        except UnfitChoice:
            return False
        return True

    def neighbors(self, choice: Mapping[str, Any]) -> list[Choice]:
        """The choices one step away: one parameter a value up or down, or any other value where there is no order."""
        found = []
        for parameter in self.parameters:
            if parameter.name not in choice:
                continue
            place = parameter.values.index(choice[parameter.name])
            steps = (place - 1, place + 1) if parameter.is_numeric else range(len(parameter.values))
            others = [parameter.values[step] for step in steps if 0 <= step < len(parameter.values) and step != place]
            found += [self.complete({**choice, parameter.name: value}) for value in others]
        return found

    def complete(self, choice: Mapping[str, Any]) -> Choice:
        """The choice with a value, the first, for every parameter that matters in it and is not there."""
        whole: Choice = {}
        for parameter in self.parameters:
            if self.matters(parameter.name, whole):
                whole[parameter.name] = choice.get(parameter.name, parameter.values[0])
        return whole

    @cached_property
    def _base_values(self) -> dict[str, Any]:
        return flat_settings(self.base)


def read_space(settings: ImageSettings) -> SearchSpace:
    """Check tuning.search_space against the settings; raises ConfigError that names every mistake in it."""
    tuning = settings.tuning
    if not tuning.search_space:
        raise ConfigError(
            "tuning.search_space is empty, so there is nothing to search; give e.g.\n"
            "  tuning: {search_space: {clustering.min_cluster_size: [20, 50, 100]}}"
        )
    problems: list[str] = []
    parameters = [_read_parameter(settings, name, values, problems) for name, values in tuning.search_space.items()]
    if problems:
        raise ConfigError("\n  ".join(["tuning.search_space:", *problems]))
    rank = {name: place for place, name in enumerate(_DECIDES)}
    parameters.sort(key=lambda parameter: rank.get(parameter.name, len(rank)))  # stable
    space = SearchSpace(settings, tuple(parameters))
    if tuning.search_strategy == "grid" and space.n_points > MAX_GRID_POINTS:
        raise ConfigError(
            f"tuning.search_space has {space.n_points:,} points, too many for search_strategy grid (at most "
            f"{MAX_GRID_POINTS:,}); take fewer values, or search_strategy evolution or tpe"
        )
    return space


def flat_settings(settings: ImageSettings, sections: tuple[str, ...] = TUNED_SECTIONS) -> dict[str, Any]:
    """`section.key` and value of every key of some sections."""
    return {f"{name}.{key}": value for name in sections for key, value in getattr(settings, name).model_dump().items()}


def choice_key(choice: Mapping[str, Any]) -> str:
    """Equal text for equal choices."""
    return canonical_json(dict(choice))


def _read_parameter(settings: ImageSettings, name: str, values: tuple[Any, ...], problems: list[str]) -> Parameter:
    section, _, key = name.partition(".")
    if section not in TUNED_SECTIONS:
        known = ", ".join(TUNED_SECTIONS)
        why = (
            "changes no cluster"
            if section in ImageSettings.model_fields
            else f"is no section{did_you_mean(section, TUNED_SECTIONS)}"
        )
        problems.append(f"{name}: {section} {why}; tune keys of {known}")
        return Parameter(name, ())
    holder: Section = getattr(settings, section)
    if key not in type(holder).model_fields:
        problems.append(f"{name}: no such key{did_you_mean(key, list(type(holder).model_fields))}")
        return Parameter(name, ())
    if name in _WITHOUT_EFFECT:
        problems.append(f"{name}: changes how the features are computed, not what they are; leave it out")
    if not values:
        problems.append(f"{name}: has no values; give a list such as [{getattr(holder, key)}]")
    checked = [_check_value(holder, name, key, value, problems) for value in values]
    distinct = list(dict.fromkeys(checked))
    parameter = Parameter(name, tuple(distinct))
    return Parameter(name, tuple(sorted(distinct))) if parameter.is_numeric else parameter


def _check_value(holder: Section, name: str, key: str, value: Any, problems: list[str]) -> Any:
    """The value as the section would hold it; what only clashes with another key is no mistake here."""
    try:
        accepted = getattr(type(holder).model_validate({**holder.model_dump(), key: value}), key)
    except ValidationError as problem:
        own = [error["msg"] for error in problem.errors() if error["loc"][:1] == (key,)]
        problems += [f"{name}: {value!r}: {message.removeprefix('Value error, ')}" for message in own]
        accepted = value
    if isinstance(accepted, float) and not math.isfinite(accepted):
        problems.append(f"{name}: {value!r} is no finite number")
    if isinstance(accepted, (list, dict)):
        problems.append(f"{name}: {value!r} must be a single value")
        return repr(value)
    return accepted
