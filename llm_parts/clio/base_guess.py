"""How many base clusters a run will come to show, guessed before the first facet is there.

The steps after the facets ask by the cluster, and of few dialogues they are half of all calls. So few dialogues are
clustered beforehand. The facets of a run that asks no model cost nothing: its clusters are known. Of one that asks a
model the dialogues are clustered by the words of their users, with several seeds, each of which gives a number that may
come. Of many dialogues the facets are nearly all calls, and what is known of the sizes of k-means clusters is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_parts.clio.algorithms import Space, count_clusters, label_rows
from llm_parts.clio.conversations import Conversation
from llm_parts.clio.embedding import embed_texts
from llm_parts.clio.facets import fit_value
from llm_parts.clio.masking import Masker
from llm_parts.clio.privacy import keep_large
from llm_parts.clio.settings import ClioSettings
from llm_parts.extractive.dialogues import telling_sentences
from llm_parts.word_vectors import WordEmbedder

if TYPE_CHECKING:
    import numpy as np

MAX_CLUSTERED = 300  # dialogues; of more, facets are half of all calls and more
N_DRAWS = 6
_MAX_CHARS = 1000  # of a dialogue
_SPREAD_OF_SIZES = 8.0  # sizes of k-means clusters are about gamma-distributed with this shape


def draw_base_counts(
    asked: Sequence[Conversation], *, settings: ClioSettings, n_distinct: int, is_extractive: bool = False
) -> list[int]:
    """Numbers of base clusters above the minimums that a run over these dialogues, none of them empty, may come to.

    `n_distinct` of the dialogues differ; a run that `is_extractive` asks no model.
    """
    if not asked:
        return [0]
    if len(asked) > MAX_CLUSTERED or settings.algorithm != "kmeans":
        n_clusters = min(count_clusters(settings, n_rows=len(asked)), n_distinct)
        return [round(n_clusters * share_of_large(len(asked) / n_clusters, settings.min_cluster_size))]
    if is_extractive:
        known = _without_umap(settings)
        vectors = embed_texts([_extractive_facet(one, settings) for one in asked], settings=known)
        return [_count_kept(vectors, asked, settings=known, seed=settings.random_state)]
    vectors, quick = WordEmbedder().encode([_said(one) for one in asked]), _without_umap(settings, n_init=1)
    return [_count_kept(vectors, asked, settings=quick, seed=seed) for seed in range(N_DRAWS)]


def share_of_large(mean_size: float, least: int) -> float:
    """The share of clusters with at least `least` members where the mean is `mean_size` and sizes spread as usual.

    Sizes are taken as negative-binomial, a Poisson draw around a gamma-distributed mean.
    """
    from scipy.stats import nbinom

    if least <= 1 or mean_size <= 0:
        return 1.0
    chance = _SPREAD_OF_SIZES / (_SPREAD_OF_SIZES + mean_size)
    return float(nbinom.sf(least - 1, _SPREAD_OF_SIZES, chance))


def _without_umap(settings: ClioSettings, **clustering: Any) -> ClioSettings:
    """The settings without what would cost more than a better guess is worth: UMAP, vectors of a causal model."""
    inner = settings.clustering.model_copy(update={"space": "embeddings", **clustering})
    return settings.model_copy(update={"embedder": "sentence", "clustering": inner})


def _count_kept(vectors: np.ndarray, asked: Sequence[Conversation], *, settings: ClioSettings, seed: int) -> int:
    """The clusters of vectors [n, d] that hold conversations and users enough."""
    labels = label_rows(Space(vectors, seed=seed), settings=settings)
    users = [one.user_id for one in asked]
    kept = keep_large(
        labels,
        users if any(users) else None,
        n_clusters=int(labels.max(initial=-1)) + 1,
        min_size=settings.min_cluster_size,
        min_users=settings.min_unique_users,
    )
    return len(kept.clusters)


def _extractive_facet(conversation: Conversation, settings: ClioSettings) -> str:
    """The main facet that the provider without a model gives."""
    told = telling_sentences([turn.to_prompt() for turn in conversation.turns])
    return str(fit_value(settings.facets[0], told, Masker(enabled=settings.mask, names=settings.mask_names)) or "")


def _said(conversation: Conversation) -> str:
    """What the user says, or all there is where no turn is a user's."""
    turns = [turn for turn in conversation.turns if turn.role == "user"] or conversation.turns
    return " ".join(turn.content for turn in turns)[:_MAX_CHARS]
