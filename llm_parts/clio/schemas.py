"""The answers that the steps of Clio ask for; how they are sent and checked is the client's business."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llm_parts.schemas import AnswerModel, FilledText, Text


class FacetValue(AnswerModel):
    """One facet of a dialogue; null where there is no answer to the question."""

    name: FilledText
    value: str | int | float | None


class FacetsAnswer(AnswerModel):
    """Answer `facets`: a value for each facet that was asked for."""

    facets: list[FacetValue]


class ClusterNameAnswer(AnswerModel):
    """Answer `cluster_name`: what the members have in common and the outsiders lack."""

    reasoning: Text = ""
    summary: FilledText
    name: FilledText


class HierarchyProposeAnswer(AnswerModel):
    """Answer `hierarchy_propose`: names of the parents that a neighbourhood of clusters needs."""

    reasoning: Text = ""
    names: list[FilledText]


class HierarchyDedupeAnswer(AnswerModel):
    """Answer `hierarchy_dedupe`: the proposed names, each meaning once."""

    names: list[FilledText]


class HierarchyAssignAnswer(AnswerModel):
    """Answer `hierarchy_assign`: the name of the parent that a child belongs to, copied from the list."""

    reasoning: Text = ""
    parent: str


class HierarchyRenameAnswer(ClusterNameAnswer):
    """Answer `hierarchy_rename`: a parent's name and summary by the children that it got."""


class JudgePairAnswer(AnswerModel):
    """Answer `judge_pair`: which of two is better."""

    reasoning: Text = ""
    winner: Literal["a", "b", "tie"]


class JudgeScoreAnswer(AnswerModel):
    """Answer `judge_score`: how good something is, 1 (wrong) to 5 (right)."""

    reasoning: Text = ""
    score: int = Field(ge=1, le=5)


class PrivacyAuditAnswer(AnswerModel):
    """Answer `privacy_audit`: 1 (points to a person) to 5 (says nothing of any one person)."""

    reasoning: Text = ""
    score: int = Field(ge=1, le=5)
