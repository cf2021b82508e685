"""The namer of both hierarchies: parents are named from their children, and no two of a level bear one name."""

from __future__ import annotations

import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from pydantic import BaseModel

from common.escaping import safe_text
from common.grouping import cluster_members
from llm_parts.client import LlmRequest
from llm_parts.clio.nearby import nearest_outside
from llm_parts.clio.prompts import build_messages, named_cards, tagged
from llm_parts.clio.schemas import HierarchyRenameAnswer
from llm_parts.clio.taxonomy import ClusterName, Level
from llm_parts.extractive.words import sentences_of
from llm_parts.registry import normal_name
from llm_parts.schemas import Choices

if TYPE_CHECKING:
    from llm_parts.client import LlmClient
    from llm_parts.clio.settings import ClioSettings

log = logging.getLogger(__name__)

AnyAnswer = TypeVar("AnyAnswer", bound=BaseModel)

MAX_WORDS = 10
MAX_SENTENCES = 2
MAX_CHILDREN_SHOWN = 60  # the largest of them, in one prompt
MAX_OUTSIDERS_SHOWN = 20

RENAME_INSTRUCTIONS = """
You name a group of clusters of dialogues. You are shown the clusters that were put into the group, each with its name
and summary, and clusters of other groups.
- name: ten words at most, what all clusters of the group have in common and the others lack. As special as the group
  allows: a name that would fit the others too is wrong. Not a list of all its clusters.
- summary: two sentences at most, in the past tense, of what people asked for in these dialogues.
- reasoning: one or two sentences.
"""


