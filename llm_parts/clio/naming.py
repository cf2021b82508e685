"""Names and summaries of clusters: three ways to make them, the check that they are true, and that they are distinct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_parts.clio.taxonomy import ClusterName

if TYPE_CHECKING:
    from llm_parts.client import LlmClient
    from llm_parts.clio.settings import ClioSettings


def name_clusters(
    members: Sequence[Sequence[str]],
    outsiders: Sequence[Sequence[str]],
    *,
    client: LlmClient,
    settings: ClioSettings,
    step: str = "name",
) -> list[ClusterName]:
    """A name and a summary for each cluster, from texts of members and of the outsiders nearest to it.

    `members[i]` and `outsiders[i]` are the texts of cluster i; for parents of a hierarchy they are the names and
    summaries of their children. Names of the result differ from each other. `step` is what the calls are counted
    under. A cluster whose answer cannot be used is named by what its members say most.
    """
    raise NotImplementedError
