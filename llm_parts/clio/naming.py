"""Names and summaries of base clusters: three ways to make them, whether they are true, and that they are distinct.

summarize: from members alone. contrastive: from members and the outsiders nearest to them. centroid: from the mean of
the members' vectors: a local model decodes it (see patchscope.py), any other sees the few members nearest to it alone.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llm_parts.clio.masking import Masker
from llm_parts.clio.nearby import nearest_others
from llm_parts.clio.parent_names import MAX_SENTENCES, Questions, first_free, short_name
from llm_parts.clio.prompts import tagged, text_cards
from llm_parts.clio.schemas import ClusterNameAnswer, HierarchyAssignAnswer
from llm_parts.clio.taxonomy import ClusterName
from llm_parts.extractive.words import keywords, name_from, sentences_of
from llm_parts.registry import normal_name

log = logging.getLogger(__name__)

STEP = "cluster_name"
CHECK_STEP = "name_check"
SIBLINGS = 4  # names beside the right one in a forced choice
RIVALS = 50  # clusters of the same name that one is told apart from

_TASK = """
You name a cluster of dialogues. {shown}
- summary: two sentences at most, in the past tense, of what the users asked for in these dialogues.
- name: ten words at most, special enough that a reader could tell members from {others}. Not "various" or "general".
- reasoning: one or two sentences.
"""
INSTRUCTIONS = {
    "summarize": _TASK.format(
        shown="You are shown what was asked for in some of its members.", others="other dialogues"
    ),
    "contrastive": _TASK.format(
        shown="You are shown some of its members, and the dialogues outside it that are nearest to it: the name must "
        "fit the members and not the outsiders.",
        others="the outsiders",
    ),
    "centroid": _TASK.format(
        shown="You are shown the few members that are nearest to its centre: name what lies in their midst.",
        others="other dialogues",
    ),
}

CHECK_INSTRUCTIONS = """
You are shown what was asked for in one dialogue, and the names of several clusters of dialogues. Choose the name that
fits this dialogue best. Their order means nothing.
- parent: that name, copied exactly. One of them must be chosen.
- reasoning: one sentence.
"""


@dataclass(frozen=True)
class NameEvidence:
    """What a namer sees of one cluster."""

    members: list[str]
    outsiders: list[str] = field(default_factory=list)


@dataclass
class NameCheck:
    """Whether members of one cluster chose its name among its siblings."""

    n_asked: int = 0
    n_right: int = 0
    mistaken_for: Counter[int] = field(default_factory=Counter)  # cluster -> members that chose its name

    @property
    def is_false(self) -> bool:
        """Whether no member that was asked chose the name."""
        return self.n_asked > 0 and self.n_right == 0


class Namer:
    """Names clusters by one method."""

    def __init__(self, questions: Questions, *, method: str, masker: Masker, step: str = STEP) -> None:
        self._questions = questions
        self._instructions = INSTRUCTIONS[method]
        self._shows_outsiders = method == "contrastive"
        self._masker = masker
        self._step = step

    def name_clusters(self, evidence: Sequence[NameEvidence]) -> list[ClusterName]:
        """A name and a summary for each cluster, no two names alike; one whose call failed is named by its words."""
        names = self._ask([self._prompt(one) for one in evidence], evidence)
        return self.tell_apart(names, evidence)

    def tell_apart(self, names: Sequence[ClusterName], evidence: Sequence[NameEvidence]) -> list[ClusterName]:
        """Ask for names that several clusters bear once more, all of them together; then tell them apart by words."""
        names = list(names)
        asked = [(row, group) for group in same_names(names) if len(group) > 1 for row in group]
        against = {row: _others(row, group) for row, group in asked}
        names = self.rename(names, evidence, against=against)
        for group in same_names(names):
            _number_apart(names, group, evidence)
        return names

    def rename(
        self, names: Sequence[ClusterName], evidence: Sequence[NameEvidence], *, against: dict[int, list[int]]
    ) -> list[ClusterName]:
        """Name the clusters `against` once more, each by what sets it apart from the clusters given for it."""
        rows = list(against)
        sharper = [_set_against(evidence, row, against[row]) for row in rows]
        taken = [[names[row].name, *(names[other].name for other in against[row])] for row in rows]
        prompts = [self._prompt(one, taken=words) for one, words in zip(sharper, taken, strict=True)]
        renamed = list(names)
        for row, name in zip(rows, self._ask(prompts, sharper), strict=True):
            renamed[row] = name
        return renamed

    def _ask(self, prompts: Sequence[str], evidence: Sequence[NameEvidence]) -> list[ClusterName]:
        answers = self._questions.ask(
            prompts,
            instructions=self._instructions,
            schema=ClusterNameAnswer,
            schema_name="cluster_name",
            step=self._step,
        )
        return [
            self._by_words(one) if answer is None else self._checked(answer)
            for one, answer in zip(evidence, answers, strict=True)
        ]

    def _prompt(self, evidence: NameEvidence, *, taken: Sequence[str] = ()) -> str:
        parts = [f"Members of the cluster:\n{tagged('members', text_cards(evidence.members))}"]
        if evidence.outsiders and (self._shows_outsiders or taken):
            parts.append(f"Outside the cluster, near to it:\n{tagged('outsiders', text_cards(evidence.outsiders))}")
        if taken:
            cards = [{"name": name} for name in dict.fromkeys(taken)]
            parts.append(
                f"These names do not tell the cluster from its neighbours:\n{tagged('names', cards)}\n"
                "Give it another one, by what sets its members apart from the outsiders."
            )
        return "\n\n".join([*parts, "Name the cluster."])

    def _checked(self, answer: ClusterNameAnswer) -> ClusterName:
        summary = " ".join(sentences_of(self._masker.mask(answer.summary))[:MAX_SENTENCES])
        return ClusterName(short_name(self._masker.mask(answer.name)), summary)

    def _by_words(self, evidence: NameEvidence) -> ClusterName:
        name = short_name(self._masker.mask(name_from(evidence.members, others=evidence.outsiders)))
        return ClusterName(name, "No summary could be had; the name is made of the words that members share.")


def same_names(names: Sequence[ClusterName]) -> list[list[int]]:
    """The clusters under each name, by first appearance; case and spaces make no difference."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        groups[normal_name(name.name)].append(row)
    return list(groups.values())


