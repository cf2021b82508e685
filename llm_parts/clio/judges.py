"""Models that judge facets, names and placements, and how far they can be trusted.

Of two things each judge is asked twice, the second time with the two changed about: an answer that follows the place
is a tie. Shares come with Wilson's interval, scores with the normal one (both 95%), several judges with how often they
agree and Cohen's kappa.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from llm_parts.clio.parent_names import Questions
from llm_parts.clio.prompts import tagged
from llm_parts.clio.schemas import JudgePairAnswer, JudgeScoreAnswer

log = logging.getLogger(__name__)

_Z = 1.959964  # the 97.5% point of the normal distribution
_MANY_TIES = 0.5  # share of ties from which names do not tell members apart

PAIR_INSTRUCTIONS = """
You compare two answers to one question on dialogues and say which is better. {question}
The two are called a and b; their order means nothing.
- winner: a, b, or tie where neither is better.
- reasoning: one or two sentences.
"""
QUESTIONS = {
    "names": "You are shown members of a cluster and two names: which one fits the members, and says what they share?",
    "placements": "You are shown one dialogue and the names of two clusters: to which one does the dialogue belong?",
    "hierarchies": "You are shown a cluster, and its place in two taxonomies, as the path from the top: in which one "
    "does it stand better, under parents that fit it and say something?",
    "naming": "You are shown members of a cluster and two names for it: which one says better what they share?",
}
SCORE_INSTRUCTIONS = """
You check what was noted down about one dialogue. Score how well the notes of <facets> fit the dialogue:
5: true, complete and to the point; 4: true, with a detail missing; 3: true in the main; 2: partly wrong or empty words;
1: wrong. Notes leave out personal data on purpose.
- reasoning: one or two sentences.
"""


@dataclass(frozen=True)
class Judge:
    """A model that judges, by the name it has in the report."""

    name: str
    questions: Questions


@dataclass(frozen=True)
class Pair:
    """Two things to compare over shown evidence; each thing is an object for a prompt, such as {name, summary}."""

    evidence: str  # tagged
    first: Mapping[str, Any]
    second: Mapping[str, Any]


@dataclass
class Verdicts:
    """What each judge said of each item; None where it gave no usable answer."""

    kind: str
    by_judge: dict[str, list[Any]]  # judge -> [n] "a", "b", "tie" or None; of scores 1 to 5 or None
    swapped_equal: dict[str, float | None] = field(default_factory=dict)  # judge -> share of pairs told alike twice

    def shares(self) -> tuple[float, float] | None:
        """The parts of all votes that the first and the second things got, a tie half to each; None without votes."""
        votes = [vote for given in self.by_judge.values() for vote in given if vote is not None]
        if not votes:
            return None
        first = sum({"a": 1.0, "tie": 0.5, "b": 0.0}[vote] for vote in votes) / len(votes)
        return first, 1 - first

    def tie_share(self) -> float:
        """The part of all votes that are ties."""
        votes = [vote for given in self.by_judge.values() for vote in given if vote is not None]
        return votes.count("tie") / len(votes) if votes else 0.0


# --- Asking ----------------------------------------------------------------------------------------------------------


def judge_pairs(pairs: Sequence[Pair], *, kind: str, tag: str, judges: Sequence[Judge]) -> Verdicts:
    """Let every judge compare each pair in both orders; `tag` is what the two things stand in (names or parents)."""
    verdicts = Verdicts(kind, {})
    instructions = PAIR_INSTRUCTIONS.format(question=QUESTIONS[kind])
    for judge in judges:
        prompts = [_pair_prompt(pair, tag, swapped) for swapped in (False, True) for pair in pairs]
        answers = judge.questions.ask(
            prompts, instructions=instructions, schema=JudgePairAnswer, schema_name="judge_pair", step=f"judge_{kind}"
        )
        words = [None if answer is None else answer.winner for answer in answers]
        straight, turned = words[: len(pairs)], [_changed_about(word) for word in words[len(pairs) :]]
        told = [(one, two) for one, two in zip(straight, turned, strict=True) if one is not None and two is not None]
        verdicts.swapped_equal[judge.name] = sum(one == two for one, two in told) / len(told) if told else None
        verdicts.by_judge[judge.name] = [_agreed(one, two) for one, two in zip(straight, turned, strict=True)]
    return verdicts


def judge_scores(
    items: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], *, kind: str, judges: Sequence[Judge]
) -> Verdicts:
    """Let every judge score notes of dialogues: items are the tagged dialogue and [{name, value}]."""
    prompts = [f"{dialogue}\n\n{tagged('facets', notes)}\n\nScore the notes." for dialogue, notes in items]
    verdicts = Verdicts(kind, {})
    for judge in judges:
        answers = judge.questions.ask(
            prompts,
            instructions=SCORE_INSTRUCTIONS,
            schema=JudgeScoreAnswer,
            schema_name="judge_score",
            step=f"judge_{kind}",
        )
        verdicts.by_judge[judge.name] = [None if answer is None else answer.score for answer in answers]
    return verdicts


def _pair_prompt(pair: Pair, tag: str, swapped: bool) -> str:
    a, b = (pair.second, pair.first) if swapped else (pair.first, pair.second)
    return f"{pair.evidence}\n\n{tagged(tag, [{'option': 'a', **a}, {'option': 'b', **b}])}\n\nWhich is better?"


def _changed_about(word: str | None) -> str | None:
    return {"a": "b", "b": "a"}.get(word, word) if word else None


def _agreed(one: str | None, two: str | None) -> str | None:
    if one is None or two is None:
        return None
    return one if one == two else "tie"


# --- What the answers are worth --------------------------------------------------------------------------------------


def pair_rows(verdicts: Verdicts, *, first: str = "first", second: str = "second") -> list[dict[str, Any]]:
    """A table row for each judge: how often the first and the second won, and whether places swayed it."""
    rows = []
    for judge, votes in verdicts.by_judge.items():
        given = [vote for vote in votes if vote is not None]
        low, high = wilson_interval(given.count("a"), len(given))
        rows.append(
            {
                "judged": verdicts.kind,
                "judge": judge,
                "first": first,
                "second": second,
                "pairs": len(given),
                "first_wins": _share(given.count("a"), len(given)),
                "low": low,
                "high": high,
                "second_wins": _share(given.count("b"), len(given)),
                "ties": _share(given.count("tie"), len(given)),
                "same_when_swapped": _rounded(verdicts.swapped_equal.get(judge)),
                "failed": len(votes) - len(given),
            }
        )
    return rows


def score_rows(verdicts: Verdicts) -> list[dict[str, Any]]:
    """A table row for each judge: the mean score with its interval."""
    rows = []
    for judge, scores in verdicts.by_judge.items():
        given = [score for score in scores if score is not None]
        mean, low, high = mean_interval(given)
        rows.append(
            {
                "judged": verdicts.kind,
                "judge": judge,
                "items": len(given),
                "mean_score": mean,
                "low_score": low,
                "high_score": high,
                "scored_4_or_5": _share(sum(score >= 4 for score in given), len(given)),
                "failed": len(scores) - len(given),
            }
        )
    return rows


def agreement_rows(verdicts: Sequence[Verdicts]) -> list[dict[str, Any]]:
    """A table row for each two judges and kind: how often they say the same, and Cohen's kappa."""
    rows = []
    for one in verdicts:
        for first, second in combinations(one.by_judge, 2):
            both = [
                pair
                for pair in zip(one.by_judge[first], one.by_judge[second], strict=True)
                if pair[0] is not None and pair[1] is not None
            ]
            n_same = sum(a == b for a, b in both)
            low, high = wilson_interval(n_same, len(both))
            rows.append(
                {
                    "judged": one.kind,
                    "judges": f"{first} and {second}",
                    "items": len(both),
                    "same": _share(n_same, len(both)),
                    "low": low,
                    "high": high,
                    "kappa": cohen_kappa(both),
                }
            )
    return rows


