"""The two ways to embed, side by side on the same facets: what clusters each gives, and how far they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.config import ConfigError
from common.neighbors import exact_neighbors
from common.separation import effective_rank
from llm_parts.clio.base_clusters import cluster_vectors
from llm_parts.clio.embedding import embed_facets, embedder_name
from llm_parts.clio.measures import as_row, mean_agreement
from llm_parts.clio.vector_settings import VectorSettings

# Neighbours of a row that two embedders may share, and rows that are asked.
N_NEIGHBORS = 10
_SAMPLED_ROWS = 5000


def check_comparison(settings: VectorSettings, *, llm_model: str | None = None) -> None:
    """Refuse a comparison without a causal model, before anything is done; raises ConfigError."""
    if settings.embedding.compare and not (settings.embedding.llm_model or llm_model):
        raise ConfigError(
            "clio.embedding.compare needs a causal model to compare with; set clio.embedding.llm_model to a Hugging "
            "Face id or a folder"
        )


def compare_embedders(
    columns: Mapping[str, Sequence[str]],
    *,
    settings: VectorSettings,
    seed: int,
    weights: Mapping[str, float] | None = None,
    llm_model: str | None = None,
    true_labels: Sequence[object] | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Embed and cluster `columns` by the sentence model and by the causal one; a table row for each.

    Beside the scores of the clusters: `dimension`; `effective_rank`, how many directions the vectors really use;
    `shared_neighbors`, the mean share of a row's ten nearest rows that the sentence model has too; and
    `agreement`, the adjusted Rand index with its clusters. Of more than 5,000 rows neighbours are those in a sample.

    Raises UserError for a model that cannot be loaded.
    """
    rows, labelings, graphs = [], [], []
    for embedder in ("sentence", "llm"):
        changed = settings.model_copy(update={"embedder": embedder})
        vectors = embed_facets(columns, settings=changed, weights=weights, llm_model=llm_model, progress=progress)
        base = cluster_vectors(vectors, settings=changed, seed=seed, true_labels=true_labels)
        labelings.append(base.labels)
        graphs.append(_neighbors(vectors, seed=seed))
        rows.append(
            {
                "embedder": embedder,
                "model": embedder_name(changed, llm_model=llm_model),
                "dimension": vectors.shape[1],
                **as_row({"effective_rank": effective_rank(vectors, center=True), **base.scores}),
                **as_row(
                    {
                        "shared_neighbors": _shared(graphs[0], graphs[-1]),
                        "agreement": mean_agreement([labelings[0], labelings[-1]]),
                    }
                ),
            }
        )
    return rows


def _neighbors(vectors: np.ndarray, *, seed: int) -> np.ndarray:
    """The nearest rows [s, m] of each row of a sample within it."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:_SAMPLED_ROWS])
    m = min(N_NEIGHBORS, len(chosen) - 1)
    return exact_neighbors(vectors[chosen], m).indices if m > 0 else np.zeros((len(chosen), 0), np.int32)


def _shared(one: np.ndarray, other: np.ndarray) -> float:
    if one.size == 0:
        return float("nan")
    return float(np.mean([len(np.intersect1d(a, b)) / one.shape[1] for a, b in zip(one, other, strict=True)]))