def _set_against(evidence: Sequence[NameEvidence], row: int, others: Sequence[int]) -> NameEvidence:
    """The evidence of one cluster with members of the others as its outsiders, as many as it had before."""
    n_shown = max(len(evidence[row].outsiders), len(evidence[row].members))
    each = max(1, n_shown // len(others))
    outsiders = [text for other in others for text in evidence[other].members[:each]][:n_shown]
    return NameEvidence(evidence[row].members, outsiders)


def _number_apart(names: list[ClusterName], group: Sequence[int], evidence: Sequence[NameEvidence]) -> None:
    """Put the words that only its members use behind each of some equal names but the first, else a number."""
    if len(group) < 2:
        return
    taken = {normal_name(name.name) for name in names}
    numerals = map(str, itertools.count(2))  # one row of them for all: a number that is taken once stays so
    for row in group[1:]:
        others = [text for other in _others(row, group) for text in evidence[other].members]
        words = " ".join(keywords(evidence[row].members, others=others, n_words=2))
        old = names[row]
        name = first_free(old.name, itertools.chain([words] if words else [], numerals), taken)
        names[row] = ClusterName(name, old.summary)


def _others(row: int, group: Sequence[int]) -> list[int]:
    """The other clusters of a group, the first RIVALS of them: how many bear one name has no bound."""
    return [other for other in group[: RIVALS + 1] if other != row][:RIVALS]


# --- Are they true ---------------------------------------------------------------------------------------------------


def check_names(
    names: Sequence[ClusterName],
    members: Sequence[Sequence[str]],
    *,
    centroids: np.ndarray,
    questions: Questions,
    seed: int,
    step: str = CHECK_STEP,
    only: Sequence[int] | None = None,
) -> list[NameCheck]:
    """Let members of each cluster choose its name among those of its nearest siblings; names alone are shown.

    `members[i]` are texts of cluster i, centroids [k, d] of unit length; `only` these clusters are asked about.
    """
    checks = [NameCheck() for _ in names]
    rows = np.arange(len(names)) if only is None else np.asarray(only, np.int64)
    siblings = nearest_others(centroids, SIBLINGS, rows=rows, seed=seed)  # [rows, siblings]
    asked = [
        (row, order, text)
        for row, others in zip(rows.tolist(), siblings.tolist(), strict=True)
        for order, text in _choices(row, others, members[row], seed=seed)
    ]
    answers = questions.ask(
        [_choice_prompt(text, [names[other].name for other in order]) for _, order, text in asked],
        instructions=CHECK_INSTRUCTIONS,
        schema=HierarchyAssignAnswer,
        schema_name="hierarchy_assign",
        step=step,
        choices=[{"parent": [names[other].name for other in order]} for _, order, _ in asked],
    )
    for (row, order, _), answer in zip(asked, answers, strict=True):
        if answer is None:
            continue
        chosen = next(other for other in order if names[other].name == answer.parent)
        checks[row].n_asked += 1
        checks[row].n_right += chosen == row
        if chosen != row:
            checks[row].mistaken_for[chosen] += 1
    return checks


def _choices(row: int, siblings: list[int], texts: Sequence[str], *, seed: int) -> Iterator[tuple[list[int], str]]:
    """For each text of cluster `row` the clusters whose names it chooses from, in an order of its own."""
    for number, text in enumerate(texts if siblings else ()):
        yield np.random.default_rng([seed, row, number]).permutation([row, *siblings]).tolist(), text


def _choice_prompt(text: str, names: Sequence[str]) -> str:
    child, parents = tagged("children", [{"name": text}]), tagged("parents", [{"name": name} for name in names])
    return f"The dialogue:\n{child}\n\nThe names:\n{parents}\n\nWhich one fits?"
