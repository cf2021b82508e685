"""The batches of an epoch: classes by rows of a class, a quota of classifier-only rows, no text twice in a batch.

The plan of an epoch is a pure function of the rows, the settings, the seed and the number of the epoch, so that a
resumed run needs no state of a sampler: it makes the same plan and goes on at its place in it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

# Groups that are looked through for one that fits into a batch, before the batch is closed with fewer rows.
_LOOK_AHEAD = 512


@dataclass(frozen=True)
class SamplerRows:
    """What the plan depends on, one entry a training row."""

    codes: np.ndarray  # [n] int64: number of the label
    metric_mask: np.ndarray  # [n] bool
    classifier_mask: np.ndarray  # [n] bool
    text_keys: np.ndarray  # [n] int64: equal for equal texts


@dataclass(frozen=True)
class SamplerSettings:
    """How batches are made."""

    batch_size: int
    samples_per_class: int
    upsample: bool = False
    downsample: bool = False


@dataclass(frozen=True)
class EpochPlan:
    """The batches of an epoch, and what could not take part in it."""

    batches: list[np.ndarray]  # row numbers, each [<= batch_size] int64
    n_copies: int  # rows left out because an equal text of the same label is in
    n_lone: int  # metric rows left out because their label has one text and they feed no other loss

    @property
    def n_rows(self) -> int:
        """Rows of all batches, copies by up-sampling counted each time."""
        return sum(len(batch) for batch in self.batches)


def plan_epoch(rows: SamplerRows, *, settings: SamplerSettings, seed: int, epoch: int) -> EpochPlan:
    """Make the batches of one epoch.

    Every metric row stands in its batch with at least one other metric row of its label and of another text. Equal
    texts of one label count as one: each epoch draws one of the copies. A batch holds no text twice. Classifier-only
    rows are spread over the batches by their share. With neither up- nor down-sampling every text comes exactly once.
    """
    rng = np.random.default_rng([seed, epoch])
    metric, fillers = _choose_copies(rows, rng)
    n_copies = len(rows.codes) - len(metric) - len(fillers)
    metric, lone = _split_lone(rows, metric)
    lone_fillers = lone[rows.classifier_mask[lone]]
    fillers = np.concatenate([fillers, lone_fillers])
    draws = _Draws(rows, metric, fillers, settings)
    groups = _metric_groups(rows, metric, draws, settings.samples_per_class, rng)
    singles = _filler_rows(rows, fillers, draws, rng)
    batches = _pack(rows, groups, singles, settings, rng)
    return EpochPlan(batches, n_copies, len(lone) - len(lone_fillers))


# --- Which rows ------------------------------------------------------------------------------------------------------


def _choose_copies(rows: SamplerRows, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One row for each text of a label: those for SupCon (the cross-entropy too, if they can), and classifier-only."""
    n_labels = int(rows.codes.max()) + 1
    units = rows.text_keys * n_labels + rows.codes  # equal for copies
    shuffled = rng.permutation(len(units))
    # Copies that feed both losses come first, so that a copy does not cost a row of the cross-entropy.
    shuffled = shuffled[np.argsort(~rows.classifier_mask[shuffled], kind="stable")]
    metric = _first_of_each(units, shuffled[rows.metric_mask[shuffled]])
    taught = np.isin(units, units[metric[rows.classifier_mask[metric]]])
    only_classifier = shuffled[(rows.classifier_mask & ~rows.metric_mask & ~taught)[shuffled]]
    return metric, _first_of_each(units, only_classifier)