class Questions:
    """Asks the questions of one hierarchy and counts them: the same for answers from the cache."""

    def __init__(self, client: LlmClient, settings: ClioSettings) -> None:
        self._client = client
        self._settings = settings
        self._cost_before = self._cost_so_far()
        self.calls = 0
        self.failures: dict[str, int] = defaultdict(int)  # step -> questions without an answer that can be used

    def ask(
        self,
        prompts: Sequence[str],
        *,
        instructions: str,
        schema: type[AnyAnswer],
        schema_name: str,
        step: str,
        choices: Sequence[Choices | None] | None = None,
    ) -> list[AnyAnswer | None]:
        """One answer per prompt, in their order; None where none could be used. Raises BudgetExhausted."""
        settings = self._settings
        requests = [
            LlmRequest(
                build_messages(instructions, prompt, output_language=settings.output_language),
                schema,
                schema_name,
                step,
                choices[row] if choices is not None else None,
                settings.temperature,
                settings.top_p,
            )
            for row, prompt in enumerate(prompts)
        ]
        values = [answer.value for answer in self._client.ask_many(requests)]
        self.calls += len(requests)
        self.failures[step] += sum(value is None for value in values)
        return values

    @property
    def cost(self) -> float:
        """What these questions cost, when they were paid; NaN where the price of the model is not known."""
        # Rounded: a run that was resumed begins its sum at another place, and must end with the same number.
        return round(self._cost_so_far() - self._cost_before, 8)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each step that got unusable answers."""
        return tuple(f"{step}: {n} calls had no usable answer" for step, n in self.failures.items() if n)

    def _cost_so_far(self) -> float:
        totals = self._client.ledger.summary()
        costs = (totals["cost"], totals["cached_cost"])
        return math.nan if None in costs else float(sum(costs))


def name_level(
    children: Sequence[ClusterName],
    parent_of: np.ndarray,
    *,
    sizes: np.ndarray,
    vectors: np.ndarray,
    questions: Questions,
    step: str,
) -> Level:
    """Name the parents of a level from their children; parents without children fall out.

    `parent_of` [n_children] holds any numbers, `sizes` [n_children] conversations, `vectors` [n_children, d] tell which
    parents lie near to each other. A parent of one child bears its name. A parent whose call failed bears the name of
    its largest child.
    """
    _, parents = np.unique(parent_of, return_inverse=True)  # [n_children], numbered without gaps
    groups = [_largest_first(rows, sizes) for _, rows in cluster_members(parents, int(parents.max()) + 1)]
    outsiders = list(nearest_outside(groups, vectors, MAX_OUTSIDERS_SHOWN))
    names = [children[group[0]] for group in groups]
    asked = [number for number, group in enumerate(groups) if len(group) > 1]
    prompts = [_rename_prompt(children, groups[number], outsiders[number]) for number in asked]
    for number, name in zip(asked, _ask_names(prompts, questions=questions, step=step), strict=True):
        names[number] = name or names[number]
    names = _tell_apart(names, children, groups, questions=questions, step=step)
    return Level(names, parents.astype(np.int64))


def short_name(text: str) -> str:
    """A name on one line, of ten words at most."""
    return " ".join(safe_text(text).split()[:MAX_WORDS])


def _ask_names(prompts: Sequence[str], *, questions: Questions, step: str) -> list[ClusterName | None]:
    answers = questions.ask(
        prompts,
        instructions=RENAME_INSTRUCTIONS,
        schema=HierarchyRenameAnswer,
        schema_name="hierarchy_rename",
        step=step,
    )
    return [
        None if answer is None else ClusterName(short_name(answer.name), _short_summary(answer.summary))
        for answer in answers
    ]


def _short_summary(text: str) -> str:
    return " ".join(sentences_of(safe_text(text))[:MAX_SENTENCES])


def _rename_prompt(
    children: Sequence[ClusterName], group: np.ndarray, outsiders: np.ndarray, *, taken: str = ""
) -> str:
    shown = named_cards([children[row] for row in group[:MAX_CHILDREN_SHOWN]])
    parts = [f"Clusters of the group, the largest first:\n{tagged('children', shown)}"]
    if len(outsiders):
        others = named_cards([children[row] for row in outsiders])
        parts.append(f"Clusters of other groups:\n{tagged('outsiders', others)}")
    if taken:
        parts.append(
            f"Several groups were given the same name, so that nobody can tell them apart:\n"
            f"{tagged('names', [{'name': taken}])}\nGive this group another name, by what sets it apart."
        )
    return "\n\n".join([*parts, "Name the group."])


def _largest_first(rows: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-sizes[rows], kind="stable")]


def _tell_apart(
    names: list[ClusterName],
    children: Sequence[ClusterName],
    groups: Sequence[np.ndarray],
    *,
    questions: Questions,
    step: str,
) -> list[ClusterName]:
    """Ask for the names that several parents bear once more, all of them together; then tell them apart by a child."""
    names = list(names)
    same = [numbers for numbers in _same_names(names) if len(numbers) > 1]
    asked, prompts = [], []
    for numbers in same:
        for number in numbers:
            others = _first_rows((groups[other] for other in numbers if other != number), MAX_OUTSIDERS_SHOWN)
            prompts.append(_rename_prompt(children, groups[number], others, taken=names[number].name))
            asked.append(number)
    for number, name in zip(asked, _ask_names(prompts, questions=questions, step=step), strict=True):
        names[number] = name or names[number]
    for numbers in _same_names(names):
        if len(numbers) > 1:
            _name_by_child(names, numbers, children, groups)
    return names


def _same_names(names: Sequence[ClusterName]) -> list[list[int]]:
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        numbers[normal_name(name.name)].append(number)
    return list(numbers.values())


def _name_by_child(
    names: list[ClusterName], numbers: Sequence[int], children: Sequence[ClusterName], groups: Sequence[np.ndarray]
) -> None:
    """Add the largest child to all but the first of some equal names, and a number where that is taken too."""
    taken = {normal_name(name.name) for name in names}
    numerals = map(str, itertools.count(2))  # one row of them for all: a number that is taken once stays so
    for number in numbers[1:]:
        old, child = names[number], children[groups[number][0]].name
        new = first_free(old.name, itertools.chain([child], numerals), taken)
        names[number] = ClusterName(new, old.summary)


def _first_rows(groups: Iterable[np.ndarray], n: int) -> np.ndarray:
    """The first `n` rows of groups one after the other; no more groups are looked at than that takes."""
    found: list[int] = []
    for group in groups:
        found += group[: n - len(found)].tolist()
        if len(found) == n:
            break
    return np.array(found, np.int64)


def first_free(name: str, suffixes: Iterable[str], taken: set[str]) -> str:
    """The name with the first suffix by which it is not `taken`, where it is put down as taken."""
    new = next(text for suffix in suffixes if normal_name(text := with_suffix(name, suffix)) not in taken)
    taken.add(normal_name(new))
    return new


def with_suffix(name: str, suffix: str) -> str:
    """A name with a few words in brackets behind it, ten words in all."""
    words = suffix.split()[:4]
    return f"{' '.join(name.split()[: MAX_WORDS - len(words)])} ({' '.join(words)})"


def as_texts(names: Sequence[ClusterName]) -> list[str]:
    """What is embedded of a cluster: its name and its summary."""
    return [f"{name.name}. {name.summary}" for name in names]


def count_members(parent_of: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Conversations of each parent: [n_parents] int64."""
    return np.bincount(parent_of, weights=sizes).astype(np.int64)


def log_level(kind: str, level: Level, *, n_wanted: int) -> None:
    """Say how a level came out."""
    log.info("%s: %d clusters under %d (%d wanted)", kind, len(level.parent_of), len(level.names), n_wanted)
