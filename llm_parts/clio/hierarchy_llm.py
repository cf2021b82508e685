"""The hierarchy that a model makes, level by level from the base clusters up, after Clio (arXiv 2412.13678, app. G.7).

Clusters that lie together are shown together, and parents for them proposed; proposals that mean the same become one;
each cluster chooses its parent from a list in an order of its own; parents are then named by the children they got.
A level that makes no progress (as many parents as children, or all children under one) is cut by embeddings instead.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common.grouping import cluster_members
from llm_parts.clio.levels import NAMES_TOGETHER, group_vectors, levels_warning, neighborhoods, plan_levels
from llm_parts.clio.nearby import nearest_outside, nearest_rows
from llm_parts.clio.parent_names import Questions, as_texts, count_members, log_level, name_level, short_name
from llm_parts.clio.prompts import named_cards, tagged
from llm_parts.clio.schemas import HierarchyAssignAnswer, HierarchyDedupeAnswer, HierarchyProposeAnswer
from llm_parts.clio.taxonomy import ClusterName, Hierarchy, Level
from llm_parts.registry import normal_name

if TYPE_CHECKING:
    from llm_parts.client import LlmClient
    from llm_parts.clio.settings import ClioSettings

log = logging.getLogger(__name__)

Embed = Callable[[Sequence[str]], np.ndarray]  # texts -> [n, d] float32, unit rows

N_OUTSIDE = 10  # clusters around a neighbourhood that are shown beside it
SPREAD = 0.5  # proposals may be so much fewer or more than asked for
MAX_PARENTS_SHOWN = 60  # the nearest of more, so that a prompt does not grow with the clusters

PROPOSE_INSTRUCTIONS = """
You build a taxonomy of dialogues. You are shown clusters of dialogues, each with a name and a summary, and some
clusters that lie around them. Propose names of broader clusters that the shown ones can be sorted into.
- Each name: ten words at most, one theme that several of the shown clusters share, as special as that allows.
- Together the names cover all shown clusters, do not overlap, and set them apart from the ones around.
- No name such as "other", "general requests" or "various".
- reasoning: two sentences at most.
"""

DEDUPE_INSTRUCTIONS = """
You tidy up the names of the broader clusters of a taxonomy, which were proposed for its parts one by one. Where several
names mean the same or overlap, keep the best one, or write one that covers them. Lose no theme that only one name has.
Answer with the names that are left, each ten words at most.
"""

ASSIGN_INSTRUCTIONS = """
You sort a cluster of dialogues into a taxonomy. You are shown the cluster, by its name and summary, and the names of
the broader clusters. Choose the one it belongs to, by what its dialogues are about. Their order means nothing.
- parent: the name of that broader cluster, copied exactly. If none fits well, the one that fits best.
- reasoning: one sentence.
"""


def build_llm_hierarchy(
    base_names: Sequence[ClusterName],
    sizes: np.ndarray,
    *,
    client: LlmClient,
    settings: ClioSettings,
    embed: Embed,
) -> Hierarchy:
    """Build levels over base clusters with sizes [n_base]; `embed` gives unit vectors of texts.

    The same answers give the same hierarchy, in whatever order they come. Where the base clusters do not allow
    `settings.levels`, there are fewer, and `warnings` of the hierarchy says so; no levels stand over `n_top` base
    clusters or fewer. Raises BudgetExhausted.
    """
    questions = Questions(client, settings)
    warnings = [levels_warning(len(base_names), n_levels=settings.levels, n_top=settings.n_top)]
    children, weights = list(base_names), np.asarray(sizes, dtype=np.int64)
    levels: list[Level] = []
    for n_wanted in plan_levels(len(base_names), n_levels=settings.levels, n_top=settings.n_top):
        if len(children) <= n_wanted:
            warnings.append(f"llm: a level of {n_wanted} clusters is left out: the one below has {len(children)}")
            continue
        step = _LevelBuilder(children, weights, n_wanted=n_wanted, depth=len(levels), embed=embed, questions=questions)
        level = step.build(seed=settings.random_state)
        log_level("llm", level, n_wanted=n_wanted)
        warnings += step.warnings
        levels.insert(0, level)
        children, weights = level.names, count_members(level.parent_of, weights)
    found = tuple(text for text in [*warnings, *questions.warnings] if text)
    return Hierarchy("llm", levels, calls=questions.calls, cost=questions.cost, warnings=found)


class _LevelBuilder:
    """One level: from children to parents."""

    def __init__(
        self,
        children: Sequence[ClusterName],
        sizes: np.ndarray,
        *,
        n_wanted: int,
        depth: int,
        embed: Embed,
        questions: Questions,
    ) -> None:
        self._children = children
        self._sizes = sizes
        self._n_wanted = n_wanted
        self._depth = depth
        self._embed = embed
        self._questions = questions
        self._vectors = embed(as_texts(children))  # [n_children, d]
        self.warnings: list[str] = []

    def build(self, *, seed: int) -> Level:
        """Propose, make distinct, assign, guard, name."""
        if self._n_wanted == 1:
            parent_of = np.zeros(len(self._children), dtype=np.int64)
        else:
            names = self._distinct(self._propose(seed=seed), seed=seed)
            parent_of = self._with_progress(self._assign(names, seed=seed))
        return name_level(
            self._children,
            parent_of,
            sizes=self._sizes,
            vectors=self._vectors,
            questions=self._questions,
            step="hierarchy_rename",
        )

    # --- Parents -----------------------------------------------------------------------------------------------------

    def _propose(self, *, seed: int) -> list[str]:
        groups = neighborhoods(self._vectors, seed=seed)
        shares = [max(1, round(self._n_wanted * len(group) / len(self._children))) for group in groups]
        around = nearest_outside(groups, self._vectors, N_OUTSIDE)
        prompts = list(map(self._propose_prompt, groups, shares, around))
        answers = self._questions.ask(
            prompts,
            instructions=PROPOSE_INSTRUCTIONS,
            schema=HierarchyProposeAnswer,
            schema_name="hierarchy_propose",
            step="hierarchy_propose",
        )
        names: list[str] = []
        for group, share, answer in zip(groups, shares, answers, strict=True):
            # A neighbourhood without an answer is spoken for by the children in its midst.
            found = answer.names if answer is not None else self._central_names(group, share)
            names += found[: _most(share)]
        return _without_repetition(names)

    def _propose_prompt(self, group: np.ndarray, share: int, around: np.ndarray) -> str:
        cards = named_cards([self._children[row] for row in group])
        parts = [f"Clusters to sort:\n{tagged('children', cards)}"]
        if len(around):
            others = named_cards([self._children[row] for row in around])
            parts.append(f"Clusters around them, which have parents elsewhere:\n{tagged('outsiders', others)}")
        least, most = max(1, math.floor(share * (1 - SPREAD))), _most(share)
        wanted = f"Propose {share} names; not fewer than {least}, not more than {most}." if most > 1 else ""
        return "\n\n".join([*parts, wanted or "Propose 1 name, that fits them all."])

    def _central_names(self, rows: np.ndarray, n_names: int) -> list[str]:
        return [self._children[rows[row]].name for row in _medoids(self._vectors[rows], n_names)]

    def _distinct(self, names: list[str], *, seed: int) -> list[str]:
        """The proposals, each meaning once, and no more of them than the level may have."""
        if len(names) > 1:
            kept = _without_repetition(self._deduped(names, seed=seed))
            names = kept if len(kept) > 1 else names
        if len(names) > _most(self._n_wanted):
            names = [names[row] for row in _medoids(self._embed(names), self._n_wanted)]
        return names

    def _deduped(self, names: list[str], *, seed: int) -> list[str]:
        """What is left of names that mean the same; many are shown in parts, like names together."""
        groups = [np.arange(len(names))]
        if len(names) > NAMES_TOGETHER:
            groups = neighborhoods(self._embed(names), seed=seed, size=NAMES_TOGETHER)
        prompts = []
        for group in groups:
            n_left = max(1, round(self._n_wanted * len(group) / len(names)))
            cards = [{"name": names[row]} for row in group]
            prompts.append(f"{tagged('names', cards)}\n\nAbout {n_left} should be left.")
        answers = self._questions.ask(
            prompts,
            instructions=DEDUPE_INSTRUCTIONS,
            schema=HierarchyDedupeAnswer,
            schema_name="hierarchy_dedupe",
            step="hierarchy_dedupe",
        )
        left: list[str] = []
        for group, answer in zip(groups, answers, strict=True):
            left += answer.names if answer is not None and answer.names else [names[row] for row in group]
        return left

    # --- Children ----------------------------------------------------------------------------------------------------

    def _assign(self, names: list[str], *, seed: int) -> np.ndarray:
        """The parent of each child [n_children]; the nearest one where a call failed."""
        if len(names) < 2:
            return np.zeros(len(self._children), dtype=np.int64)
        nearest = list(nearest_rows(self._embed(names), self._vectors, MAX_PARENTS_SHOWN, seed=seed))  # of each child
        orders = [self._order(row, near, seed=seed) for row, near in enumerate(nearest)]
        answers = self._questions.ask(
            [self._assign_prompt(row, [names[number] for number in order]) for row, order in enumerate(orders)],
            instructions=ASSIGN_INSTRUCTIONS,
            schema=HierarchyAssignAnswer,
            schema_name="hierarchy_assign",
            step="hierarchy_assign",
            choices=[{"parent": [names[number] for number in order]} for order in orders],
        )
        numbers = {name: number for number, name in enumerate(names)}
        chosen = [
            numbers[answer.parent] if answer is not None else int(near[0])
            for near, answer in zip(nearest, answers, strict=True)
        ]
        return np.array(chosen, dtype=np.int64)

    def _order(self, row: int, nearest: np.ndarray, *, seed: int) -> np.ndarray:
        """The parents shown to a child, shuffled by a seed of its own, so that the order of calls changes nothing."""
        return np.random.default_rng([seed, self._depth, row]).permutation(np.sort(nearest))

    def _assign_prompt(self, row: int, names: Sequence[str]) -> str:
        parents: list[dict[str, Any]] = [{"name": name} for name in names]
        return (
            f"The cluster:\n{tagged('children', named_cards([self._children[row]]))}\n\n"
            f"The broader clusters:\n{tagged('parents', parents)}\n\nWhich one does it belong to?"
        )

    def _with_progress(self, parent_of: np.ndarray) -> np.ndarray:
        """The same, or a cut by embeddings where the level would say nothing."""
        n_parents = len(np.unique(parent_of))
        if 1 < n_parents < len(parent_of):
            return parent_of
        what = "all clusters came under one" if n_parents == 1 else "every cluster got a parent of its own"
        self.warnings.append(f"llm: {what} at the level of {self._n_wanted}; it was cut by embeddings instead")
        return group_vectors(self._vectors, self._n_wanted)


def _most(n_names: int) -> int:
    return math.ceil(n_names * (1 + SPREAD))


def _without_repetition(names: Sequence[str]) -> list[str]:
    """Names of ten words at most, the first of those that differ in nothing but case or spaces."""
    short = [short_name(name) for name in names]
    return list({normal_name(name): name for name in reversed(short) if name}.values())[::-1]


def _medoids(vectors: np.ndarray, n_groups: int) -> list[int]:
    """For each of n_groups groups of vectors [n, d] the row that is nearest to its mean, ascending."""
    groups = group_vectors(vectors, n_groups)
    members = (rows for _, rows in cluster_members(groups, int(groups.max()) + 1) if len(rows))
    return sorted(int(rows[(vectors[rows] @ vectors[rows].mean(axis=0)).argmax()]) for rows in members)