def _first_of_each(units: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    _, first = np.unique(units[ordered], return_index=True)
    return np.sort(ordered[first])


def _split_lone(rows: SamplerRows, metric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Metric rows whose label has a second text, and those whose label has none: no pair can be made of them."""
    n_texts = np.bincount(rows.codes[metric], minlength=1)
    is_lone = n_texts[rows.codes[metric]] < 2
    return metric[~is_lone], metric[is_lone]


class _Draws:
    """How many rows of a label an epoch draws: all of them, or as up- and down-sampling ask."""

    def __init__(self, rows: SamplerRows, metric: np.ndarray, fillers: np.ndarray, settings: SamplerSettings) -> None:
        counts = np.bincount(rows.codes[np.concatenate([metric, fillers])])
        present = counts[counts > 0]
        self._counts = counts
        self._target: int | None = None
        if settings.upsample and len(present):
            self._target = int(present.max())
        elif settings.downsample and len(present):
            self._target = max(int(present.min()), 2)

    def of(self, code: int, n: int) -> int:
        """Draws out of `n` rows of this label that stand together."""
        if self._target is None:
            return n
        return max(round(n * self._target / self._counts[code]), min(n, 2))


# --- Groups ----------------------------------------------------------------------------------------------------------


def _metric_groups(
    rows: SamplerRows, metric: np.ndarray, draws: _Draws, samples_per_class: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Rows of one label that come into a batch together: `samples_per_class` of them, one more where one is left."""
    groups: list[np.ndarray] = []
    places: list[np.ndarray] = []
    for code, members in _by_label(rows.codes, metric):
        first = len(groups)
        for drawn in _passes(members, draws.of(code, len(members)), rng):
            starts = list(range(0, max(len(drawn) - 1, 1), samples_per_class))
            groups += np.split(drawn, starts[1:])
        n = len(groups) - first
        places.append((np.arange(n) + rng.random(n)) / n)  # spread over the epoch, so that no label waits for its end
    order = np.argsort(np.concatenate([np.zeros(0), *places]))
    return [groups[index] for index in order]


def _filler_rows(rows: SamplerRows, fillers: np.ndarray, draws: _Draws, rng: np.random.Generator) -> list[np.ndarray]:
    singles: list[np.ndarray] = []
    for code, members in _by_label(rows.codes, fillers):
        for drawn in _passes(members, draws.of(code, len(members)), rng, at_least=1):
            singles += list(drawn[:, None])
    return [singles[index] for index in rng.permutation(len(singles))]


def _by_label(codes: np.ndarray, chosen: np.ndarray) -> list[tuple[int, np.ndarray]]:
    if not len(chosen):
        return []
    ordered = chosen[np.argsort(codes[chosen], kind="stable")]
    present, starts = np.unique(codes[ordered], return_index=True)
    return list(zip(present.tolist(), np.split(ordered, starts[1:]), strict=True))


def _passes(members: np.ndarray, n_draws: int, rng: np.random.Generator, *, at_least: int = 2) -> list[np.ndarray]:
    """`n_draws` rows as shuffles of all members, one after the other; the last may be a part of one."""
    passes = [rng.permutation(members) for _ in range(n_draws // len(members))]
    rest = n_draws % len(members)
    if rest:
        passes.append(rng.permutation(members)[: max(rest, min(at_least, len(members)))])
    return passes


# --- Batches ---------------------------------------------------------------------------------------------------------


def _pack(
    rows: SamplerRows,
    groups: list[np.ndarray],
    singles: list[np.ndarray],
    settings: SamplerSettings,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    n_rows = sum(len(group) for group in groups) + len(singles)
    together = settings.samples_per_class
    n_batches = max(-(-n_rows // (settings.batch_size // together * together)), 1)
    waiting, waiting_singles = deque(groups), deque(singles)
    batches: list[np.ndarray] = []
    while waiting or waiting_singles:
        n_left = max(n_batches - len(batches), 1)
        # Even batches, so that the last one is not a remnant without negatives.
        size = min(-(-n_rows // n_left), settings.batch_size)
        most = min(size + together - 1, settings.batch_size)
        batch = _Batch(rows)
        batch.fill(waiting_singles, min(-(-len(waiting_singles) // n_left), size), distinct_labels=False)
        batch.fill(waiting, most, distinct_labels=True)
        batch.fill(waiting, most, distinct_labels=False)
        batch.fill(waiting_singles, size, distinct_labels=False)
        if not batch.rows:  # a group larger than an even batch takes one alone
            batch.fill(waiting, settings.batch_size, distinct_labels=False)
        batches.append(np.concatenate(batch.rows))
        n_rows -= len(batches[-1])
    return [batches[index] for index in rng.permutation(len(batches))]


class _Batch:
    """A batch that is being filled: its rows, texts and labels."""

    def __init__(self, rows: SamplerRows) -> None:
        self._source = rows
        self.rows: list[np.ndarray] = []
        self._n = 0
        self._texts: set[int] = set()
        self._labels: set[int] = set()

    def fill(self, waiting: deque[np.ndarray], capacity: int, *, distinct_labels: bool) -> None:
        """Move groups that fit out of `waiting`, in their order, until `capacity` rows are in."""
        passed: list[np.ndarray] = []
        while waiting and self._n < capacity and len(passed) < _LOOK_AHEAD:
            group = waiting.popleft()
            if not self._take(group, capacity, distinct_labels):
                passed.append(group)
        waiting.extendleft(reversed(passed))

    def _take(self, group: np.ndarray, capacity: int, distinct_labels: bool) -> bool:
        texts = self._source.text_keys[group].tolist()
        label = int(self._source.codes[group[0]])
        too_many = self._n + len(group) > capacity
        if too_many or not self._texts.isdisjoint(texts) or (distinct_labels and label in self._labels):
            return False
        self.rows.append(group)
        self._n += len(group)
        self._texts.update(texts)
        if len(group) > 1:
            self._labels.add(label)
        return True
