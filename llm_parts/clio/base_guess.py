"""How many base clusters a run will come to show, guessed before the first facet is there.

The steps after the facets ask by the cluster, and of few dialogues they are half of all calls. So few dialogues are
clustered as they are, by the words of their users and several seeds: each draw is a number that may come. Of many
dialogues, the facets are nearly all calls, and what is known of the sizes of k-means clusters is enough.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_parts.clio.algorithms import Space, count_clusters, label_rows
from llm_parts.clio.conversations import Conversation
from llm_parts.clio.privacy import keep_large
from llm_parts.clio.settings import ClioSettings
from llm_parts.word_vectors import WordEmbedder

MAX_CLUSTERED = 1000  # dialogues
N_DRAWS = 6
_MAX_CHARS = 1000  # of a dialogue
_SPREAD_OF_SIZES = 8.0  # sizes of k-means clusters are about gamma-distributed with this shape


def draw_base_counts(asked: Sequence[Conversation], *, settings: ClioSettings, n_distinct: int) -> list[int]:
    """Numbers of base clusters above the minimums that a run over these dialogues may come to; none of them is empty.

    `n_distinct` of the dialogues differ.
    """
    if not asked:
        return [0]
    if len(asked) <= MAX_CLUSTERED and settings.algorithm == "kmeans":
        return _by_clustering(asked, settings=settings)
    n_clusters = min(count_clusters(settings, n_rows=len(asked)), n_distinct)
    return [round(n_clusters * share_of_large(len(asked) / n_clusters, settings.min_cluster_size))]


def share_of_large(mean_size: float, least: int) -> float:
    """The share of clusters with at least `least` members where the mean is `mean_size` and sizes spread as usual.

    Sizes are taken as negative-binomial, a Poisson draw around a gamma-distributed mean.
    """
    from scipy.stats import nbinom

    if least <= 1 or mean_size <= 0:
        return 1.0
    chance = _SPREAD_OF_SIZES / (_SPREAD_OF_SIZES + mean_size)
    return float(nbinom.sf(least - 1, _SPREAD_OF_SIZES, chance))


def _by_clustering(asked: Sequence[Conversation], *, settings: ClioSettings) -> list[int]:
    vectors = WordEmbedder().encode([_said(one) for one in asked])
    users = [one.user_id for one in asked]
    quick = settings.model_copy(
        update={"clustering": settings.clustering.model_copy(update={"space": "embeddings", "n_init": 1})}
    )
    counts = []
    for seed in range(N_DRAWS):
        labels = label_rows(Space(vectors, seed=seed), settings=quick)
        kept = keep_large(
            labels,
            users if any(users) else None,
            n_clusters=int(labels.max(initial=-1)) + 1,
            min_size=settings.min_cluster_size,
            min_users=settings.min_unique_users,
        )
        counts.append(len(kept.clusters))
    return counts


def _said(conversation: Conversation) -> str:
    """What the user says, or all there is where no turn is a user's."""
    turns = [turn for turn in conversation.turns if turn.role == "user"] or conversation.turns
    return " ".join(turn.content for turn in turns)[:_MAX_CHARS]
