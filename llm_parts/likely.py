"""Which of the known clusters a batch of requests is likely about, however many are known.

Its Proposer sees these, and no more of them in a large registry than in a small one. So they tell the Judge where else
to look for a request than among the clusters nearest to it: had none of them covered it, the Proposer would have named
it in a proposal, and then the known clusters nearest to the words of the proposal are the ones to look at.
"""

from __future__ import annotations

import numpy as np

from llm_parts.judging import MAX_CLUSTERS_IN_PROMPT
from llm_parts.shortlist import ClusterIndex

SHOWN_AT_LEAST = 36
SHOWN_FOR_EACH = 0.75  # of the requests, where that is more
NEAREST_OF_EACH = 3  # and no more than so many for each: a few requests are likely in few clusters
# How sharply the nearest cluster of a request is preferred to the next ones: the temperature of a softmax over
# similarities. Half and twice of it serve as well, for bank requests among 77 and among 500 clusters.
TEMPERATURE = 0.05


def likely_clusters(index: ClusterIndex, vectors: np.ndarray) -> list[str]:
    """Ids of the clusters of an index, by the number of requests [n, d] that can be expected in them, most first."""
    if not len(index) or not len(vectors):
        return []
    similarity = index.similarities(vectors)
    odds = np.exp((similarity - similarity.max(axis=1, keepdims=True)) / TEMPERATURE)
    expected = (odds / odds.sum(axis=1, keepdims=True)).sum(axis=0)  # [c] requests of each cluster
    return [index.cluster_ids[column] for column in np.argsort(-np.round(expected, 4), kind="stable")]


def n_shown(n_requests: int) -> int:
    """How many of them the Proposer of a batch sees at most."""
    enough = max(SHOWN_AT_LEAST, round(SHOWN_FOR_EACH * n_requests))
    return min(enough, NEAREST_OF_EACH * n_requests, MAX_CLUSTERS_IN_PROMPT)
