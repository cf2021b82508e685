"""The page for people: a tree to walk down, the map beside it, search, and the metric tables, in one HTML file."""

from __future__ import annotations

from common.report import Report
from llm_parts.clio.taxonomy import ClioReport


def render_clio_report(report: ClioReport) -> Report:
    """The page of a run, which works offline and asks nothing of any network."""
    raise NotImplementedError
