"""Vectors of texts by their words alone: no model, no meaning, every language."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np


class WordEmbedder:
    """Hashed words and parts of words: knows nothing of meaning, needs no model, and reads every language."""

    name = "words"
    _DIMENSION = 1024

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [n, 1024] float32 of the texts, in their order."""
        vectors = np.zeros((len(texts), self._DIMENSION), np.float32)
        for row, text in enumerate(texts):
            for feature, n in Counter(_word_features(text)).items():
                code = zlib.crc32(feature.encode("utf-8", "replace"))
                # The sign keeps features that share a place from adding up.
                vectors[row, code % self._DIMENSION] += (1 if code & 0x80000000 else -1) * n**0.5
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.maximum(lengths, 1e-12)


def _word_features(text: str) -> Iterator[str]:
    """The words of a text and, of longer ones, all runs of four letters with the ends marked."""
    for word in re.findall(r"\w+", text.casefold()):
        yield word
        marked = f"^{word}$"
        yield from (marked[start : start + 4] for start in range(len(marked) - 3) if len(word) > 3)
