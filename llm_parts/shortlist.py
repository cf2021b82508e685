"""Which clusters are nearest to a request: the shortlist that a Judge chooses from.

A cluster is found by its name, by its name with summary and criteria, and by some of its requests. Its similarity to a
request is half the best cosine among these and half their mean. On bank requests that puts the right cluster among the
nearest as often as anything else that was tried, and clusters of a single request far more often than the cosine to
their mean vector does; how often a cluster was met plays no part.

Cosines are taken from the mean of all texts at hand: what every request of one business has in common tells no cluster
from another (Mu and Viswanath, arXiv 1702.01417). Among 500 clusters of bank requests the right one is then missing
from the nearest 36 a third less often.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from common.threads import one_blas_thread
from llm_parts.registry import ClusterRecord
from llm_parts.sentence_vectors import sentence_vectors
from llm_parts.word_vectors import WordEmbedder

_TIE_DIGITS = 4  # similarities that differ by less are equal: sums of floats may differ in the last digits


class Embedder(Protocol):
    """What turns texts into vectors; `name` tells one embedder from another."""

    name: str

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [n, d] float32 of the texts, in their order."""
        ...


class ModelEmbedder:
    """A sentence-embedding model of common.encoder, loaded at its first text."""

    def __init__(self, model_name_or_path: str) -> None:
        self.name = model_name_or_path

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [n, d] float32 of the texts, in their order."""
        return sentence_vectors(texts, model=self.name)


def make_embedder(name: str) -> Embedder:
    """The embedder of the key `embedder`: `words`, or a sentence-embedding model."""
    return WordEmbedder() if name == WordEmbedder.name else ModelEmbedder(name)


class TextVectors:
    """Vectors of texts, each embedded once and kept: 1.5 KB a text at 384 dimensions.

    Texts are embedded by one thread of its own, in the order in which they were asked for, so that those of the next
    batches can be embedded while a model is thinking.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self._vectors: dict[str, np.ndarray] = {}
        self._coming: dict[str, Future[dict[str, np.ndarray]]] = {}  # texts on their way
        self._pool: ThreadPoolExecutor | None = None

    def expect(self, texts: Sequence[str]) -> None:
        """Begin to embed texts that will be needed soon."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._vectors and text not in self._coming]
        if not missing:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="embed")
        self._coming.update(dict.fromkeys(missing, self._pool.submit(self._embed, missing)))

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [n, d] float32 of the texts."""
        self.expect(texts)
        for text in texts:
            if text in self._coming:
                for other, vector in self._coming[text].result().items():
                    self._vectors[other] = vector
                    del self._coming[other]
        if not texts:
            return np.zeros((0, 0), np.float32)
        return np.stack([self._vectors[text] for text in texts])

    def _embed(self, texts: list[str]) -> dict[str, np.ndarray]:
        vectors = np.asarray(self.embedder.encode(texts), np.float32)
        return dict(zip(texts, vectors, strict=True))


class ClusterIndex:
    """The clusters by what they are found by; made anew whenever the registry has changed."""

    def __init__(self, records: Sequence[ClusterRecord], vectors: TextVectors) -> None:
        self.cluster_ids = [record.cluster_id for record in records]
        texts = [search_texts(record) for record in records]
        self._prototypes = vectors.of([text for group in texts for text in group])  # [p, d]
        self._sizes = np.array([len(group) for group in texts], np.int64)  # [c] texts of each cluster

    def __len__(self) -> int:
        return len(self.cluster_ids)

    def similarities(self, vectors: np.ndarray) -> np.ndarray:
        """Similarity of each vector [n, d] to each cluster: [n, c] float32, rounded so that ties are ties."""
        from common.kmeans import unit_rows

        if not self.cluster_ids or not len(vectors):
            return np.zeros((len(vectors), len(self.cluster_ids)), np.float32)
        mean = np.concatenate([self._prototypes, vectors]).mean(axis=0)
        with one_blas_thread():  # more of them would take the cores from the calls in flight
            cosines = unit_rows(vectors - mean) @ unit_rows(self._prototypes - mean).T  # [n, p]
        starts = np.cumsum(self._sizes) - self._sizes
        best = np.maximum.reduceat(cosines, starts, axis=1)
        usual = np.add.reduceat(cosines, starts, axis=1) / self._sizes
        return np.round(0.5 * best + 0.5 * usual, _TIE_DIGITS).astype(np.float32)

    def ranked(self, vectors: np.ndarray) -> list[list[tuple[str, float]]]:
        """All clusters for each vector, id and similarity, the nearest first; equal ones in the order of the index."""
        similarity = self.similarities(vectors)
        order = np.argsort(-similarity, axis=1, kind="stable")
        return [
            [(self.cluster_ids[column], float(similarity[row, column])) for column in columns]
            for row, columns in enumerate(order)
        ]


def search_texts(record: ClusterRecord) -> list[str]:
    """The texts that a cluster is found by; never none."""
    name = record.name.replace("_", " ")
    return [name, f"{name}. {record.summary} {record.criteria}".strip(), *record.sample_requests]


def mean_rows(vectors: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The mean directions [c, d] of groups of vectors [n, d] that begin at `starts` [c]; a zero mean stays zero."""
    from common.kmeans import unit_rows

    return unit_rows(np.add.reduceat(vectors, starts, axis=0))