def cohen_kappa(pairs: Sequence[tuple[Any, Any]]) -> float | None:
    """Agreement beyond chance, of scores by squared distance (Cohen 1960, 1968); None where nothing varies."""
    from sklearn.metrics import cohen_kappa_score

    if not pairs or len({value for pair in pairs for value in pair}) < 2:
        return None
    weights = "quadratic" if isinstance(pairs[0][0], int) else None
    kappa = float(cohen_kappa_score([a for a, _ in pairs], [b for _, b in pairs], weights=weights))
    return _rounded(kappa) if math.isfinite(kappa) else None


def wilson_interval(n_hits: int, n: int) -> tuple[float | None, float | None]:
    """The 95% interval of a share by Wilson (1927); None, None of nothing."""
    if n == 0:
        return None, None
    share, z2 = n_hits / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)


def mean_interval(scores: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """The mean of scores from 1 to 5 and its 95% interval by the normal approximation; None of nothing."""
    if not scores:
        return None, None, None
    mean = float(np.mean(scores))
    half = _Z * float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else 4.0
    return round(mean, 4), round(max(1.0, mean - half), 4), round(min(5.0, mean + half), 4)


def codebook_warnings(*, n_names: int, n_labels: int | None, placements: Verdicts | None) -> list[str]:
    """What to say where there are too few names to tell the dialogues apart: judges then agree on little of worth.

    Nothing where there are none: why, the privacy minimums or the audit have said.
    """
    found = []
    if n_labels is not None and 0 < n_names * 2 < n_labels:
        found.append(
            f"the codebook is too coarse: {n_names} base clusters for {n_labels} labels; judges that see no finer "
            "names cannot tell good clusters from bad ones; raise clio.n_clusters"
        )
    if placements is not None and placements.tie_share() > _MANY_TIES:
        found.append(
            f"the codebook is too coarse or its names too alike: judges cannot place {placements.tie_share():.0%} of "
            "the sampled dialogues between two neighbours; lower clio.n_clusters or name them contrastively"
        )
    return found


def _share(n_hits: int, n: int) -> float | None:
    return round(n_hits / n, 4) if n else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
