"""What passes between the steps of Clio: names, levels, hierarchies, and everything that the report shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

NOISE = -1


@dataclass(frozen=True)
class ClusterName:
    """What a namer gives."""

    name: str  # ten words at most
    summary: str  # two sentences at most


@dataclass(frozen=True)
class Level:
    """One level of a hierarchy: its parents, and the parent of each cluster one level below."""

    names: list[ClusterName]  # [n_parents]
    parent_of: np.ndarray  # [n_children] int64; the children of the lowest level are the base clusters


@dataclass(frozen=True)
class Hierarchy:
    """A tree over the base clusters; levels[0] is the top, levels[-1] stands right above the base clusters."""

    kind: str  # "llm" | "linkage"
    levels: list[Level]
    calls: int  # questions put to a model, answers from the cache included
    cost: float  # NaN where the price of the model is not known
    warnings: tuple[str, ...] = ()  # what did not go as asked for


@dataclass(frozen=True)
class TaxonomyNode:
    """A cluster of any level with all that is under it."""

    id: str
    name: str
    summary: str
    size: int  # conversations
    children: list[TaxonomyNode]


@dataclass(frozen=True)
class ClioReport:
    """Everything the report shows."""

    conversation_ids: list[str]  # [n]
    base_labels: np.ndarray  # [n] int64, NOISE in no cluster
    base_names: list[ClusterName]  # [n_base]
    hierarchies: list[Hierarchy]
    map_xy: np.ndarray  # [n, 2] float32
    hover: list[str]  # [n] the main facet, masked; conversations only where they may be shown
    facets: dict[str, list[Any]]  # column -> [n]
    tables: list[tuple[str, list[dict[str, Any]]]]  # (title, rows), the metric tables
    audit: dict[str, Any] = field(default_factory=dict)  # what was dropped where
    show_outsiders: bool = False  # whether texts of conversations in no cluster are shown: they point to one person

    def shown_texts(self) -> list[str]:
        """The hover text of each conversation, empty where it is withheld: [n]."""
        if self.show_outsiders:
            return self.hover
        return [text if label != NOISE else "" for text, label in zip(self.hover, self.base_labels, strict=True)]


def base_paths(hierarchy: Hierarchy, *, n_base: int) -> np.ndarray:
    """The number of each base cluster's ancestor on each level, the top first: [n_levels, n_base] int64.

    Where no level stands above them, the base clusters are the top themselves: one row of their own numbers.
    """
    if not hierarchy.levels:
        return np.arange(n_base, dtype=np.int64)[None]
    paths = [hierarchy.levels[-1].parent_of]
    for level in hierarchy.levels[-2::-1]:
        paths.insert(0, level.parent_of[paths[0]])
    return np.stack(paths)


def level_names(hierarchy: Hierarchy, base_names: list[ClusterName]) -> list[list[ClusterName]]:
    """The names that the numbers of `base_paths` stand for, level by level, the top first."""
    return [level.names for level in hierarchy.levels] or [base_names]


def count_sizes(labels: np.ndarray, *, n_clusters: int) -> np.ndarray:
    """Members of each cluster, noise not counted: labels [n] -> [n_clusters] int64."""
    return np.bincount(labels[labels >= 0], minlength=n_clusters).astype(np.int64)


def build_tree(hierarchy: Hierarchy, *, base_names: list[ClusterName], sizes: np.ndarray) -> list[TaxonomyNode]:
    """The trees that stand at the top, the largest first; sizes [n_base] are conversations.

    The id of a node tells where it stands: `llm-1-3` is the fourth cluster of level 1, `base-17` a base cluster.
    """
    nodes = [
        TaxonomyNode(f"base-{number}", name.name, name.summary, int(sizes[number]), [])
        for number, name in enumerate(base_names)
    ]
    for depth in range(len(hierarchy.levels), 0, -1):
        nodes = _parents(hierarchy.levels[depth - 1], nodes, prefix=f"{hierarchy.kind}-{depth}")
    return sorted(nodes, key=lambda node: -node.size)


def _parents(level: Level, nodes: list[TaxonomyNode], *, prefix: str) -> list[TaxonomyNode]:
    children: list[list[TaxonomyNode]] = [[] for _ in level.names]
    for node, parent in zip(nodes, level.parent_of.tolist(), strict=True):
        children[parent].append(node)
    return [
        TaxonomyNode(
            f"{prefix}-{number}",
            name.name,
            name.summary,
            sum(child.size for child in under),
            sorted(under, key=lambda child: -child.size),
        )
        for number, (name, under) in enumerate(zip(level.names, children, strict=True))
    ]
